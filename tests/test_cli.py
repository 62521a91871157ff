"""`ndlora plan` and `ndlora methods`, as a user types them."""

import json

import pytest
from transformers import LlamaConfig, Qwen3Config
from typer.testing import CliRunner

from ndlora_plugins.commands.main import app, run
from ndlora_plugins.errors import NdLoraValueError

# what follows `ndlora plan MODEL`, what must stand in the output
PLANS = [
    ([], ["ndlinear", "32x32, 64x64", "1,146,880", "8,716,288", "7.60x fewer than LoRA r=8"]),
    (["--method", "inttune", "--r", "128"], ["3,211,264", "inttune"]),
    (["--target", "q_proj", "--num-modes", "3"], ["8x8, 16x16, 16x16"]),
    (["--crossed-modes", "4"], ["512x4, 4x512", "1,089,536", "8.00x fewer than LoRA r=8"]),
    (["--lora-rank", "4"], ["4,358,144", "3.80x fewer than LoRA r=4"]),
]
# what follows, what the error must say
WRONG = [
    (["--method", "nope"], "method='nope' is no known method"),
    (["--target", "nope"], "match no layer"),
    (["--r", "0"], "r=0"),
]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    directory = tmp_path_factory.mktemp("qwen3")
    Qwen3Config(
        hidden_size=2048, intermediate_size=6144, num_hidden_layers=28, num_attention_heads=16,
        num_key_value_heads=8, head_dim=128,
    ).save_pretrained(directory)  # fmt: skip
    return directory


def invoke(*arguments):
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


@pytest.mark.parametrize("options, expected", PLANS)
def test_plan(options, expected, model):
    result = invoke("plan", model, *options)
    assert result.exit_code == 0, result.output
    assert [text for text in expected if text not in result.output] == []


def test_plan_takes_the_config_file_and_prints_json(model):
    result = invoke("plan", model / "config.json", "--json")
    assert json.loads(result.stdout)["parameters"] == 1_146_880


@pytest.mark.parametrize("options, message", WRONG)
def test_wrong_options(options, message, model):
    result = invoke("plan", model, *options)
    assert isinstance(result.exception, NdLoraValueError) and message in str(result.exception)


def test_a_model_that_is_not_there(tmp_path):
    result = invoke("plan", tmp_path / "nothing")
    assert isinstance(result.exception, NdLoraValueError) and "neither a directory" in str(result.exception)


def test_a_prime_dimension_is_seen_in_the_plan(tmp_path):
    LlamaConfig(
        hidden_size=64, intermediate_size=257, num_hidden_layers=1, num_attention_heads=4
    ).save_pretrained(tmp_path)
    assert "lopsided" in invoke("plan", tmp_path).output


def test_methods_lists_everything_with_its_plugin():
    output = invoke("methods").output
    for word in (
        "ndlinear",
        "slora",
        "nlora",
        "inttune",
        "n_lora",
        "snapshot",
        "ndlora-plugins",
        "peft",
        "torch",
    ):
        assert word in output


def test_an_error_is_one_line_with_its_brackets(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr("sys.argv", ["ndlora", "plan", str(tmp_path), "--anchor", "[demo]"])
    with pytest.raises(SystemExit) as stopped:
        run()
    assert stopped.value.code == 2 and "anchor='[demo]'" in capsys.readouterr().err
