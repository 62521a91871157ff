"""Tensors that several layers share are one: counted, trained, saved, loaded, copied and merged once."""

import copy
import io
import pickle
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from peft import (
    PeftModel,
    get_peft_model,
    get_peft_model_state_dict,
    inject_adapter_in_model,
    set_peft_model_state_dict,
)
from safetensors.torch import load_file
from torch import nn

from ndlora_plugins import NdLoraConfig
from ndlora_plugins.errors import NdLoraValueError
from ndlora_plugins.integrations.peft.adapters.check import check_adapter
from ndlora_plugins.integrations.peft.exports.export import export_adapter
from ndlora_plugins.integrations.peft.layers.layer import NdLoraLayer
from ndlora_plugins.methods import Method
from ndlora_plugins.methods.crossed import crossed
from ndlora_plugins.structures import Chain

FACTORS = ("down", "core", "up")
TARGETS = ["q_proj", "o_proj"]  # four layers of 48 x 48
SIDES, CORES = 2 * 4 * 48, 4 * 4 * 4


def method(name, shared, **fields):
    """A Chain of which the factors in `shared` are one for all layers of a shape."""

    def key(factor, layer, layout):
        shape = f"{layout.out_features}x{layout.in_features}"
        return f"{factor.name}_{shape}" if factor.name in shared else None

    fields = {"structure": Chain, "factors": FACTORS, "start": "first_zero"} | fields
    return Method(name=name, summary="", source="", shared=key, **fields)


# method -> what brings it in, numbers that train, numbers in the file
METHODS = {
    "strange_shared": ("shared_sides", SIDES + CORES, SIDES + CORES),
    "frozen_sides": (method("frozen_sides", ("down", "up"), trains=("core",)), CORES, SIDES + CORES),
    "nothing_own": (method("nothing_own", FACTORS), SIDES + 16, SIDES + 16),
}


class Two(nn.Module):
    """A model that is no transformers model."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(6, 6), nn.Linear(6, 6)

    def forward(self, x):
        return self.second(self.first(x).relu())


@pytest.fixture(params=METHODS)
def name(request, stranger):
    """Each method's name."""
    stranger(METHODS[request.param][0])
    return request.param


@pytest.fixture
def shared_sides(stranger):
    """The name of the method with shared sides and a core of each layer's own."""
    return stranger("shared_sides").method.name


def config(method, **options):
    return NdLoraConfig(
        method=method, **{"r": 4, "target_modules": TARGETS, "task_type": "CAUSAL_LM"} | options
    )


def layers(model):
    return [module for module in model.modules() if isinstance(module, NdLoraLayer)]


def shared_tensors(model, adapter="default"):
    """Of an adapter, by the ids that its layers see."""
    return [
        {factor: layer.trained_parameters(adapter)[factor] for factor, _ in layer.plan[adapter].shared}
        for layer in layers(model)
    ]


@pytest.mark.parametrize("anchor", [None, "snapshot"])
def test_counted_trained_saved_loaded_merged_and_exported_once(
    name, anchor, make_llama, tokens, shake, load, tmp_path
):
    _, trains, saves = METHODS[name]
    make_llama().save_pretrained(tmp_path / "base")
    base = load(tmp_path / "base")
    start = base(tokens).logits
    model = get_peft_model(base, config(name, anchor=anchor))
    torch.testing.assert_close(model(tokens).logits, start, rtol=1e-5, atol=1e-5)
    assert model.get_nb_trainable_parameters()[0] == trains
    shake(model, 0.3)
    logits = model(tokens).logits.detach()
    assert (logits - start).abs().max() > 1e-3
    model.save_pretrained(tmp_path / "adapter")
    saved = load_file(tmp_path / "adapter/adapter_model.safetensors")
    assert anchor or sum(value.numel() for value in saved.values()) == saves
    for low_cpu_mem_usage in (False, True):
        loaded = PeftModel.from_pretrained(
            load(tmp_path / "base"), tmp_path / "adapter", "other", low_cpu_mem_usage=low_cpu_mem_usage
        )
        assert not [key for key, value in loaded.state_dict().items() if value.is_meta]
        assert torch.equal(loaded.eval()(tokens).logits, logits)
    report = check_adapter(tmp_path / "adapter", str(tmp_path / "base"))
    assert report.ok, report.problems
    assert check_adapter(tmp_path / "adapter").ok
    for to in ("lora", "merged"):
        export_adapter(tmp_path / "adapter", tmp_path / to, to, base=str(tmp_path / "base"))
    for found in (
        load(tmp_path / "base", tmp_path / "lora"),
        load(tmp_path / "merged"),
        model.merge_and_unload(),
    ):
        torch.testing.assert_close(found(tokens).logits, logits, rtol=1e-3, atol=1e-4)


def test_an_optimizer_steps_it_once_with_the_gradients_of_all_layers(name, make_llama, tokens):
    model = get_peft_model(make_llama(), config(name))
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    assert len({id(parameter) for parameter in trained}) == len(trained)
    assert len({parameter.data_ptr() for parameter in trained}) == len(trained)
    assert sum(parameter.numel() for parameter in trained) == METHODS[name][1]
    optimizer = torch.optim.AdamW(trained, lr=0.05)
    losses = []
    for _ in range(6):
        loss = model(tokens, labels=tokens).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.01


def through_pickle(model):
    return pickle.loads(pickle.dumps(model))


def through_torch(model):
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize("copied", [copy.deepcopy, through_pickle, through_torch])
def test_a_copy_has_one_tensor_of_its_own(copied, name, shake):
    # transformers 5.16's models cannot be pickled, with LoRA neither
    model = shake(get_peft_model(Two(), NdLoraConfig(method=name, r=2, target_modules=["first", "second"])))
    x = torch.randn(5, 6)
    y = model(x)
    other = copied(model)
    assert torch.equal(other(x), y)
    assert other.base_model.bank.factors is other.base_model.ndlora_shared
    assert all(layer.bank is other.base_model.bank for layer in layers(other))
    assert all(layer.clock is other.base_model.clock for layer in layers(other))
    assert other.base_model.bank is not model.base_model.bank
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.zero_()
    assert torch.equal(model(x), y)


# what is done with a model that has the adapters "default" and "other" -> those of them that train then
OPERATIONS = [
    (lambda model: None, ["default"]),
    (lambda model: model.set_adapter("other"), ["other"]),
    (lambda model: model.base_model.set_adapter(["default", "other"]), ["default", "other"]),
    (lambda model: model.set_adapter("other", inference_mode=True), []),
    (lambda model: model.set_requires_grad("default", False), []),
    (lambda model: model.set_requires_grad("other"), ["default", "other"]),
    (lambda model: model.base_model.disable_adapter_layers(), []),
    (lambda model: [model.base_model.disable_adapter_layers(), model.base_model.enable_adapter_layers()], ["default"]),
    (lambda model: model.delete_adapter("other"), ["default"]),
    (lambda model: model.delete_adapter("default"), ["other"]),
    (lambda model: model.add_adapter("third", config("strange_shared")), ["default"]),
    (lambda model: model.add_adapter("third", config("strange_shared", inference_mode=True)), ["default"]),
    (
        lambda model: [
            model.set_requires_grad("default", False), model.add_adapter("third", config("strange_shared"))
        ],
        [],
    ),
]  # fmt: skip


@pytest.mark.filterwarnings("ignore:Adapter default was active")
@pytest.mark.parametrize("operation, expected", OPERATIONS)
def test_what_is_shared_trains_when_the_layers_own_does(operation, expected, shared_sides, make_llama):
    model = get_peft_model(make_llama(), config(shared_sides))
    model.add_adapter("other", config(shared_sides))
    operation(model)
    for adapter in model.peft_config:
        for layer in layers(model):
            flags = {
                factor: value.requires_grad for factor, value in layer.trained_parameters(adapter).items()
            }
            assert flags == dict.fromkeys(FACTORS, adapter in expected), adapter


def test_two_adapters_have_each_its_own(shared_sides, make_llama, tokens, shake, tmp_path):
    model = shake(get_peft_model(make_llama(), config(shared_sides, random_seed=1)))
    first = model(tokens).logits.detach()
    model.add_adapter("other", config(shared_sides, random_seed=2))
    model.set_adapter("other")
    shake(model, seed=5)
    second = model(tokens).logits.detach()
    assert not torch.equal(first, second)
    with model.disable_adapter():
        assert torch.equal(model(tokens).logits, make_llama()(tokens).logits)
    model.set_adapter("default")
    assert torch.equal(model(tokens).logits, first)
    model.save_pretrained(tmp_path)
    numbers = [
        sum(value.numel() for value in load_file(tmp_path / directory / "adapter_model.safetensors").values())
        for directory in ("", "other")
    ]
    assert numbers == [SIDES + CORES, SIDES + CORES]
    again = PeftModel.from_pretrained(make_llama(), tmp_path)
    again.load_adapter(tmp_path / "other", "other")
    assert torch.equal(again(tokens).logits, first)
    again.set_adapter("other")
    assert torch.equal(again(tokens).logits, second)
    again.delete_adapter("other")
    assert not [key for key in again.state_dict() if ".other" in key]
    assert torch.equal(again(tokens).logits, first)


def test_an_adapter_of_a_name_that_was_deleted_starts_anew(shared_sides, make_llama):
    model = get_peft_model(make_llama(), config(shared_sides))
    model.add_adapter("other", config(shared_sides))
    model.delete_adapter("other")
    model.add_adapter("other", NdLoraConfig(method=shared_sides, r=2, target_modules=["gate_proj"]))
    assert {tuple(value.shape) for value in model.base_model.bank.factors["other"].values()} == {
        (2, 48),
        (96, 2),
    }


@pytest.mark.parametrize("autocast_adapter_dtype", [True, False])
@pytest.mark.parametrize("low_cpu_mem_usage", [True, False])
def test_on_a_base_of_half_precision_all_factors_have_one_dtype(
    autocast_adapter_dtype, low_cpu_mem_usage, name, make_llama, tokens, shake, tmp_path
):
    options = {"autocast_adapter_dtype": autocast_adapter_dtype}
    model = get_peft_model(make_llama(dtype=torch.bfloat16), config(name), **options)
    shake(model).save_pretrained(tmp_path)
    options["low_cpu_mem_usage"] = low_cpu_mem_usage
    loaded = PeftModel.from_pretrained(make_llama(dtype=torch.bfloat16), tmp_path, **options)
    expected = torch.float32 if autocast_adapter_dtype else torch.bfloat16
    for found in (model, loaded):
        dtypes = {parameter.dtype for key, parameter in found.named_parameters() if "ndlora_" in key}
        assert dtypes == {expected}
    assert torch.equal(loaded.eval()(tokens).logits, model.eval()(tokens).logits)


def test_the_low_level_state_dict(name, make_llama, tokens, shake):
    model = shake(get_peft_model(make_llama(), config(name)))
    state = get_peft_model_state_dict(model)
    assert sum(value.numel() for value in state.values()) == METHODS[name][2]
    given = get_peft_model_state_dict(model, state_dict=model.state_dict())
    assert given.keys() == state.keys()
    other = get_peft_model(make_llama(), config(name), adapter_name="other")
    result = set_peft_model_state_dict(other, state, "other")
    assert not result.unexpected_keys
    assert torch.equal(other(tokens).logits, model(tokens).logits)


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_gradient_checkpointing_gives_the_same_gradients(use_reentrant, name, make_llama, tokens, shake):
    model = shake(get_peft_model(make_llama(), config(name)))
    model.train()
    gradients = []
    for checkpointing in (False, True):
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
        model.zero_grad()
        model(tokens, labels=tokens).loss.backward()
        gradients.append(
            {key: value.grad.clone() for key, value in model.named_parameters() if value.requires_grad}
        )
    torch.testing.assert_close(*gradients, rtol=1e-5, atol=1e-7)


def test_whole_modules_beside_it(shared_sides, make_llama, tokens, shake, tmp_path):
    model = get_peft_model(make_llama(), config(shared_sides, modules_to_save=["lm_head"]))
    assert model.get_nb_trainable_parameters()[0] == SIDES + CORES + 48 * 128
    shake(model).save_pretrained(tmp_path)
    assert (
        sum(value.numel() for value in load_file(tmp_path / "adapter_model.safetensors").values())
        == SIDES + CORES + 48 * 128
    )
    assert torch.equal(PeftModel.from_pretrained(make_llama(), tmp_path)(tokens).logits, model(tokens).logits)


def through_inject(model, chosen):
    inject_adapter_in_model(chosen, model)


def through_transformers(model, chosen):
    model.add_adapter(chosen)


@pytest.mark.parametrize("inject", [through_inject, through_transformers])
def test_without_a_peft_model_it_is_refused_and_others_are_not(
    inject, shared_sides, make_llama, tokens, transformers_adapters
):
    model = make_llama()
    modules, keys = list(model.modules()), model.state_dict().keys()
    flags = [parameter.requires_grad for parameter in model.parameters()]
    with pytest.raises(
        NdLoraValueError, match="method='strange_shared' has tensors that several layers share"
    ):
        inject(model, config(shared_sides))
    assert list(model.modules()) == modules and model.state_dict().keys() == keys
    assert [parameter.requires_grad for parameter in model.parameters()] == flags
    model = make_llama()
    inject(model, config("slora"))
    assert len(layers(model)) == 4
    model(tokens, labels=tokens).loss.backward()


@pytest.mark.parametrize("first", ["slora", "strange_shared"])
def test_what_fails_halfway_takes_shared_tensors_back(first, shared_sides, make_llama, tokens, monkeypatch):
    model = get_peft_model(make_llama(), config(first))
    keys, logits = set(model.state_dict()), model(tokens).logits
    calls = []

    def fails(layer, *args, **kwargs):
        calls.append(layer)
        if len(calls) == 3:
            raise MemoryError
        return add(layer, *args, **kwargs)

    add = NdLoraLayer.update_layer
    monkeypatch.setattr(NdLoraLayer, "update_layer", fails)
    with pytest.raises(MemoryError):
        model.add_adapter("other", config(shared_sides))
    monkeypatch.undo()
    assert set(model.state_dict()) == keys and "other" not in model.base_model.bank.factors
    assert torch.equal(model(tokens).logits, logits)
    # so that a smaller one can be tried
    model.add_adapter("other", config(shared_sides, r=2))
    model.set_adapter("other")
    assert model.get_nb_trainable_parameters()[0] == 2 * 2 * 48 + 4 * 2 * 2


# what two layers would share, the message
def by_name(factor, layer, layout):
    return factor.name


def with_a_dot(factor, layer, layout):
    return f"{factor.name}.{layer}"


def a_number(factor, layer, layout):
    return 3


# key of the shared tensors, the configuration's options, what the error must say
MISFITS = [
    (
        by_name, {"target_modules": ["q_proj", "gate_proj"]},
        r"method='misfit' shares 'up' under 'up': it is \[48, 4\] on layer 'model.layers.0.self_attn.q_proj' and "
        r"\[96, 4\] on layer 'model.layers.0.mlp.gate_proj'",
    ),
    (
        by_name, {"rank_pattern": {"layers.1.self_attn.q_proj": 2}},
        r"'down' under 'down': it is \[4, 48\] on layer 'model.layers.0.self_attn.q_proj' and \[2, 48\] on layer "
        r"'model.layers.1.self_attn.q_proj'",
    ),
    (with_a_dot, {}, r"method='misfit' shares 'down' of layer 'model.layers.0.self_attn.q_proj' under 'down.model"),
    (a_number, {}, r"method='misfit' shares 'down' of layer 'model.layers.0.self_attn.q_proj' under 3: "),
]  # fmt: skip


@pytest.mark.parametrize("key, options, message", MISFITS)
def test_what_cannot_be_shared_is_refused_before_anything_is_changed(
    key, options, message, stranger, make_llama
):
    stranger(
        Method(
            name="misfit",
            summary="",
            source="",
            structure=Chain,
            factors=FACTORS,
            start="first_zero",
            shared=key,
        )  # fmt: skip
    )
    model = make_llama()
    modules = list(model.modules())
    with pytest.raises(NdLoraValueError, match=message):
        get_peft_model(model, config("misfit", **options))
    assert list(model.modules()) == modules


@pytest.mark.parametrize("taken", ["ndlora_shared", "ndlora_shared_frozen", "down_48x48"])
def test_an_adapter_cannot_have_the_name_of_what_is_shared(taken, shared_sides, make_llama):
    with pytest.raises(NdLoraValueError, match=f"An adapter cannot be called '{taken}'"):
        get_peft_model(make_llama(), config(shared_sides), adapter_name=taken)


@pytest.mark.parametrize("combination", ["cat", "svd"])
@pytest.mark.parametrize("method_name", ["strange_shared", "one_mode"])
def test_sums_of_adapters_that_share(
    combination, method_name, shared_sides, stranger, make_llama, tokens, shake, tmp_path
):
    # the terms of this one make a sum side by side, if only they are a layer's own
    stranger(replace(crossed, name="one_mode", shared=method("", ("mode_1",)).shared))
    model = shake(get_peft_model(make_llama(), config(method_name, r=1, random_seed=1)))
    model.add_adapter("other", config(method_name, r=1, random_seed=2))
    model.set_adapter("other")
    shake(model, seed=5)
    options = {"svd_rank": 32} if combination == "svd" else {}
    model.add_weighted_adapter(
        ["default", "other"], [0.5, -2.0], "sum", combination_type=combination, **options
    )
    for layer in layers(model):
        expected = 0.5 * layer.get_delta_weight("default") - 2.0 * layer.get_delta_weight("other")
        torch.testing.assert_close(layer.get_delta_weight("sum"), expected, rtol=1e-4, atol=1e-5)
    model.set_adapter("sum")
    logits = model(tokens).logits
    model.save_pretrained(tmp_path, selected_adapters=["sum"])
    loaded = PeftModel.from_pretrained(make_llama(), tmp_path / "sum")
    torch.testing.assert_close(loaded(tokens).logits, logits)


def test_on_a_model_that_has_adapters_without_a_peft_model(shared_sides, make_llama, tokens, shake, tmp_path):
    base = make_llama()
    inject_adapter_in_model(config("slora"), base, adapter_name="first")
    model = get_peft_model(base, config(shared_sides))
    assert all(layer.bank is model.base_model.bank for layer in layers(model))
    shake(model)
    model.save_pretrained(tmp_path)
    assert torch.equal(PeftModel.from_pretrained(make_llama(), tmp_path)(tokens).logits, model(tokens).logits)


def test_layers_of_other_shapes_have_other_tensors(shared_sides, make_llama, tokens, shake, tmp_path):
    model = shake(get_peft_model(make_llama(), config(shared_sides, target_modules="all-linear")))
    keys = model.base_model.bank.factors["default"].keys()
    assert {key.rpartition("_")[2] for key in keys} == {"48x48", "24x48", "96x48", "48x96"}
    model.save_pretrained(tmp_path)
    assert torch.equal(PeftModel.from_pretrained(make_llama(), tmp_path)(tokens).logits, model(tokens).logits)
    assert model.get_nb_trainable_parameters()[0] == sum(
        value.numel() for value in load_file(tmp_path / "adapter_model.safetensors").values()
    )


def test_the_gradient_is_the_sum_over_the_layers(shared_sides, shake):
    x = torch.randn(5, 6, dtype=torch.float64)
    chosen = NdLoraConfig(method=shared_sides, r=2, target_modules=["first", "second"])
    model = shake(get_peft_model(Two().double(), chosen, autocast_adapter_dtype=False).double())
    up = model.base_model.bank.factors["default"]["up_6x6"]
    model(x).square().sum().backward()
    step = 1e-6 * torch.randn_like(up)
    values = []
    with torch.no_grad():
        for sign in (1, -1):
            up.add_(sign * step)
            values.append(model(x).square().sum())
            up.sub_(sign * step)
    torch.testing.assert_close((up.grad * step).sum() * 2, values[0] - values[1], rtol=1e-5, atol=1e-12)


@pytest.fixture(scope="module")
def processes(tmp_path_factory):
    """The directory in which one process and two left their adapters."""
    directory = tmp_path_factory.mktemp("processes")
    script = Path(__file__).with_name("train_in_two_processes.py")
    subprocess.run([sys.executable, "-P", script, directory], check=True, timeout=300)
    return directory


@pytest.mark.slow
@pytest.mark.parametrize("file", ["shared_sides", "dylora"])
def test_two_processes_give_the_result_of_one(file, processes):
    one, first, second = (
        load_file(processes / f"{file}-{which}.safetensors") for which in ("0-of-1", "0-of-2", "1-of-2")
    )
    assert one.keys() == first.keys() and max(value.abs().max() for value in one.values()) > 0.01
    for key, value in one.items():
        assert torch.equal(first[key], second[key])
        torch.testing.assert_close(first[key], value, rtol=1e-5, atol=1e-6)


# whether layers have tensors of their own -> where the shared ones go: beside those, else to the base weight
PLACES = [("strange_shared", "cpu"), ("nothing_own", "meta")]


@pytest.mark.parametrize("method_name, device", PLACES)
def test_what_is_shared_is_brought_to_the_layers_device(method_name, device, make_llama, stranger):
    stranger(METHODS[method_name][0])
    layer = layers(get_peft_model(make_llama(), config(method_name)))[0]
    plan, held = layer.plan["default"], layer.ndlora_factors["default"]._parameters
    trained, _ = layer.bank.join("default", plan, held, {}, lambda: torch.device("meta"))
    assert {value.device.type for value in trained.values()} == {device} and len(trained) == 3


def test_layers_of_two_shapes_under_one_key_are_refused_by_name():
    model = nn.ModuleDict(
        {name: nn.ModuleDict({"proj": nn.Linear(24, size)}) for name, size in (("a", 18), ("b", 12))}
    )
    modules = list(model.modules())
    options = {"method": "shared_core", "options": {"share": "kind"}, "target_modules": ["proj"]}
    with pytest.raises(
        NdLoraValueError, match=r"\[18, 16\] on layer 'a.proj' and \[12, 16\] on layer 'b.proj'. Adapt"
    ):
        get_peft_model(model, NdLoraConfig(**options))
    assert list(model.modules()) == modules
