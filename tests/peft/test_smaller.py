"""Adapters cut to their first rank units, and pruned of those that are zero: equal answers from a smaller file."""

import json

import pytest
import torch
from peft import get_peft_model
from representative import each
from safetensors.torch import load_file
from typer.testing import CliRunner

from ndlora_plugins import NdLoraConfig
from ndlora_plugins.commands.main import app
from ndlora_plugins.errors import NdLoraValueError
from ndlora_plugins.integrations.peft.adapters.check import check_adapter
from ndlora_plugins.integrations.peft.adapters.smaller import cut_adapter, prune_adapter
from ndlora_plugins.integrations.peft.exports.export import export_adapter
from ndlora_plugins.integrations.peft.layers.layer import NdLoraLayer
from ndlora_plugins.registry import methods

# fields of what is pruned
PRUNED = {
    "sora": {"method": "sora", "r": 4},
    "crossed": {"r": 4},
    "slora": {"method": "slora", "r": 4, "use_rslora": True},
    "anchored terms": {"r": 4, "init_lora_weights": "ndlinear"},
    "core alone": {"method": "inttune", "r": 4},
    "chosen rows": {"method": "rows", "r": 4},
    "train": {"method": "tensor_train", "r": 4},
    "shared": {"method": "shared_core", "r": 4},
}


def layers_of(model):
    return {name: layer for name, layer in model.named_modules() if isinstance(layer, NdLoraLayer)}


def zero_units(model, units):
    """Of everything that trains, on all layers."""
    with torch.no_grad():
        for layer in layers_of(model).values():
            plan = layer.plan["default"]
            for name, parameter in layer.trained_parameters("default").items():
                for axis in plan.structure.rank_axes.get(name, ()):
                    parameter.index_fill_(axis, torch.tensor(units, dtype=torch.long), 0.0)


@pytest.fixture
def save(tmp_path, make_llama, shake, load):
    """A function that saves a base and a trained adapter of which some units are zero; returns the model."""

    def make(units=(), **fields):
        make_llama().save_pretrained(tmp_path / "base")
        model = shake(get_peft_model(load(tmp_path / "base"), NdLoraConfig(task_type="CAUSAL_LM", **fields)))
        zero_units(model, list(units))
        model.eval().save_pretrained(tmp_path / "adapter")
        return model

    return make


@pytest.mark.parametrize("method", each(methods()))
def test_a_cut_adapter_answers_with_its_first_units(method, save, fields_of, tmp_path, tokens, load):
    model = save(**{**fields_of(method), "r": 4})
    report = cut_adapter(tmp_path / "adapter", tmp_path / "out", 2)
    again = load(tmp_path / "base", tmp_path / "out")
    found = layers_of(again)
    for name, layer in layers_of(model).items():
        trained, frozen = layer.tensors("default")
        plan = layer.plan["default"]
        structure = plan.structure
        cut = [structure.cut_factors(factors, 2) for factors in (trained, frozen)]
        smaller = structure.cut(2)
        if plan.anchor == "snapshot":
            names = frozenset(trained)
            delta = smaller.changed(names).delta(smaller.change(cut[1], cut[0]))
        else:
            delta = smaller.delta({**cut[0], **cut[1]})
        expected = layer.form.stored(layer.scaling["default"] * delta)
        torch.testing.assert_close(found[name].get_delta_weight("default"), expected, atol=1e-5, rtol=1e-4)
    assert again.peft_config["default"].r == 2
    assert 0 < report.largest_error
    assert check_adapter(tmp_path / "out", str(tmp_path / "base")).ok


@pytest.mark.parametrize("case", PRUNED)
def test_pruned_adapters_answer_as_before(case, save, tmp_path, tokens, load):
    model = save(units=[0, 2], **PRUNED[case])
    report = prune_adapter(tmp_path / "adapter", tmp_path / "out")
    again = load(tmp_path / "base", tmp_path / "out")
    torch.testing.assert_close(again(tokens).logits, model(tokens).logits, atol=1e-5, rtol=1e-5)
    assert {(layer.rank_before, layer.rank) for layer in report.layers} == {(4, 2)}
    assert report.largest_error == 0.0
    assert check_adapter(tmp_path / "out", str(tmp_path / "base")).ok


def test_each_layer_keeps_what_it_needs_and_an_empty_one_goes(save, tmp_path, tokens, load):
    model, expected = save(method="sora", r=4), {}
    with torch.no_grad():
        for number, (name, layer) in enumerate(layers_of(model).items()):
            expected[name.removeprefix("base_model.model.")] = 4 - number % 5
            layer.ndlora_factors["default"]["core"][: number % 5] = 0.0
    model.save_pretrained(tmp_path / "adapter")
    report = prune_adapter(tmp_path / "adapter", tmp_path / "out")
    assert {layer.name: layer.rank for layer in report.layers} == expected
    again = load(tmp_path / "base", tmp_path / "out")
    assert len(layers_of(again)) == 12
    torch.testing.assert_close(again(tokens).logits, model(tokens).logits, atol=1e-5, rtol=1e-5)


def test_what_is_nearly_zero_goes_if_asked(save, tmp_path):
    model = save(method="sora", r=4)
    with torch.no_grad():
        for layer in layers_of(model).values():
            layer.ndlora_factors["default"]["core"][1] *= 1e-4
    model.save_pretrained(tmp_path / "adapter")
    assert {layer.rank for layer in prune_adapter(tmp_path / "adapter", tmp_path / "all").layers} == {4}
    report = prune_adapter(tmp_path / "adapter", tmp_path / "out", tolerance=1e-2)
    assert {layer.rank for layer in report.layers} == {3} and 0 < report.largest_error < 1e-2


def test_nested_ranks_become_a_lora(save, tmp_path, tokens, load):
    save(method="slora", r=4)
    cut_adapter(tmp_path / "adapter", tmp_path / "cut", 2)
    report = export_adapter(tmp_path / "adapter", tmp_path / "lora", "lora", rank=2, nested=True)
    expected = load(tmp_path / "base", tmp_path / "cut")(tokens).logits
    torch.testing.assert_close(
        load(tmp_path / "base", tmp_path / "lora")(tokens).logits, expected, atol=1e-5, rtol=1e-5
    )
    assert json.loads((tmp_path / "lora" / "adapter_config.json").read_text())["r"] == 2
    assert {layer.form for layer in report.layers} == {"rank 2"} and report.largest_error > 0


@pytest.mark.parametrize("method, written", [("ffa_lora", False), ("tiled", True)])
def test_frozen_sides_are_written_only_where_a_smaller_start_is_another(method, written, save, tmp_path):
    save(method=method, r=4)
    cut_adapter(tmp_path / "adapter", tmp_path / "out", 2)
    keys = load_file(tmp_path / "out" / "adapter_model.safetensors")
    assert any(".ndlora_frozen." in key for key in keys) == written


# the fields of an adapter, what is done, what the message says
REFUSED = {
    "nothing to cut": (
        {},
        lambda adapter, out: cut_adapter(adapter, out, 1),
        "at most rank 1, there is nothing to cut",
    ),
    "no rank": ({}, lambda adapter, out: cut_adapter(adapter, out, 0), "rank=0: choose"),
    "no axis": (
        {"method": "einsum", "options": {"equation": "out a, a in -> out in", "sizes": {"a": 3}}},
        lambda adapter, out: cut_adapter(adapter, out, 1),
        "method='einsum' has no rank axis",
    ),
    "tolerance": ({}, lambda adapter, out: prune_adapter(adapter, out, -1.0), "tolerance=-1.0: choose"),
    "nested, with a self-test": (
        {},
        lambda adapter, out: export_adapter(adapter, out, "lora", rank=1, nested=True, self_test=True),
        "A self-test is of the whole adapter",
    ),
    "nested, merged": (
        {"r": 2},
        lambda adapter, out: export_adapter(adapter, out, "merged", rank=1, nested=True),
        "nested cuts to='ndlora' or 'lora'",
    ),
    "ndlora without a rank": (
        {"r": 2},
        lambda adapter, out: export_adapter(adapter, out, "ndlora"),
        "give rank, the number of them",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_is_refused_and_nothing_written(case, save, tmp_path):
    fields, act, message = REFUSED[case]
    save(**fields)
    with pytest.raises(NdLoraValueError, match=message):
        act(tmp_path / "adapter", tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter", "base"]


def test_an_adapter_that_does_nothing_is_refused(tmp_path, make_llama):
    get_peft_model(make_llama(), NdLoraConfig()).save_pretrained(tmp_path / "adapter")
    with pytest.raises(NdLoraValueError, match="the adapter does nothing"):
        prune_adapter(tmp_path / "adapter", tmp_path / "out")


def test_the_commands(save, tmp_path):
    save(units=[1], method="sora", r=4)
    adapter, small, cut = (str(tmp_path / name) for name in ("adapter", "small", "cut"))
    result = CliRunner().invoke(app, ["prune", adapter, "--output", small, "--json"])
    assert result.exit_code == 0, result.output
    assert {layer["rank"] for layer in json.loads(result.stdout)["layers"]} == {3}
    result = CliRunner().invoke(app, ["export", adapter, "--to", "ndlora", "--rank", "2", "--output", cut])
    assert result.exit_code == 0 and "rank 2" in result.output, result.output
