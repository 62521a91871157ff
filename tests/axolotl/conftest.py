"""Data sets for a tiny real model, the least YAML, and the real command line in processes of its own."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

WORDS = (
    "add take has apples pears and more is plus minus the how many now one two three four five six".split()
)
# Axolotl's frame around an instruction, which the tokenizer is to know as words
ALPACA = [
    "Below is an instruction that describes a task. Write a response that appropriately completes the request.",
    "### Instruction: ### Response: ",
] * 4
COMMAND = Path(sys.executable).with_name("axolotl")


TEMPLATE = (
    "{% for m in messages %}{{ m['role'] }} : {{ m['content'] }} </s>{% endfor %}"
    "{% if add_generation_prompt %}assistant : {% endif %}"
)


def write_data(path: Path, rows: int = 24) -> Path:
    """Alpaca rows made of the tokenizer's words."""
    lines = [
        {
            "instruction": f"{WORDS[i % 7]} {WORDS[(i + 3) % 11]} and",
            "input": "",
            "output": f"{WORDS[(i * 5) % 19]} {WORDS[(i + 1) % 19]} more",
        }
        for i in range(rows)
    ]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def write_preferences(path: Path, rows: int = 16) -> Path:
    """Pairs in the shape that Axolotl's chatml.intel reads."""
    lines = [
        {
            "system": "",
            "question": f"{WORDS[i % 9]} {WORDS[i % 5]} and",
            "chosen": f"{WORDS[i % 7]} more",
            "rejected": f"{WORDS[(i + 3) % 9]} minus",
        }
        for i in range(rows)
    ]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def base_yaml(tiny: Path, data: Path, prepared: Path, output: Path) -> dict:
    """The least that `axolotl train` needs on a CPU; no key of ours, no lora key."""
    return {
        "base_model": str(tiny),
        "adapter": "ndlora",
        "datasets": [{"path": str(data), "ds_type": "json", "type": "alpaca"}],
        "dataset_prepared_path": str(prepared),
        "output_dir": str(output),
        "sequence_len": 128,
        "micro_batch_size": 2,
        "gradient_accumulation_steps": 1,
        "max_steps": 3,
        "learning_rate": 0.01,
        "optimizer": "adamw_torch",
        "lr_scheduler": "constant",
        "bf16": False,
        "sample_packing": False,
        "logging_steps": 1,
        "save_strategy": "no",
        "seed": 1,
    }


@pytest.fixture(scope="session")
def tiny(save_tiny_model, tmp_path_factory):
    texts = [" ".join(WORDS), "user : assistant :", *ALPACA]
    return save_tiny_model(tmp_path_factory.mktemp("tiny") / "model", texts, TEMPLATE)


@pytest.fixture(scope="session")
def data(tmp_path_factory):
    return write_data(tmp_path_factory.mktemp("data") / "rows.jsonl")


@pytest.fixture(scope="session")
def preferences(tmp_path_factory):
    return write_preferences(tmp_path_factory.mktemp("preferences") / "pairs.jsonl")


@pytest.fixture(scope="session")
def least(tiny, data, tmp_path_factory):
    """The least YAML, as a dict: `least(output_directory)`. Rows that are prepared once are found again: to write them
    Axolotl spawns a process each time.
    """
    prepared = tmp_path_factory.mktemp("prepared")
    return lambda output: base_yaml(tiny, data, prepared, output)


@pytest.fixture(scope="session")
def environment(tmp_path_factory):
    """Of the commands."""
    return {
        **os.environ,
        "PATH": os.pathsep.join([str(COMMAND.parent), os.environ.get("PATH", "")]),  # for accelerate
        "HF_HUB_OFFLINE": "1",
        "AXOLOTL_DO_NOT_TRACK": "1",
        "CUDA_VISIBLE_DEVICES": "",
        "OMP_NUM_THREADS": "1",
        "HF_HOME": str(tmp_path_factory.mktemp("hf")),
    }


@pytest.fixture(scope="session")
def server(environment):
    """The process of command_server.py."""
    command = [sys.executable, "-P", str(Path(__file__).with_name("command_server.py"))]
    streams = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}
    with subprocess.Popen(command, env=environment, text=True, bufsize=1, **streams) as process:
        yield process


@pytest.fixture(scope="session")
def axolotl(environment, request):
    """Run `axolotl COMMAND CONFIG ...`; returns its output, fails the test unless it ends well. `fresh`: the installed
    script as a process of its own; else a fork of one that has imported the same (command_server.py).
    """

    def run(
        command: str,
        config: dict,
        directory: Path,
        *options: str,
        ok: bool = True,
        launcher: str = "python",
        stdin: str = "",
        fresh: bool = False,
    ) -> str:
        import yaml

        directory.mkdir(parents=True, exist_ok=True)
        path = directory / "config.yml"
        path.write_text(yaml.safe_dump(config))
        launch = ["--launcher", launcher] if command in ("train", "evaluate", "inference") else []
        arguments = [command, str(path), *launch, *options]
        given, printed = directory / "stdin", directory / "stdout"
        given.write_text(stdin)
        if fresh:
            with given.open() as source, printed.open("w") as target:
                code = subprocess.run(
                    [str(COMMAND), *arguments],
                    cwd=directory,
                    env=environment,
                    stdin=source,
                    stdout=target,
                    stderr=subprocess.STDOUT,
                    timeout=900,
                ).returncode
        else:
            server = request.getfixturevalue("server")
            call = {"arguments": arguments, "directory": str(directory)}
            call |= {"input": str(given), "output": str(printed)}
            server.stdin.write(json.dumps(call) + "\n")
            code = int(server.stdout.readline())
        found = printed.read_text()
        assert (code == 0) is ok, found[-6000:]
        return found

    return run
