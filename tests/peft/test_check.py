"""`check_adapter` on sound adapters, and on each way to break one."""

import json

import pytest
import torch
import typer
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

from ndlora_plugins import NdLoraConfig
from ndlora_plugins.commands.check import check
from ndlora_plugins.errors import NdLoraValueError
from ndlora_plugins.integrations.peft.adapters.check import check_adapter
from ndlora_plugins.integrations.peft.adapters.combine import combine_adapters
from ndlora_plugins.integrations.peft.adapters.diff import diff_adapters
from ndlora_plugins.integrations.peft.adapters.smaller import cut_adapter, prune_adapter
from ndlora_plugins.integrations.peft.exports.export import export_adapter

pytestmark = pytest.mark.filterwarnings("ignore")
SOUND = {
    "ndlinear": {"method": "ndlinear"},
    "ndlinear-3-modes-4-terms": {"method": "ndlinear", "num_modes": 3, "r": 4},
    "ndlinear-reference-start": {"init_lora_weights": "ndlinear"},
    "ndlinear-crossed": {"crossed_modes": 2, "r": 2},
    "nlora-pivots": {"init_lora_weights": "n_lora_pivots", "r": 4},
    "ndlinear-modes-by-hand": {"modes": {"q_proj": {"in_modes": [4, 12]}}},
    "slora-patterns": {"method": "slora", "rank_pattern": {"q_proj": 3}},
    "nlora": {"method": "nlora"},
    "nlora-no-anchor": {"method": "nlora", "anchor": "none"},
    "inttune": {"method": "inttune"},
    "inttune-random": {"method": "inttune", "init_lora_weights": False},
    "beside": {"method": "slora", "modules_to_save": ["lm_head"], "trainable_token_indices": [1, 2]},
    "head": {"method": "slora", "target_modules": ["q_proj", "lm_head"]},
}
# the size of the update is not known without the base weights
NEEDS_BASE = {"nlora", "inttune"}
Q = "base_model.model.model.layers.0.self_attn.q_proj.ndlora_factors"
# what is done to the tensors of a slora adapter, what the report must say
BROKEN_TENSORS = {
    "missing-factor": (
        lambda t: t.pop(f"{Q}.core"),
        "'ndlora_factors.core' of layer 'model.layers.0.self_attn.q_proj' has none",
    ),
    "unknown-factor": (lambda t: t.update({f"{Q}.extra": torch.ones(2)}), "has no such tensor"),
    "shape": (lambda t: t.update({f"{Q}.core": torch.ones(3, 4)}), "has shape [3, 4]"),
    "nan": (lambda t: t[f"{Q}.up"].fill_(float("nan")), "q_proj.ndlora_factors.up' holds NaN"),
    "dtypes": (lambda t: t.update({f"{Q}.up": t[f"{Q}.up"].half()}), "several dtypes"),
    "integers": (lambda t: t.update({k: v.int() for k, v in t.items()}), "of dtype int32"),
    "missing-layer": (
        lambda t: [t.pop(k) for k in list(t) if k.startswith(Q)],
        "1 layers have no tensor in ",
    ),
    "stranger": (
        lambda t: t.update({"base_model.model.odd": torch.ones(2)}),
        "belong to nothing in the configuration: 'odd'",
    ),
    "zero": (lambda t: [v.zero_() for v in t.values()], "No layer does anything"),
    "no-tensor-of-ours": (
        lambda t: [t.pop(k) for k in list(t)] and t.update(other=torch.ones(1)),
        "none of an NDLORA adapter",
    ),
    "empty": (lambda t: t.update({f"{Q}.up": torch.ones(0, 4)}), "are empty"),
}
# what is done to its configuration, what the report must say
BROKEN_CONFIGS = {
    "rank": ({"r": 5}, "needs [5, "),
    "module": (
        {"modules_to_save": ["lm_head"]},
        "modules_to_save names 'lm_head', of which the file holds no tensor",
    ),
    "tokens": ({"trainable_token_indices": [1]}, "the file holds no token rows"),
    "newer": ({"schema_version": 99}, "Upgrade it"),
    "method": ({"method": "nope"}, "no known method"),
    "type": ({"peft_type": 5}, "of type 5, not NDLORA"),
    "task": ({"task_type": "NOPE"}, "NOPE"),
    "fewer-layers": ({"target_modules": ["k_proj"]}, "layers in "),
    "layers": ({"layers": {"x": ["x", "linear", [2]]}}, "layers of"),
    "layers-entry": ({"layers": {"x": {"name": "x"}}}, "layers of"),
    "layers-kind": ({"layers": {"x": ["x", [], [2, 2]]}}, "layers of"),
    "layers-shape": ({"layers": {"x": ["x", "embedding", [0, 2]]}}, "layers of"),
    "layers-list": ({"layers": []}, "layers="),
    "layers-of-another": ({"layers": {"x": ["x", "linear", [2, 2]]}}, "does not list under `layers`"),
    # of schema 1
    "forms": (
        {"layers": None, "weight_forms": {"x": {"name": "x", "kind": "linear", "shape": [2, 2]}}},
        "weight_forms of",
    ),
    "forms-kind": (
        {"layers": None, "weight_forms": {"x": {"name": "x", "kind": [], "shape": [2, 2]}}},
        "weight_forms of",
    ),
    "forms-shape": (
        {"layers": None, "weight_forms": {"x": {"name": "x", "kind": "embedding", "shape": [0, 2]}}},
        "weight_forms of",
    ),
    "fingerprint": ({"base_fingerprint": {"x": 5}}, "base_fingerprint of"),
    "huge": (
        {"base_fingerprint": {"x": {"shape": [10**18 + 9, 8], "storage": "float32", "values": None}}},
        "base_fingerprint of",
    ),
    "rows": ({"trainable_token_indices": {"embed_tokens": [[1]]}}, "trainable_token_indices"),
    "many-modes": ({"num_modes": 2000}, "num_modes=2000"),
}
# what makes frozen factors again: the adapter's directory, one for the result
TOOLS = {
    "export": lambda adapter, output: export_adapter(adapter, output, "merged"),
    "cut": lambda adapter, output: cut_adapter(adapter, output, 2),
    "prune": prune_adapter,
    "diff": lambda adapter, _: diff_adapters(adapter, adapter),
    "combine": lambda adapter, output: combine_adapters([adapter], output),
}
# what is changed in its configuration so that they come out otherwise than in training
OTHER_FACTORS = {
    "another seed": lambda fields: fields.update(random_seed=2),
    "another checksum": lambda fields: next(iter(fields["checksums"].values())).update(up=1.0),
}
# text of adapter_config.json that is no configuration
NO_CONFIGURATIONS = ["", "5", "null", "[]", '"x"', "{", "[" * 10**5, '{"peft_type": null}', "\ud800"]
# a name in the file that is no layer of the model -> it is told, whatever is behind it
NO_LAYERS = ["model.config", "model.forward", "..", "model"]


@pytest.fixture
def save(make_llama, trained, tmp_path):
    """A function that saves a trained adapter of the tiny Llama, and returns its directory."""

    def make(**options):
        trained(make_llama, **options)
        return tmp_path / "adapter"

    return make


@pytest.fixture
def rewrite():
    """A function that changes the tensors of an adapter in place."""

    def change(directory, function):
        file = directory / "adapter_model.safetensors"
        tensors = load_file(file)
        function(tensors)
        save_file(tensors, file)

    return change


@pytest.mark.parametrize("with_base", [False, True])
@pytest.mark.parametrize("case", SOUND)
def test_sound_adapters(case, with_base, save, tmp_path):
    directory = save(**SOUND[case])
    base = tmp_path / "base" if with_base else (tmp_path / "base").rename(tmp_path / "elsewhere") and None
    report = check_adapter(directory, base and str(base))
    assert (report.ok, report.problems, report.remarks, report.idle) == (True, (), (), ())
    model = get_peft_model(
        AutoModelForCausalLM.from_pretrained(base or tmp_path / "elsewhere"), NdLoraConfig(**SOUND[case])
    )
    plans = [m.plan["default"] for m in model.modules() if hasattr(m, "plan")]
    assert len(report.layers) == len(plans) and report.trainable == sum(plan.num_parameters for plan in plans)
    tensors = load_file(directory / "adapter_model.safetensors").values()
    assert report.bytes == sum(tensor.nbytes for tensor in tensors) and report.dtypes == (torch.float32,)
    assert (None in {layer.norm for layer in report.layers}) == (case in NEEDS_BASE and not with_base)


@pytest.mark.parametrize("with_base", [False, True])
@pytest.mark.parametrize("case", BROKEN_TENSORS)
def test_broken_tensors(case, with_base, save, rewrite, tmp_path):
    directory = save(method="slora", r=4)
    rewrite(directory, BROKEN_TENSORS[case][0])
    report = check_adapter(directory, str(tmp_path / "base") if with_base else None)
    assert not report.ok and BROKEN_TENSORS[case][1] in " ".join(report.problems)


@pytest.mark.parametrize("case", BROKEN_CONFIGS)
def test_broken_configurations(case, save):
    directory = save(method="slora", r=4)
    file = directory / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **BROKEN_CONFIGS[case][0]}))
    report = check_adapter(directory)
    assert not report.ok and BROKEN_CONFIGS[case][1] in " ".join(report.problems)


@pytest.fixture(params=OTHER_FACTORS)
def of_other_factors(request, save):
    """An adapter whose frozen factors, of a seed alone, come out otherwise than in training."""
    directory = save(method="lora_xs", init_lora_weights="random_sides", random_seed=1, r=4)
    file = directory / "adapter_config.json"
    fields = json.loads(file.read_text())
    OTHER_FACTORS[request.param](fields)
    file.write_text(json.dumps(fields))
    return directory


@pytest.mark.parametrize("tool", TOOLS)
def test_tools_refuse_frozen_factors_that_are_not_those_of_the_training(tool, of_other_factors, tmp_path):
    with pytest.raises(NdLoraValueError, match="is made again at load, and comes out as another one"):
        TOOLS[tool](of_other_factors, tmp_path / "output")
    assert not (tmp_path / "output").exists()


@pytest.mark.parametrize("with_base", [False, True])
def test_a_report_tells_of_them(with_base, of_other_factors, tmp_path):
    report = check_adapter(of_other_factors, str(tmp_path / "base") if with_base else None)
    assert not report.ok and "comes out as another one" in " ".join(report.problems)


@pytest.mark.parametrize("with_base", [False, True])
def test_a_fingerprint_of_a_layer_that_is_not_in_the_file(with_base, save, tmp_path):
    directory = save(method="slora", r=4, target_modules=["q_proj"])
    file = directory / "adapter_config.json"
    fields = json.loads(file.read_text())
    fields["base_fingerprint"] = {"lm_head": {"shape": [128, 48], "storage": "float32", "values": None}}
    file.write_text(json.dumps(fields))
    report = check_adapter(directory, str(tmp_path / "base") if with_base else None)
    assert "1 layers have no tensor in " in " ".join(report.problems) and "'lm_head'" in " ".join(
        report.problems
    )


@pytest.mark.parametrize("text", NO_CONFIGURATIONS)
def test_files_without_a_configuration(text, save):
    directory = save(method="slora", r=4)
    (directory / "adapter_config.json").write_bytes(text.encode("utf-8", "surrogatepass"))
    report = check_adapter(directory)
    assert len(report.problems) == 1 and "NdLora" not in report.problems[0]


@pytest.mark.parametrize("with_base", [False, True])
@pytest.mark.parametrize("name", NO_LAYERS)
def test_tensors_of_what_is_no_layer(name, with_base, save, rewrite, tmp_path):
    directory = save(method="slora", r=4)
    rewrite(
        directory,
        lambda t: t.update(
            {
                f"base_model.model.{name}.ndlora_factors.{f}": t[f"{Q}.{f}"].clone()
                for f in ("down", "core", "up")
            }
        ),
    )
    report = check_adapter(directory, str(tmp_path / "base") if with_base else None)
    assert "layers in " in " ".join(report.problems) and name in " ".join(report.problems)


@pytest.mark.parametrize("name", ["adapter_config.json", "adapter_model.safetensors"])
def test_truncated_files(name, save):
    directory = save()
    (directory / name).write_bytes((directory / name).read_bytes()[:-9])
    report = check_adapter(directory)
    assert not report.ok and len(report.problems) == 1


@pytest.mark.parametrize("method", ["slora", "nlora", "inttune", "ndlinear"])
@pytest.mark.parametrize("with_base", [False, True])
def test_layers_that_do_nothing(method, with_base, save, rewrite, tmp_path):
    directory = save(method=method)
    base = str(tmp_path / "base") if with_base else None
    rewrite(
        directory, lambda tensors: [t.zero_() for key, t in tensors.items() if "layers.0.self_attn.q" in key]
    )
    report = check_adapter(directory, base)
    assert report.ok and report.idle == ("model.layers.0.self_attn.q_proj",)
    assert report.remarks == ("1 of 14 layers do nothing: 'model.layers.0.self_attn.q_proj'.",)
    untrained = check_adapter(save(scale=0.0, method=method), base)
    assert not untrained.ok and len(untrained.idle) == 14


@pytest.mark.parametrize("method, ok", [("slora", True), ("inttune", False)])
def test_another_base_is_a_problem_where_the_start_is_read_from_it(method, ok, save, make_llama, tmp_path):
    directory = save(method=method)
    make_llama(seed=5).save_pretrained(tmp_path / "other")
    report = check_adapter(directory, str(tmp_path / "other"))
    assert report.ok == ok and "differ from those that the adapter was trained on" in " ".join(
        report.problems + report.remarks
    )


def test_a_base_of_another_shape(save, make_llama, tmp_path):
    directory = save()
    make_llama(hidden_size=64).save_pretrained(tmp_path / "other")
    report = check_adapter(directory, str(tmp_path / "other"))
    assert not report.ok and "in this base model" in report.problems[0]


def test_an_adapter_of_another_kind_is_a_problem(make_llama, tmp_path):
    get_peft_model(make_llama(), LoraConfig()).save_pretrained(tmp_path / "adapter")
    assert "of type LORA, not NDLORA" in check_adapter(tmp_path / "adapter").problems[0]


@pytest.mark.parametrize(
    "name, message", [("nothing", "neither a directory"), ("base", "no adapter_config.json")]
)
def test_no_adapter_is_an_error(name, message, save, tmp_path):
    save()
    with pytest.raises(NdLoraValueError, match=message):
        check_adapter(tmp_path / name)


def test_the_command_and_its_exit_status(save, rewrite, tmp_path):
    app = typer.Typer()
    app.command()(check)
    directory = save(method="inttune", modules_to_save=["lm_head"])
    sound = CliRunner().invoke(app, [str(directory)])
    assert sound.exit_code == 0 and "needs --base" in sound.output and "Sound." in sound.output
    assert "896 trainable numbers, float32" in sound.output
    rewrite(directory, lambda tensors: [tensor.zero_() for tensor in tensors.values()])
    broken = CliRunner().invoke(app, [str(directory), "--base", str(tmp_path / "base")])
    assert broken.exit_code == 1 and "Problem: No layer does anything" in broken.output
