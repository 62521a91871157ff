"""Data sets for a tiny real model, the least YAML, and the real command line in a subprocess."""

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


def base_yaml(tiny: Path, data: Path, output: Path) -> dict:
    """The least that `axolotl train` needs on a CPU; no key of ours, no lora key."""
    return {
        "base_model": str(tiny),
        "adapter": "ndlora",
        "datasets": [{"path": str(data), "ds_type": "json", "type": "alpaca"}],
        "dataset_prepared_path": str(output.parent / "prepared"),
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
def least(tiny, data):
    """The least YAML, as a dict: `least(output_directory)`."""
    return lambda output: base_yaml(tiny, data, output)


@pytest.fixture(scope="session")
def axolotl():
    """Run `axolotl COMMAND CONFIG ...`; returns its output, fails the test unless it ends well."""

    def run(
        command: str,
        config: dict,
        directory: Path,
        *options: str,
        ok: bool = True,
        launcher: str = "python",
        stdin: str = "",
    ) -> str:
        import yaml

        directory.mkdir(parents=True, exist_ok=True)
        path = directory / "config.yml"
        path.write_text(yaml.safe_dump(config))
        launch = ["--launcher", launcher] if command in ("train", "evaluate", "inference") else []
        done = subprocess.run(
            [str(COMMAND), command, str(path), *launch, *options],
            cwd=directory,
            input=stdin,
            env={
                **os.environ,
                "PATH": os.pathsep.join([str(COMMAND.parent), os.environ.get("PATH", "")]),  # for accelerate
                "HF_HUB_OFFLINE": "1",
                "AXOLOTL_DO_NOT_TRACK": "1",
                "CUDA_VISIBLE_DEVICES": "",
                "OMP_NUM_THREADS": "1",
                "HF_HOME": str(directory / "hf"),
            },
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=900,
        )
        assert (done.returncode == 0) is ok, done.stdout[-6000:]
        return done.stdout

    return run
