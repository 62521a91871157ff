"""What PEFT gives LoRA, for every method: start, save, load, merge, several adapters, dtypes."""

import copy
import json
import os
import pickle
import re
from dataclasses import replace

import pytest
import torch
from peft import AutoPeftModelForCausalLM, PeftConfig, PeftModel, get_peft_model, inject_adapter_in_model
from representative import REPRESENTATIVE
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, Mamba2Config, MambaConfig

from ndlora_plugins import NdLoraConfig
from ndlora_plugins.budget import make_budget
from ndlora_plugins.errors import NdLoraValueError
from ndlora_plugins.integrations.peft.tuner import targets
from ndlora_plugins.integrations.peft.tuner.targets import plan_model

METHODS = {
    **{method: {"method": method} for method in REPRESENTATIVE},
    "ndlinear-3-modes-4-terms": {"method": "ndlinear", "num_modes": 3, "r": 4},
    "ndlinear-reference-start": {"init_lora_weights": "ndlinear"},
    "ndlinear-crossed": {"crossed_modes": 2, "r": 2},
    "nlora-pivots": {"init_lora_weights": "n_lora_pivots", "r": 4},
    "nlora-slices": {"init_lora_weights": "n_lora"},
    "nlora-no-anchor": {"init_lora_weights": "n_lora", "anchor": "none", "r": 4},
    "inttune-no-anchor": {"method": "inttune", "init_lora_weights": "n_lora", "anchor": "none", "r": 8},
}
ANCHORED = [name for name in METHODS if not name.endswith("no-anchor")]
# pairs for two adapters on one layer
PAIRS = [("ndlinear", "slora"), ("slora", "nlora"), ("nlora", "inttune"), ("inttune", "ndlinear")]
MODELS = ["make_llama", "make_gpt2"]
# models of which transformers' kernels read the weights of layers: the configuration's class, its fields
MIXERS = [
    (MambaConfig, {"state_size": 4}),
    (Mamba2Config, {"state_size": 4, "num_heads": 4, "head_dim": 8, "n_groups": 2}),
]


@pytest.fixture
def config(fields_of):
    """A function: an entry of `METHODS` or a method, and further fields -> a configuration."""

    def make(name, **more):
        fields = METHODS.get(name, {"method": name})
        return NdLoraConfig(task_type="CAUSAL_LM", **{**fields_of(fields.get("method")), **fields, **more})

    return make


@pytest.fixture(params=MODELS)
def make_model(request):
    return request.getfixturevalue(request.param)


@pytest.mark.parametrize("name", ANCHORED)
def test_the_first_output_is_the_bases(name, config, make_model, tokens):
    base = make_model()(tokens).logits
    assert torch.equal(get_peft_model(make_model(), config(name)).eval()(tokens).logits, base)


@pytest.mark.parametrize("name", ["nlora-no-anchor", "inttune-no-anchor"])
def test_without_an_anchor_it_is_not(name, config, make_llama, tokens):
    base = make_llama()(tokens).logits
    assert not torch.allclose(
        get_peft_model(make_llama(), config(name, r=24)).eval()(tokens).logits, base, atol=1e-7
    )


@pytest.mark.parametrize("name", METHODS)
def test_disabled_is_the_base_bit_for_bit_and_the_base_is_never_written(
    name, config, make_model, tokens, shake
):
    base = make_model()
    weights, expected = copy.deepcopy(base.state_dict()), base(tokens).logits
    model = shake(get_peft_model(base, config(name))).eval()
    changed = model(tokens).logits
    with model.disable_adapter():
        assert torch.equal(model(tokens).logits, expected)
    assert not torch.equal(changed, expected)
    unloaded = model.unload()
    assert all(torch.equal(value, weights[key]) for key, value in unloaded.state_dict().items())


@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
@pytest.mark.parametrize("name", METHODS)
def test_saved_and_loaded_under_another_seed(
    name, low_cpu_mem_usage, config, make_model, tokens, shake, tmp_path
):
    model = shake(get_peft_model(make_model(), config(name))).eval()
    expected = model(tokens).logits
    model.save_pretrained(tmp_path)
    torch.manual_seed(99)
    loaded = PeftModel.from_pretrained(make_model(), tmp_path, low_cpu_mem_usage=low_cpu_mem_usage)
    torch.testing.assert_close(loaded(tokens).logits, expected)


@pytest.mark.parametrize("name", METHODS)
def test_the_file_holds_only_what_cannot_be_recomputed(name, config, make_llama, shake, tmp_path):
    model = shake(get_peft_model(make_llama(), config(name)))
    model.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    budget = make_budget(plan_model(make_llama(), model.peft_config["default"]))
    assert sum(t.numel() for t in tensors.values()) == budget.saved
    assert not any("lora_A" in key or "lora_B" in key for key in tensors)
    data = sum(t.numel() * t.element_size() for t in tensors.values())
    assert os.path.getsize(tmp_path / "adapter_model.safetensors") < data + 200 * len(tensors) + 200


@pytest.mark.parametrize("safe_merge", [False, True])
@pytest.mark.parametrize("name", METHODS)
def test_merged_equals_unmerged(name, safe_merge, config, make_model, tokens, shake):
    model = shake(get_peft_model(make_model(), config(name))).eval()
    expected = model(tokens).logits
    base = make_model()(tokens).logits
    model.merge_adapter(safe_merge=safe_merge)
    torch.testing.assert_close(model(tokens).logits, expected, rtol=1e-4, atol=1e-4)
    model.unmerge_adapter()
    torch.testing.assert_close(model(tokens).logits, expected, rtol=1e-4, atol=1e-4)
    with model.disable_adapter():
        torch.testing.assert_close(model(tokens).logits, base, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(
        model.merge_and_unload(safe_merge=safe_merge)(tokens).logits, expected, rtol=1e-4, atol=1e-4
    )


def test_safe_merge_raises_before_it_writes(config, make_llama, shake):
    model = get_peft_model(make_llama(), config("slora"), "sound")
    model.add_adapter("broken", config("slora"))
    model.base_model.set_adapter(["sound", "broken"])
    layer = shake(model).base_model.model.model.layers[0].self_attn.q_proj
    before = layer.base_layer.weight.clone()
    with torch.no_grad():
        layer.ndlora_factors["broken"]["up"][0, 0] = float("nan")
    with pytest.raises(ValueError, match="The adapter broken seems to be broken"):
        layer.merge(safe_merge=True)
    assert torch.equal(layer.base_layer.weight, before) and not layer.merged


@pytest.mark.parametrize("first, second", PAIRS)
def test_two_adapters_of_different_methods(first, second, config, make_model, tokens, shake, tmp_path):
    model = get_peft_model(make_model(), config(first), adapter_name="one")
    model.add_adapter("two", config(second))
    shake(model, seed=1)
    model.set_adapter("two")
    shake(model, seed=2).eval()
    base = make_model()(tokens).logits
    only_two = model(tokens).logits
    model.base_model.set_adapter(["one", "two"])
    both = model(tokens).logits
    assert not torch.allclose(both, only_two) and not torch.allclose(both, base)

    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(make_model(), tmp_path / "one", adapter_name="one")
    loaded.load_adapter(tmp_path / "two", adapter_name="two")
    loaded.base_model.set_adapter(["one", "two"])
    torch.testing.assert_close(loaded(tokens).logits, both)

    model.merge_adapter(["one"])  # merged layers run the base layer alone, as in PEFT
    model.unmerge_adapter()
    torch.testing.assert_close(model(tokens).logits, both, rtol=1e-4, atol=1e-4)
    merged = copy.deepcopy(model).merge_and_unload(adapter_names=["one", "two"])
    torch.testing.assert_close(merged(tokens).logits, both, rtol=1e-4, atol=1e-4)
    model.delete_adapter("one")
    model.set_adapter("two")
    torch.testing.assert_close(model(tokens).logits, only_two, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", METHODS)
def test_only_the_active_adapters_factors_train(name, config, make_llama):
    model = get_peft_model(make_llama(), config(name))
    model.add_adapter("other", config("slora"))
    trainable = {n for n, p in model.named_parameters() if p.requires_grad}
    assert trainable and all(re.search(r"ndlora_(factors|shared)\.default\.", n) for n in trainable)
    assert len({p.dtype for p in model.parameters() if p.requires_grad}) == 1


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("autocast_adapter_dtype", [True, False])
def test_half_precision_bases(name, dtype, autocast_adapter_dtype, config, make_llama, tokens, shake):
    model = get_peft_model(
        make_llama(dtype=dtype), config(name), autocast_adapter_dtype=autocast_adapter_dtype
    )
    expected = torch.float32 if autocast_adapter_dtype else dtype
    layer = model.base_model.model.model.layers[0].self_attn.q_proj
    trained, frozen = layer.tensors("default")
    assert {t.dtype for t in trained.values()} == {expected}
    assert {t.dtype for t in frozen.values()} <= {expected, torch.int64}
    shake(model, 0.01)
    out = model(tokens, labels=tokens)
    assert out.logits.dtype == dtype
    out.loss.backward()
    assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.requires_grad)


@pytest.mark.parametrize("name", METHODS)
def test_autocast_does_not_upcast_the_input(name, config, make_llama, tokens, shake):
    model = shake(get_peft_model(make_llama(), config(name)), 0.01)
    layer = model.base_model.model.model.layers[0].self_attn.q_proj
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert layer.update("default", torch.randn(2, 3, 48, dtype=torch.bfloat16)).dtype == torch.bfloat16
        model(tokens, labels=tokens).loss.backward()


@pytest.mark.parametrize("name", METHODS)
def test_dropout_acts_on_the_adapter_alone(name, config, make_llama, tokens, shake):
    model = shake(get_peft_model(make_llama(), config(name, lora_dropout=0.5)))
    model.train()
    assert not torch.equal(model(tokens).logits, model(tokens).logits)
    with model.disable_adapter():
        assert torch.equal(model(tokens).logits, model(tokens).logits)


@pytest.mark.parametrize("name", METHODS)
def test_a_seed_makes_the_start_reproducible_and_leaves_the_global_generator_alone(name, config, make_llama):
    states = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        before = torch.get_rng_state()
        model = get_peft_model(
            make_llama(),
            config(name, random_seed=7),
        )
        assert torch.equal(torch.get_rng_state(), before)
        states.append(model.state_dict())
    assert all(torch.equal(value, states[1][key]) for key, value in states[0].items())


def test_another_seed_another_start(config, make_llama):
    one, two = (
        get_peft_model(make_llama(), config("slora", random_seed=seed)).state_dict() for seed in (1, 2)
    )
    assert any(not torch.equal(value, two[key]) for key, value in one.items())


@pytest.mark.usefixtures("transformers_adapters")
def test_transformers_own_adapter_mixin(make_llama, tokens, shake, tmp_path):
    model = make_llama()
    model.add_adapter(NdLoraConfig(init_lora_weights="n_lora"), adapter_name="mine")
    shake(model).eval()
    expected = model(tokens).logits
    model.save_pretrained(tmp_path)
    other = make_llama()
    other.load_adapter(str(tmp_path), adapter_name="again")
    torch.testing.assert_close(other.eval()(tokens).logits, expected)
    other.delete_adapter("again")
    torch.testing.assert_close(other(tokens).logits, make_llama()(tokens).logits)


def test_auto_classes(config, make_llama, tokens, shake, tmp_path):
    make_llama().save_pretrained(tmp_path / "base")
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    model = shake(get_peft_model(base, config("nlora"))).eval()
    expected = model(tokens).logits
    model.save_pretrained(tmp_path / "adapter")
    assert PeftConfig.from_pretrained(tmp_path / "adapter").peft_type == "NDLORA"
    loaded = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter")
    torch.testing.assert_close(loaded(tokens).logits, expected)
    direct = AutoModelForCausalLM.from_pretrained(tmp_path / "adapter")
    torch.testing.assert_close(direct.eval()(tokens).logits, expected)


def test_inject_and_low_level_state_dict(config, make_llama, tokens, shake):
    from peft import get_peft_model_state_dict, set_peft_model_state_dict

    model = shake(inject_adapter_in_model(config("ndlinear"), make_llama())).eval()
    other = inject_adapter_in_model(config("ndlinear"), make_llama()).eval()
    result = set_peft_model_state_dict(other, get_peft_model_state_dict(model))
    assert not result.unexpected_keys
    torch.testing.assert_close(other(tokens).logits, model(tokens).logits)


@pytest.mark.parametrize("name", METHODS)
def test_deepcopy_and_pickle(name, config, make_llama, tokens, shake):
    model = shake(get_peft_model(make_llama(), config(name))).eval()
    assert torch.equal(copy.deepcopy(model)(tokens).logits, model(tokens).logits)
    # the layer, not the model: transformers 5.16's models cannot be pickled, with LoRA neither
    layer = model.base_model.model.model.layers[0].self_attn.q_proj
    x = torch.randn(3, 48)
    assert torch.equal(pickle.loads(pickle.dumps(layer))(x), layer(x))


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("use_reentrant", [True, False])
def test_gradient_checkpointing_gives_the_same_gradients(
    name, use_reentrant, config, make_llama, tokens, shake
):
    gradients = []
    for checkpointing in (False, True):
        torch.manual_seed(0)
        model = shake(get_peft_model(make_llama(), config(name)), 0.01)
        if checkpointing:
            model.base_model.model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
            model.enable_input_require_grads()
        model.train()
        model(tokens, labels=tokens).loss.backward()
        gradients.append({n: p.grad for n, p in model.named_parameters() if p.requires_grad})
    for key, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][key], gradient)


def test_a_base_that_is_loaded_after_the_adapter(config, make_llama, tokens, shake):
    with torch.device("meta"):
        model = make_llama()
    model = get_peft_model(model, config("inttune"))
    source = shake(get_peft_model(make_llama(), config("inttune")))
    model.load_state_dict(source.state_dict(), assign=True)
    # rotary frequencies are recomputed at run time; they are no part of a state dict
    model.base_model.model.model.rotary_emb = source.base_model.model.model.rotary_emb
    torch.testing.assert_close(model.eval()(tokens).logits, source.eval()(tokens).logits)


def test_hostile_adapter_names(config, make_llama, tokens, shake, tmp_path):
    names = {"ndlora_mine": "slora", "a_ndlora_b": "ndlinear", "weight": "nlora", "lora_A": "inttune"}
    model = get_peft_model(make_llama(), config("slora"), adapter_name="ndlora_mine")
    for name in list(names)[1:]:
        model.add_adapter(name, config(names[name]))
    model.base_model.set_adapter(list(names))
    expected = shake(model).eval()(tokens).logits
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(make_llama(), tmp_path / "ndlora_mine", adapter_name="ndlora_mine")
    for name in list(names)[1:]:
        loaded.load_adapter(tmp_path / name, adapter_name=name)
    loaded.base_model.set_adapter(list(names))
    torch.testing.assert_close(loaded(tokens).logits, expected)


@pytest.mark.parametrize(
    "first, second, taken", [("core", "slora", "core"), ("mode_1", "ndlinear", "mode_1")]
)
def test_an_adapter_named_as_a_tensor_is_refused(first, second, taken, config, make_llama):
    model = get_peft_model(make_llama(), config("nlora"), adapter_name="fine")
    with pytest.raises(ValueError, match=f"cannot be called '{taken}'"):
        model.add_adapter(first, config(second))
    assert list(model.peft_config) == ["fine"]


def test_patterns_layers_and_modes(make_llama):
    model = get_peft_model(
        make_llama(),
        NdLoraConfig(
            method="slora",
            target_modules=["q_proj", "v_proj"],
            layers_to_transform=[1],
            rank_pattern={"q_proj": 2},
            alpha_pattern={"^model.layers.1.self_attn.v_proj": 4},
        ),
    )
    plans = {name: m.plan["default"] for name, m in model.named_modules() if hasattr(m, "plan")}
    assert {name.split("layers.")[1] for name in plans} == {"1.self_attn.q_proj", "1.self_attn.v_proj"}
    assert {(p.layout.rank, p.scaling) for p in plans.values()} == {(2, 4.0), (8, 0.5)}


@pytest.fixture(params=MIXERS)
def make_mixer(request):
    """A function that makes a tiny state-space model."""
    kind, fields = request.param
    options = {"hidden_size": 16, "num_hidden_layers": 2, "vocab_size": 32}
    return lambda: AutoModelForCausalLM.from_config(kind(**options, **fields))


def test_layers_that_a_model_does_not_call_in_training_get_no_new_adapter(make_mixer):
    model, base = get_peft_model(make_mixer(), NdLoraConfig()), make_mixer()
    names = {name.rpartition(".")[2] for name, m in model.named_modules() if hasattr(m, "plan")}
    assert names == {"in_proj"}
    modules = list(base.modules())
    with pytest.raises(
        NdLoraValueError, match="cannot adapt layer '.*out_proj': in training Mamba2?ForCausalLM"
    ):
        get_peft_model(base, NdLoraConfig(target_modules=["in_proj", "out_proj"]))
    assert list(base.modules()) == modules


def test_an_adapter_that_has_them_loads(make_mixer, shake, monkeypatch, tmp_path):
    base, indices = make_mixer().state_dict(), torch.arange(8)[None]
    made, loaded = (make_mixer().eval() for _ in range(2))
    for model in (made, loaded):
        model.load_state_dict(base)
    with monkeypatch.context() as patch:
        patch.setattr(targets, "_UNCALLED", {})
        made = get_peft_model(made, NdLoraConfig(target_modules=["out_proj"]))
    shake(made).save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(loaded, tmp_path)
    assert torch.equal(loaded(indices).logits, made.eval()(indices).logits)


def test_modes_by_hand_for_one_target(make_llama):
    model = get_peft_model(
        make_llama(),
        NdLoraConfig(
            method="ndlinear", modes={"down_proj": {"in_modes": [4, 24]}, "q_proj": {"out_modes": [2, 4, 6]}}
        ),
    )
    layer = model.base_model.model.model.layers[0]
    assert layer.mlp.down_proj.plan["default"].structure.in_modes == (4, 24)
    assert layer.self_attn.q_proj.plan["default"].structure.out_modes == (2, 4, 6)
    assert layer.self_attn.k_proj.plan["default"].structure.in_modes == (6, 8)


def test_config_round_trip(make_llama, tmp_path):
    model = get_peft_model(
        make_llama(), NdLoraConfig(init_lora_weights="n_lora", r=4, modes={"q_proj": {"in_modes": [6, 8]}})
    )
    model.save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "adapter_config.json").read_text())
    assert (saved["method"], saved["r"], saved["lora_alpha"], saved["anchor"]) == ("nlora", 4, 4, "snapshot")
    assert saved["base_fingerprint"] and saved["schema_version"] == 2
    assert saved["layers"]["model.layers.0.self_attn.k_proj"] == [
        "model.layers.0.self_attn.k_proj",
        "linear",
        [24, 48],
    ]
    loaded = PeftConfig.from_pretrained(tmp_path)
    assert isinstance(loaded, NdLoraConfig) and loaded.modes == {"q_proj": {"in_modes": [6, 8]}}
    loaded = replace(loaded, method="ndlinear", init_lora_weights=True)
    assert loaded.options_for("q_proj").options.in_modes == (6, 8)


def test_one_config_may_serve_two_models(config, make_llama):
    shared = config("nlora")
    get_peft_model(make_llama(seed=0), shared)
    get_peft_model(make_llama(seed=1), shared)


def test_scaling_can_be_changed(config, make_llama, tokens, shake):
    model = shake(get_peft_model(make_llama(), config("slora"))).eval()
    expected = model(tokens).logits
    layers = [m for m in model.modules() if hasattr(m, "plan")]
    for layer in layers:
        layer.scale_layer(3.0)
    assert not torch.allclose(model(tokens).logits, expected)
    for layer in layers:
        layer.unscale_layer(3.0)
    torch.testing.assert_close(model(tokens).logits, expected)
