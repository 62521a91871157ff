"""`ndlora init`, `diff` and `doctor`, as a user types them: what they write and say, and their exit status."""

import json
import math
import sys

import pytest
import torch
from peft import PeftModel, get_peft_model
from representative import each
from safetensors.torch import load_file
from typer.testing import CliRunner

from ndlora_plugins import NdLoraConfig
from ndlora_plugins.commands.doctor import SWITCHES, examine
from ndlora_plugins.commands.main import app
from ndlora_plugins.commands.tables import to_json
from ndlora_plugins.errors import NdLoraValueError
from ndlora_plugins.integrations.peft.adapters.diff import diff_adapters
from ndlora_plugins.integrations.peft.adapters.start import init_adapter
from ndlora_plugins.registry import methods

FILE = "adapter_model.safetensors"
# what follows `ndlora init base --output out`, what the message says
WRONG_INIT = {
    "method": (["--method", "nope"], "method='nope' is no known method"),
    "field": (["--field", "colour=red"], "--field: unknown fields ['colour']"),
    "field with a flag": (["--field", "random_seed=5"], "--field: ['random_seed'] have flags of their own"),
    "no equals": (["--field", "lora_dropout"], "--field 'lora_dropout': write it as NAME=VALUE"),
    "gradients": (["--method", "lora_sb", "--r", "4"], "reads gradients, which a directory has not"),
    "target": (["--target", "nope"], "match no layer"),
    "head": (["--field", 'modules_to_save=["lm_head"]'], "add the adapter with get_peft_model"),
}
# the second adapter's fields and how far its factors are moved -> exit status, what the output says
DIFFS = {
    "the same": ({}, 0.1, 0, "They answer alike"),
    "another start": ({"random_seed": 5}, 0.1, 1, "random_seed: 0 -> 5"),
    "further": ({}, 0.2, 1, "They differ"),
    "fewer layers": ({"target_modules": ["q_proj"]}, 0.1, 1, "Only A adapts"),
    "another method": ({"method": "slora"}, 0.1, 1, "method: 'crossed' -> 'slora'"),
}


def invoke(*arguments):
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


@pytest.fixture
def base(tmp_path, make_llama):
    make_llama().save_pretrained(tmp_path / "base")
    return tmp_path / "base"


@pytest.mark.parametrize("method", each(methods()))
def test_a_fresh_directory_is_what_get_peft_model_would_save(
    method, base, fields_of, tmp_path, make_llama, tokens
):
    fields = {**fields_of(method), "random_seed": 3, "init_lora_weights": True}
    if method == "lora_sb":
        fields["init_lora_weights"] = "svd_step"
    report = init_adapter(str(base), tmp_path / "out", NdLoraConfig(**fields))
    model = get_peft_model(make_llama(), NdLoraConfig(task_type="CAUSAL_LM", **fields))
    model.save_pretrained(tmp_path / "expected")
    found, expected = (load_file(tmp_path / name / FILE) for name in ("out", "expected"))
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        torch.testing.assert_close(found[key], value)
    configs = [
        json.loads((tmp_path / name / "adapter_config.json").read_text()) for name in ("out", "expected")
    ]
    assert [configs[0][name] for name in ("task_type", "layers", "method", "r", "lora_alpha", "anchor")] == [
        configs[1][name] for name in ("task_type", "layers", "method", "r", "lora_alpha", "anchor")
    ]
    assert report.trainable == model.get_nb_trainable_parameters()[0]
    again = PeftModel.from_pretrained(make_llama(), tmp_path / "out", is_trainable=True).eval()
    torch.testing.assert_close(again(tokens).logits, model.eval()(tokens).logits)


def test_a_configuration_is_enough_where_no_weight_is_read(base, tmp_path):
    (base / "model.safetensors").unlink()
    result = invoke("init", base, "--output", tmp_path / "out", "--json")
    assert result.exit_code == 0 and json.loads(result.stdout)["method"] == "crossed"
    refused = invoke("init", base, "--output", tmp_path / "no", "--method", "nlora", "--r", 4)
    assert "reads the weights" in str(refused.exception) and not (tmp_path / "no").exists()


def test_what_init_is_told(base, tmp_path):
    result = invoke(
        "init", base, "--output", tmp_path / "out", "--method", "ndlinear", "--r", 2, "--alpha", 4,
        "--option", "num_modes=3", "--target", "q_proj", "--field", "lora_dropout=0.1",
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    config = NdLoraConfig.from_pretrained(str(tmp_path / "out"))
    assert (config.method, config.r, config.lora_alpha, config.lora_dropout) == ("ndlinear", 2, 4, 0.1)
    assert config.base_model_name_or_path == str(base) and config.options == {"num_modes": 3}


@pytest.mark.parametrize("case", WRONG_INIT)
def test_init_refuses(case, base, tmp_path):
    options, message = WRONG_INIT[case]
    result = invoke("init", base, "--output", tmp_path / "out", *options)
    assert isinstance(result.exception, NdLoraValueError) and message in str(result.exception)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("case", DIFFS)
def test_diff(case, base, tmp_path, make_llama, shake):
    fields, scale, status, message = DIFFS[case]
    for name, own, moved in (("one", {}, 0.1), ("two", fields, scale)):
        model = get_peft_model(make_llama(), NdLoraConfig(**{"random_seed": 0, **own}))
        shake(model, moved).save_pretrained(tmp_path / name)
    result = invoke("diff", tmp_path / "one", tmp_path / "two")
    assert (result.exit_code, message in result.output) == (status, True), result.output
    found = json.loads(invoke("diff", tmp_path / "one", tmp_path / "two", "--json").stdout)
    assert found["same"] == (status == 0)


@pytest.mark.parametrize("second", [{"method": "slora", "r": 2}, {"method": "ndlinear"}, {"num_modes": 3}])
def test_the_change_of_a_layer_is_that_of_its_matrices(second, tmp_path, make_llama, shake):
    model = get_peft_model(make_llama(), NdLoraConfig(method="ndlinear", r=2), "one")
    model.add_adapter("two", NdLoraConfig(**second))
    model.set_requires_grad(["one", "two"])
    shake(model).save_pretrained(tmp_path)
    report = diff_adapters(tmp_path / "one", tmp_path / "two")
    for layer in report.layers:
        module = model.base_model.model.get_submodule(layer.name)
        one, two = (module.get_delta_weight(name).double() for name in ("one", "two"))
        cosine = (one * two).sum() / one.norm() / two.norm()
        expected = [one.norm(), two.norm(), (two - one).norm() / one.norm(), cosine]
        found = [*layer.norms, layer.change, layer.cosine]
        assert found == pytest.approx([float(value) for value in expected], rel=1e-4, abs=1e-7)


def test_adapters_of_two_base_models_are_no_pair(tmp_path, make_llama, shake):
    for name, model in (("one", make_llama()), ("two", make_llama(hidden_size=32))):
        shake(get_peft_model(model, NdLoraConfig())).save_pretrained(tmp_path / name)
    with pytest.raises(NdLoraValueError, match="of different base models"):
        diff_adapters(tmp_path / "one", tmp_path / "two")


@pytest.mark.parametrize("switch, status", [(None, "good"), ("TORCH_DEVICE_BACKEND_AUTOLOAD", "problem")])
def test_doctor_sees_what_a_host_sees(switch, status, monkeypatch):
    for name in SWITCHES:
        monkeypatch.delenv(name, raising=False)
    if switch is not None:
        monkeypatch.setenv(switch, "0")
    found = {finding.what: finding for finding in examine(["peft"])}
    assert found["peft"].status == status and found["autoload"].status == "good"
    assert switch is None or f"{switch}=0: autoload is off" in found["switch"].said


@pytest.mark.parametrize("value, status", [(None, 0), ("off", 1)])
def test_doctors_exit_status(value, status, monkeypatch):
    monkeypatch.setattr(sys.modules["ndlora_plugins.commands.doctor"], "HOSTS", ())
    monkeypatch.delenv("NDLORA_AUTOLOAD", raising=False)
    if value is not None:
        monkeypatch.setenv("NDLORA_AUTOLOAD", value)
    result = invoke("doctor", "--json")
    assert result.exit_code == status
    findings = json.loads(result.stdout)["findings"]
    assert any(finding["status"] == "problem" for finding in findings) == bool(status)


def test_what_a_command_prints_for_scripts_is_json():
    found = {"change": math.inf, "norms": (math.nan, 1.5), "names": {"b", "a"}}
    assert json.loads(to_json(found)) == {"change": None, "norms": [None, 1.5], "names": ["a", "b"]}
