"""An adapter is resolved once and every layer planned once; what that finds wrong is said before a layer is changed."""

import json
import shutil
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from peft import PeftModel, get_peft_model
from representative import each
from safetensors.torch import load_file
from torch import nn
from transformers import AutoModelForCausalLM

from ndlora_plugins import (
    NdLoraConfig,
    adapter,
    hookimpl,
    options,
    register_plugin,
    unregister_plugin,
)
from ndlora_plugins.budget import make_budget
from ndlora_plugins.errors import NdLoraValueError
from ndlora_plugins.integrations.peft import plan_model
from ndlora_plugins.integrations.peft.adapters.check import check_adapter
from ndlora_plugins.integrations.peft.exports.export import export_adapter
from ndlora_plugins.integrations.peft.layers import weights
from ndlora_plugins.integrations.peft.tuner import targets
from ndlora_plugins.methods import Method
from ndlora_plugins.methods.slora import slora
from ndlora_plugins.registry import methods
from ndlora_plugins.structures import Chain
from ndlora_plugins.structures.einsum import Einsum, Equation

FIRST_RELEASE = Path(__file__).parents[1] / "data" / "first_release"
# module, function, its calls for ten layers
COUNTED = [
    (adapter, "plan_layer", 10),
    (targets, "weight_form", 10),
    (targets, "quantization_backend", 10),
    (weights, "quantization_backend", 0),
    (adapter, "method_and_start", 0),
    (options, "method_and_start", 3),
]


def ten_layers():
    return nn.Sequential(*(nn.Linear(6, 6) for _ in range(10)))


@pytest.mark.parametrize("loaded", [False, True])
def test_ten_layers_are_planned_ten_times(loaded, monkeypatch, tmp_path):
    chosen = NdLoraConfig(method="slora", r=2)
    get_peft_model(ten_layers(), chosen).save_pretrained(tmp_path)
    calls = Counter()

    def counting(module, name):
        function = getattr(module, name)

        def counted(*args, **kwargs):
            calls[name, module.__name__] += 1
            return function(*args, **kwargs)

        return counted

    for module, name, _ in COUNTED:
        monkeypatch.setattr(module, name, counting(module, name))
    if loaded:
        PeftModel.from_pretrained(ten_layers(), tmp_path)
    else:
        get_peft_model(ten_layers(), chosen)
    assert calls["plan_layer", adapter.__name__] == 10
    for module, name, most in COUNTED:
        assert calls[name, module.__name__] <= most, name
    assert calls["weight_form", targets.__name__] == 10
    assert calls["method_and_start", options.__name__] >= 1


def config(**options):
    return NdLoraConfig(
        **{"r": 4, "target_modules": ["q_proj", "gate_proj"], "task_type": "CAUSAL_LM"} | options
    )


EQUATION, TWO_OUT = "out r, r in -> out in", "out1 out2 r, r in -> out1 out2 in"
# what a configuration says -> the error
CONFIGURATIONS = [
    ({"method": "slora", "options": {"size": 1}}, "options={'size': ...}: method='slora' has no such option"),
    (
        {"method": "einsum", "options": {"equation": "out r, s in -> out in"}},
        "equation='out r, s in -> out in' is no multilinear form: the axis 'r' is in one factor only",
    ),
    (
        {"method": "einsum", "options": {"equation": TWO_OUT, "sizes": {"out1": 7, "out2": 7}}},
        r"Layer 'model.layers.0.self_attn.q_proj', 48 x 48 \(out x in\): .*=\[7, 7\] multiply to 49",
    ),
    (
        {"method": "einsum", "options": {"equation": EQUATION}, "init_lora_weights": "s_lora"},
        "init_lora_weights='s_lora'.*method='einsum'",
    ),
    ({"method": "strange_sb"}, "'first_gradient' reads the gradient of layer .*, and none was measured: call"),
    ({"method": "slora", "init_lora_weights": "first_gradient"}, "reads the gradient of layer .*, and none was"),
    ({"method": "two_sides", "init_lora_weights": "zero_core"}, "'zero_core'.*'two_sides'"),
    ({"method": "gone"}, "method='gone'"),
]  # fmt: skip


@pytest.mark.parametrize("options, message", CONFIGURATIONS)
def test_what_a_configuration_gets_wrong(options, message, make_llama, stranger):
    for file in ("lora_sb", "shared_sides"):
        stranger(file)
    stranger(
        replace(slora, name="two_sides", structure=lambda layout: Chain(layout, core="none"), factors=("down", "up"))
    )  # fmt: skip
    model = make_llama()
    modules = list(model.modules())
    with pytest.raises(NdLoraValueError, match=message):
        get_peft_model(model, config(**options))
    assert list(model.modules()) == modules
    assert all(parameter.requires_grad for parameter in model.parameters())


# the start's values -> the error
WRONG_STARTS = [
    (
        {"down": (4, 48), "up": (48, 4)},
        r"gives the factors \{'down': \(4, 48\), 'up': \(48, 4\)\}, and method='slora'",
    ),
    (
        {"down": (4, 48), "core": (4, 3), "up": (48, 4)},
        r"'core': \(4, 3\).*and method='slora' has .*'core': \(4, 4\).* The start must give every factor, in its shape",
    ),
]


@pytest.mark.parametrize("shapes, message", WRONG_STARTS)
def test_a_start_that_gives_other_factors(shapes, message, make_llama, stranger):
    plugin = stranger("shared_sides")
    wrong = {name: torch.zeros(shape) for name, shape in shapes.items()}

    class Starts:
        @hookimpl
        def ndlora_starts(self):
            return [replace(plugin.start, name="wrong", function=lambda *_: wrong)]

    starts = Starts()
    register_plugin(starts, name="wrong")
    try:
        model = make_llama()
        modules = list(model.modules())
        with pytest.raises(NdLoraValueError, match=f"^init_lora_weights='wrong' .*{message}"):
            get_peft_model(
                model, config(method="slora", init_lora_weights="wrong", target_modules=["q_proj"])
            )
        assert list(model.modules()) == modules
    finally:
        unregister_plugin(starts)


def edited(directory, tmp_path, **changes):
    """A copy of an adapter's directory, with other entries in its configuration."""
    shutil.copytree(directory, tmp_path / "edited")
    file = tmp_path / "edited/adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))
    return tmp_path / "edited"


# entries of a file of the first release -> the error
FILES = [
    ({"method": "gone"}, "method='gone'"),
    ({"init_lora_weights": "gone"}, "init_lora_weights='gone'"),
    ({"options": {"size": 3}}, "options={'size': ...}: method='nlora' has no such option"),
]


@pytest.mark.parametrize("changes, message", FILES)
def test_a_file_of_what_is_gone(changes, message, tmp_path):
    directory = edited(FIRST_RELEASE / "nlora", tmp_path, **changes)
    model = AutoModelForCausalLM.from_pretrained(FIRST_RELEASE / "base")
    modules = list(model.modules())
    with pytest.raises(NdLoraValueError, match=message):
        PeftModel.from_pretrained(model, directory)
    assert list(model.modules()) == modules
    report = check_adapter(directory)
    assert not report.ok and any(
        message.split("=")[-1].strip("'") in str(problem) for problem in report.problems
    )


def own_names(layout):
    """A stranger's structure: between two sides of its own names stands a vector."""
    equation = Equation.parse("out r, r, r in -> out in")
    sizes = {"out": layout.out_features, "in": layout.in_features}
    return Einsum(layout, equation, tuple(sizes.items()), ("left", "gate", "right"), ("r",))


def test_a_strangers_method_with_its_own_names_on_twenty_layers(
    make_llama, stranger, shake, tokens, load, tmp_path
):
    targets = ["q_proj", "o_proj", "v_proj", "gate_proj"]
    stranger(
        Method(
            name="own_names",
            summary="",
            source="",
            structure=own_names,
            factors=("left", "gate", "right"),
            start="first_zero",
        )  # fmt: skip
    )
    make_llama(num_hidden_layers=5).save_pretrained(tmp_path / "base")
    model = get_peft_model(load(tmp_path / "base"), config(method="own_names", r=3, target_modules=targets))
    shake(model, 0.3)
    logits = model(tokens).logits.detach()
    model.save_pretrained(tmp_path / "adapter")
    for base in (None, str(tmp_path / "base")):
        report = check_adapter(tmp_path / "adapter", base)
        assert report.ok and not report.problems
    for to in ("lora", "merged"):
        export_adapter(tmp_path / "adapter", tmp_path / to, to, base=str(tmp_path / "base"))
    for found in (load(tmp_path / "base", tmp_path / "lora"), load(tmp_path / "merged")):
        torch.testing.assert_close(found(tokens).logits, logits, rtol=1e-3, atol=1e-4)
    with pytest.raises(NdLoraValueError, match="cannot become LoKr: method='own_names' is no Kronecker"):
        export_adapter(tmp_path / "adapter", tmp_path / "lokr", "lokr")
    assert not (tmp_path / "lokr").exists()


@pytest.mark.parametrize("save_frozen", [None, True])
@pytest.mark.parametrize("method", each(methods()))
def test_a_budget_counts_what_is_there(method, save_frozen, fields_of, make_llama, tmp_path):
    config = NdLoraConfig(
        **fields_of(method), save_frozen=save_frozen, target_modules=["q_proj", "k_proj", "v_proj"]
    )
    budget = make_budget(plan_model(make_llama(), config))
    model = get_peft_model(make_llama(), config)
    model.save_pretrained(tmp_path)
    held = dict((*model.named_parameters(), *model.named_buffers()))
    trained = {name: value.numel() for name, value in held.items() if value.requires_grad}
    frozen = {name: value.numel() for name, value in held.items() if "ndlora" in name and name not in trained}
    saved = sum(tensor.numel() for tensor in load_file(tmp_path / "adapter_model.safetensors").values())
    found = sum(trained.values()), sum(frozen.values()), saved
    assert found == (budget.parameters, budget.frozen, budget.saved)
