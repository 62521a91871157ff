"""`ndlora plan` and `ndlora methods`, as a user types them, and the errors of every command."""

import json
import os
import resource
import shutil
import subprocess
import sys

import pytest
from peft import get_peft_model
from transformers import LlamaConfig, Qwen3Config
from typer.testing import CliRunner

from ndlora_plugins import NdLoraConfig
from ndlora_plugins.commands.main import app, run
from ndlora_plugins.errors import NdLoraValueError

# what follows `ndlora plan MODEL`, what must stand in the output
PLANS = [
    ([], ["crossed", "512x4, 4x512", "1,089,536", "8,716,288", "8.00x fewer than LoRA r=8"]),
    (["--method", "ndlinear"], ["32x32, 64x64", "1,146,880", "7.60x fewer than LoRA r=8"]),
    (["--method", "inttune", "--r", "128"], ["3,211,264", "inttune"]),
    (["--target", "q_proj", "--num-modes", "3"], ["crossed", "128x4, 4x4, 4x128"]),
    (["--method", "ndlinear", "--target", "q_proj", "--num-modes", "3"], ["8x8, 16x16, 16x16"]),
    (["--crossed-modes", "8"], ["crossed", "256x8, 8x256", "1,089,536"]),
    (["--method", "ndlinear", "--crossed-modes", "4"], ["512x4, 4x512"]),
    (["--lora-rank", "4"], ["4,358,144", "4.00x fewer than LoRA r=4"]),
]
# what follows, what the error must say
WRONG = [
    (["--method", "nope"], "method='nope' is no known method"),
    (["--target", "nope"], "match no layer"),
    (["--r", "0"], "r=0"),
]
# config.json -> what `ndlora plan` must say of it in its one line
NO_MODELS = {
    '{"model_type": "llama", "num_attention_heads": 0}': "transformers makes no model of",
    '{"model_type": "llama", "hidden_size": "wide"}': "transformers makes no model of",
    '{"model_type": "nobodys"}': "does not recognize this architecture",
    "{": "not a valid JSON file",
}
# what follows `ndlora`, what must stand in the one line
REFUSED = [
    (
        ["export", "adapter", "--to", "lora", "--output", "out", "--prompts", "latin.txt"],
        "latin.txt is no text in UTF-8",
    ),
    (
        ["export", "adapter", "--to", "lora", "--output", "out", "--self-test"],
        "ValueError: Couldn't instantiate",
    ),
    (["plan", "base", "--parameters", "1k", "--lora-rate", "-1"], "lora_rate=-1.0: give a learning rate"),
    (["plan", "base", "--parameters", "1k", "--lora-rank", "4"], "is compared with LoRA r=8"),
    (["plan", "adapter"], "'adapter' is an adapter: give its base model"),
    (["plan", "base", "--method", "crosed"], "is no known method. Did you mean 'crossed'?"),
    (["plan", "base", "--lora-rank", "0"], "Invalid value for '--lora-rank'"),
    (["plan", "base", "--like-lora-r", "0"], "Invalid value for '--like-lora-r'"),
]
# commands that write nothing or what `--output` says, and a key of what they print for a script
JSON = [
    (["check", "adapter"], "ok"),
    (["export", "adapter", "--to", "lora", "--output", "out"], "largest_error"),
    (["prune", "adapter", "--output", "out"], "numbers"),
    (["combine", "adapter", "adapter", "--output", "out"], "ranks"),
    (["diff", "adapter", "adapter"], "same"),
    (["init", "base", "--output", "out"], "method"),
    (["plan", "base"], "parameters"),
    (["methods"], "schedules"),
]
# commands that show a table of an adapter's layers
TABLES = [
    ["export", "adapter", "--to", "lora", "--output", "out"],
    ["diff", "adapter", "adapter"],
    ["check", "adapter"],
]
EXPORT = ["export", "adapter", "--to", "merged", "--output"]
LONG = "n" * 300


SHARD = "base/model-00001-of-00002.safetensors"


def cut_off():
    os.truncate(SHARD, 1000)


def lose_a_shard():
    os.remove(SHARD)


def fill_the_disk():
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, resource.RLIM_INFINITY))


# what is done, what follows `ndlora`, what must stand in the one line
SYSTEM = {
    "base cut off": (cut_off, [*EXPORT, "out"], SHARD + " (1000 bytes) is truncated"),
    "shard missing": (
        lose_a_shard,
        [*EXPORT, "out"],
        "names the file 'model-00001-of-00002.safetensors', which is not there",
    ),
    "disk full": (
        fill_the_disk,
        [*EXPORT, "out"],
        "File too large: {}/.out-unfinished/files/model-00001-of-00002.safetensors",
    ),
    "export, name too long": (bool, [*EXPORT, LONG], "File name too long: {}/" + LONG),
    "check, name too long": (bool, ["check", LONG], "File name too long: " + LONG),
    "sft, no such file": (bool, ["sft", "--config", "no.yaml"], "No such file or directory: no.yaml"),
    "demo, no such file": (bool, ["demo", "--data", "no.jsonl"], "No such file or directory: no.jsonl"),
}
# what may not be read or written, its mode, what follows `ndlora`, what must stand in the one line
FORBIDDEN = {
    "adapter": (
        "adapter/adapter_model.safetensors", 0, ["check", "adapter"], "Permission denied: adapter/adapter_model",
    ),
    "base": ("base/config.json", 0, [*EXPORT, "out"], "Permission denied: {}/base/config.json"),
    "output": (".", 0o555, [*EXPORT, "out"], "Permission denied: {}/.out-unfinished"),
}  # fmt: skip
# a fork for each of them
AS_A_USER = """
import json, os, sys
import ndlora_plugins.integrations.peft.exports.export
from ndlora_plugins.commands.main import run
for path, mode, arguments, _ in json.loads(sys.argv[1]):
    allowed = os.stat(path).st_mode
    os.chmod(path, mode)
    child = os.fork()
    if not child:
        sys.argv = ["ndlora", *arguments]
        run()
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    os.chmod(path, allowed)
    print("exit status", status, file=sys.stderr, flush=True)
"""


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
    assert json.loads(result.stdout)["parameters"] == 1_089_536


@pytest.mark.parametrize("options, message", WRONG)
def test_wrong_options(options, message, model):
    result = invoke("plan", model, *options)
    assert isinstance(result.exception, NdLoraValueError) and message in str(result.exception)


def test_plan_chooses_for_a_budget(model):
    result = invoke("plan", model, "--like-lora-r", "8", "--fraction", "1/16", "--json")
    found = json.loads(result.stdout)
    assert 0.98 * found["lora_parameters"] <= 16 * found["parameters"] <= found["lora_parameters"]
    text = invoke("plan", model, "--parameters", "1M").output
    assert [
        word for word in ("NdLoraConfig(", "learning_rate: ", "adapter: ndlora") if word not in text
    ] == []


def test_a_model_that_is_not_there(tmp_path):
    result = invoke("plan", tmp_path / "nothing")
    assert isinstance(result.exception, NdLoraValueError) and "neither a directory" in str(result.exception)


def test_a_prime_dimension_is_seen_in_the_plan(tmp_path):
    LlamaConfig(
        hidden_size=64, intermediate_size=257, num_hidden_layers=1, num_attention_heads=4
    ).save_pretrained(tmp_path)
    assert "lopsided" in invoke("plan", tmp_path, "--method", "ndlinear").output
    assert "lopsided" not in invoke("plan", tmp_path).output


def test_methods_lists_everything_with_its_plugin():
    output = invoke("methods").output
    for word in (
        "crossed",
        "ndlinear",
        "slora",
        "nlora",
        "inttune",
        "einsum",
        "n_lora",
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


@pytest.fixture
def directories(make_llama, shake, tmp_path, monkeypatch):
    """Base model and adapter in the current directory, which is returned."""
    make_llama().save_pretrained(tmp_path / "base", max_shard_size="150KB")
    model = make_llama()
    model.name_or_path = str(tmp_path / "base")
    shake(get_peft_model(model, NdLoraConfig())).save_pretrained(tmp_path / "adapter")
    monkeypatch.chdir(tmp_path)
    yield tmp_path
    resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))


@pytest.mark.parametrize(("damage", "arguments", "message"), SYSTEM.values(), ids=SYSTEM)
def test_an_error_of_the_operating_system_is_one_line(
    damage, arguments, message, directories, monkeypatch, capsys
):
    damage()
    before = sorted(os.listdir())
    monkeypatch.setattr("sys.argv", ["ndlora", *arguments])
    with pytest.raises(SystemExit) as stopped:
        run()
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("Error:")]
    assert stopped.value.code == 2 and message.format(directories) in line
    assert sorted(os.listdir()) == before


def test_what_may_not_be_read_or_written_is_said_so(directories):
    as_a_user = []
    if os.geteuid() == 0:  # who may read everything
        as_a_user = ["setpriv", "--bounding-set", "-dac_override,-dac_read_search"]
        if shutil.which("setpriv") is None:
            pytest.skip("run by root, and there is no setpriv")
    command = [*as_a_user, sys.executable, "-P", "-c", AS_A_USER, json.dumps([*FORBIDDEN.values()])]
    said = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    *errors, rest = said.split("exit status 2\n")
    assert len(errors) == len(FORBIDDEN) and not rest and "Traceback" not in said
    for error, (*_, message) in zip(errors, FORBIDDEN.values(), strict=True):
        assert f"Error: {message.format(directories)}" in error.replace("\n", "")


@pytest.mark.parametrize("config", NO_MODELS)
def test_a_configuration_that_makes_no_model(config, tmp_path):
    (tmp_path / "config.json").write_text(config)
    result = invoke("plan", tmp_path)
    assert isinstance(result.exception, NdLoraValueError) and NO_MODELS[config] in str(result.exception)


@pytest.mark.parametrize(("arguments", "message"), REFUSED)
def test_what_cannot_be_done_is_said_without_a_traceback(
    arguments, message, directories, monkeypatch, capsys
):
    (directories / "latin.txt").write_bytes(b"\xff\xfe")
    monkeypatch.setattr("sys.argv", ["ndlora", *arguments])
    with pytest.raises(SystemExit) as stopped:
        run()
    assert stopped.value.code == 2 and message in " ".join(capsys.readouterr().err.split())
    assert not (directories / "out").exists()


def test_a_traceback_can_be_had(directories, monkeypatch):
    monkeypatch.setenv("NDLORA_TRACEBACK", "1")
    monkeypatch.setattr("sys.argv", ["ndlora", *REFUSED[1][0]])
    with pytest.raises(ValueError, match="Couldn't instantiate"):
        run()


@pytest.mark.parametrize(("arguments", "key"), JSON)
def test_what_a_script_reads(arguments, key, directories):
    result = invoke(*arguments, "--json")
    assert result.exit_code == 0 and key in json.loads(result.stdout), result.output


@pytest.mark.parametrize("arguments", TABLES, ids=lambda arguments: arguments[0])
def test_a_table_has_one_line_for_each_kind_of_layer(arguments, directories):
    assert invoke(*arguments).output.count("q_proj") == 1


def test_a_broken_adapter_is_told_to_a_script(directories):
    config = json.loads((directories / "adapter" / "adapter_config.json").read_text())
    (directories / "adapter" / "adapter_config.json").write_text(json.dumps({**config, "r": 2}))
    result = invoke("check", "adapter", "--json")
    assert result.exit_code == 1 and json.loads(result.stdout)["problems"]


def test_the_version():
    assert invoke("--version").output.startswith("ndlora-plugins 0.")


def test_the_shell_completes_commands(monkeypatch, capsys):
    for name, value in {
        "_NDLORA_COMPLETE": "complete_bash",
        "COMP_WORDS": "ndlora ex",
        "COMP_CWORD": "1",
    }.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr("sys.argv", ["ndlora"])
    with pytest.raises(SystemExit):
        run()
    assert capsys.readouterr().out.split() == ["export"]


def test_the_help_of_sft_shows_an_example(monkeypatch, capsys):
    pytest.importorskip("trl")
    monkeypatch.setattr("sys.argv", ["ndlora", "sft", "--help"])
    with pytest.raises(SystemExit) as stopped:
        run()
    assert stopped.value.code == 0 and "Example: ndlora sft --config run.yaml" in capsys.readouterr().out


def test_arguments_of_sft_that_cannot_work_are_one_line(tmp_path, monkeypatch, capsys):
    pytest.importorskip("trl")
    (tmp_path / "run.yaml").write_text("[1, 2")
    monkeypatch.setattr("sys.argv", ["ndlora", "sft", "--config", str(tmp_path / "run.yaml")])
    with pytest.raises(SystemExit) as stopped:
        run()
    assert stopped.value.code == 2 and "The arguments of `ndlora sft` cannot work" in capsys.readouterr().err
