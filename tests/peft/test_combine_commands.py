"""`ndlora combine`, and the rules that `add_weighted_adapter` has beside PEFT's: a directory and a model agree."""

import json

import pytest
import torch
from peft import PeftModel, get_peft_model
from typer.testing import CliRunner

from ndlora_plugins import NdLoraConfig
from ndlora_plugins.commands.main import app
from ndlora_plugins.errors import NdLoraValueError
from ndlora_plugins.integrations.peft.adapters.check import check_adapter
from ndlora_plugins.integrations.peft.adapters.combine import combine_adapters
from ndlora_plugins.integrations.peft.combining.cluster import cluster_units
from ndlora_plugins.integrations.peft.combining.combination import Combination
from ndlora_plugins.integrations.peft.layers.layer import NdLoraLayer

# the two adapters' fields
PAIRS = {
    "crossed": ({}, {"r": 2}),
    "slora": ({"method": "slora", "r": 3}, {"method": "slora", "r": 2, "lora_alpha": 5}),
    "crossed and slora": ({}, {"method": "slora", "r": 2}),
    "from the weights": ({"method": "inttune", "r": 3}, {"method": "nlora", "r": 2}),
    "from a seed": ({"method": "ffa_lora", "r": 3}, {"method": "ffa_lora", "r": 2, "random_seed": 4}),
    "shared": ({"method": "shared_core", "r": 3}, {"method": "metatt", "r": 2}),
    "chosen rows": ({"method": "rows", "r": 3}, {"method": "columns", "r": 2}),
    "layers of their own": ({"target_modules": ["q_proj"]}, {"target_modules": ["q_proj", "v_proj"]}),
    "three modes": ({"method": "ndlinear", "num_modes": 3}, {"method": "ndlinear", "num_modes": 3}),
    "tokens and a head": (
        {"method": "slora", "r": 2, "trainable_token_indices": [3, 5]},
        {"method": "slora", "r": 2, "trainable_token_indices": [5, 9], "modules_to_save": ["lm_head"]},
    ),
}
# how, its options
RULES = {
    "cat": {},
    "svd": {"svd_rank": 3},
    "ties_svd": {"svd_rank": 3, "density": 0.5},
    "cluster": {"svd_rank": 3},
    "keep_down": {},
}
# the second adapter's fields where the first is one of crossed modes, what is asked for, what the message says
REFUSED = {
    "no sum": ({"method": "ndlinear"}, {}, "cannot be added up in one adapter"),
    "no form for clusters": (
        {"method": "ndlinear"},
        {"combination": Combination("cluster")},
        "'cluster' on layer .*method='ndlinear'.* has none",
    ),
    "weights": ({}, {"weights": [1.0]}, "2 adapters and 1 weights"),
    "not finite": ({}, {"weights": [1.0, float("inf")]}, "must be a finite number"),
}
# what follows `ndlora combine one two --output out`, what the message says
WRONG = {
    "no number": (["--weights", "1,two"], "--weights '1,two': give numbers"),
    "unknown": (["--combination-type", "mean"], "combination_type='mean': choose"),
    "rank": (
        ["--combination-type", "keep_down", "--svd-rank", "2"],
        "svd_rank=2 with combination_type='keep_down'",
    ),
    "not there": (["--model", "nowhere"], "'nowhere' is neither a directory"),
}


@pytest.fixture
def two(tmp_path, make_llama, shake, load):
    """A function that saves a base and two trained adapters, and returns the model that holds both."""

    def make(first, second):
        make_llama().save_pretrained(tmp_path / "base")
        model = get_peft_model(load(tmp_path / "base"), NdLoraConfig(task_type="CAUSAL_LM", **first), "one")
        model.add_adapter("two", NdLoraConfig(task_type="CAUSAL_LM", **second))
        model.set_requires_grad(["one", "two"])
        shake(model).eval().save_pretrained(tmp_path)
        return model

    return make


def deltas(model, adapter):
    return {
        name: layer.get_delta_weight(adapter)
        for name, layer in model.named_modules()
        if isinstance(layer, NdLoraLayer) and adapter in layer.plan
    }


@pytest.mark.parametrize("pair", PAIRS)
def test_directories_combine_as_adapters_of_a_model_do(pair, two, tmp_path, tokens, load):
    model = two(*PAIRS[pair])
    model.add_weighted_adapter(["one", "two"], [0.5, -2.0], "sum")
    model.set_adapter("sum")
    combine_adapters([tmp_path / "one", tmp_path / "two"], tmp_path / "out", [0.5, -2.0])
    again = load(tmp_path / "base", tmp_path / "out")
    torch.testing.assert_close(again(tokens).logits, model(tokens).logits, atol=1e-5, rtol=1e-5)


def test_a_sum_of_loaded_adapters_lists_the_layers_of_both(two, tmp_path, load):
    two({"target_modules": ["q_proj"]}, {"target_modules": ["v_proj"]})
    model = load(tmp_path / "base", tmp_path / "one")
    model.load_adapter(tmp_path / "two", "two")
    model.add_weighted_adapter(["default", "two"], [1.0, 1.0], "sum")
    model.save_pretrained(tmp_path / "out", selected_adapters=["sum"])
    report = check_adapter(tmp_path / "out/sum", str(tmp_path / "base"))
    assert report.ok, report.problems


@pytest.mark.parametrize("how", RULES)
def test_every_rule_gives_the_same_in_both(how, two, tmp_path, make_llama):
    model = two(*PAIRS["slora"])
    torch.manual_seed(3)
    model.add_weighted_adapter(["one", "two"], [0.5, 2.0], "sum", how, **RULES[how])
    torch.manual_seed(3)
    combination = Combination(how, **RULES[how])
    combine_adapters([tmp_path / "one", tmp_path / "two"], tmp_path / "out", [0.5, 2.0], combination)
    again = PeftModel.from_pretrained(make_llama(), tmp_path / "out")
    expected = deltas(model, "sum")
    for name, delta in deltas(again, "default").items():
        torch.testing.assert_close(delta, expected[name], atol=1e-5, rtol=1e-4)


def test_as_many_clusters_as_units_are_the_sum(two):
    model = two(*PAIRS["slora"])
    model.add_weighted_adapter(["one", "two"], [0.5, -2.0], "sum")
    model.add_weighted_adapter(["one", "two"], [0.5, -2.0], "clusters", "cluster", svd_rank=5)
    exact, found = deltas(model, "sum"), deltas(model, "clusters")
    for name, delta in found.items():
        torch.testing.assert_close(delta, exact[name], atol=1e-5, rtol=1e-4)


def test_equal_units_become_one_whatever_their_scale_and_sign():
    down, up = torch.randn(3, 7, dtype=torch.float64), torch.randn(5, 3, dtype=torch.float64)
    scales = torch.tensor([[-2.0], [0.5], [3.0]], dtype=torch.float64)
    twice = torch.cat([down, scales * down]), torch.cat([up, up / scales.T], dim=1)
    found = cluster_units(*twice, clusters=3)
    assert found[0].shape == (3, 7)
    torch.testing.assert_close(found[1] @ found[0], 2 * up @ down)


def test_the_kept_down_is_the_first_ones_and_up_is_the_least_squares(two):
    model = two({"method": "slora", "r": 3}, {"method": "slora", "r": 2})
    model.add_weighted_adapter(["one", "two"], [1.0, 1.0], "sum")
    model.add_weighted_adapter(["one", "two"], [1.0, 1.0], "kept", "keep_down")
    layer = next(layer for layer in model.modules() if isinstance(layer, NdLoraLayer))
    update, factors = layer.plan["one"].update(*layer.tensors("one"))
    down = update.low_rank(factors)[0]
    exact, kept = layer.get_delta_weight("sum"), layer.get_delta_weight("kept")
    solution = torch.linalg.lstsq(down.T, exact.T).solution.T
    torch.testing.assert_close(kept, solution @ down, atol=1e-5, rtol=1e-4)


def test_one_down_from_a_seed_keeps_the_sum(two):
    seeded = {"method": "ffa_lora", "r": 3, "random_seed": 1}
    model = two(seeded, seeded)
    model.add_weighted_adapter(["one", "two"], [0.5, 2.0], "sum")
    model.add_weighted_adapter(["one", "two"], [0.5, 2.0], "kept", "keep_down")
    exact = deltas(model, "sum")
    for name, delta in deltas(model, "kept").items():
        torch.testing.assert_close(delta, exact[name], atol=1e-5, rtol=1e-4)
    assert model.peft_config["kept"].r == 3


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_combined_is_refused_and_nothing_written(case, two, tmp_path):
    second, options, message = REFUSED[case]
    two({}, second)
    with pytest.raises(NdLoraValueError, match=message):
        combine_adapters([tmp_path / "one", tmp_path / "two"], tmp_path / "out", **options)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["README.md", "base", "one", "two"]


def test_adapters_of_two_base_models_are_refused(two, tmp_path, make_llama):
    two({}, {})
    get_peft_model(make_llama(seed=7), NdLoraConfig()).save_pretrained(tmp_path / "other")
    with pytest.raises(NdLoraValueError, match="were trained on different base models"):
        combine_adapters([tmp_path / "one", tmp_path / "other"], tmp_path / "out")


def test_two_heads_are_refused(two, tmp_path):
    two({"modules_to_save": ["lm_head"]}, {"modules_to_save": ["lm_head"]})
    with pytest.raises(NdLoraValueError, match="both hold .*lm_head.*trained in full"):
        combine_adapters([tmp_path / "one", tmp_path / "two"], tmp_path / "out")


def test_the_command(two, tmp_path):
    two({}, {"r": 2})
    paths = [str(tmp_path / name) for name in ("one", "two", "out")]
    result = CliRunner().invoke(
        app, ["combine", *paths[:2], "--weights", "0.7,0.3", "--output", paths[2], "--json"]
    )
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    assert (found["method"], set(found["ranks"].values())) == ("crossed", {3})
    again = CliRunner().invoke(app, ["combine", *paths[:2], "--output", paths[2]])
    assert "nothing is overwritten" in str(again.exception)


@pytest.mark.parametrize("case", WRONG)
def test_wrong_options_are_refused(case, two, tmp_path):
    two({}, {})
    options, message = WRONG[case]
    paths = [str(tmp_path / name) for name in ("one", "two", "out")]
    result = CliRunner().invoke(app, ["combine", *paths[:2], "--output", paths[2], *options])
    assert isinstance(result.exception, NdLoraValueError) and message in str(result.exception)
