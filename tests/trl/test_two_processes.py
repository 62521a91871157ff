"""Two processes on the CPU (gloo) give what one gives with the same global batch, to rounding."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file

pytest.importorskip("trl")
pytestmark = pytest.mark.slow

SCRIPT = Path(__file__).with_name("train_in_processes.py")
BIN = Path(sys.executable).parent
# with `--cpu` accelerate starts one process, whatever --num_processes says (more only with mpirun and its hostfile);
# `use_cpu` in the training's own arguments keeps these two on the CPU
TWO = ["--multi_gpu", "--num_processes=2", "--num_machines=1", "--mixed_precision=no", "--dynamo_backend=no"]
LAUNCH = [str(BIN / "accelerate"), "launch", *TWO, "--main_process_port=0"]
# trainers of train_in_processes.py
HOSTS = ["SFTTrainer", "Trainer", "FSDP2 by hand"]
ROUNDING = {"rtol": 1e-5, "atol": 1e-6}


def run(command, directory):
    environment = {
        **os.environ,
        "PATH": os.pathsep.join([str(BIN), os.environ.get("PATH", "")]),
        "OMP_NUM_THREADS": "1",
        "CUDA_VISIBLE_DEVICES": "",
        "PYTHONSAFEPATH": "1",
    }
    done = subprocess.run(
        [str(word) for word in command], cwd=directory, env=environment, timeout=900,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-6000:]


@pytest.fixture(scope="module")
def one_and_two(base, all_methods, tmp_path_factory):
    """The directories that one process and two wrote."""
    directory = tmp_path_factory.mktemp("processes")
    run([sys.executable, SCRIPT, base, directory, json.dumps(all_methods)], directory)
    return directory / "one", directory / "two"


@pytest.mark.step("two processes")
@pytest.mark.parametrize("host", HOSTS)
def test_two_processes_give_the_losses_and_the_adapter_of_one(host, method_name, one_and_two):
    reports = [json.loads((directory / "report.json").read_text()) for directory in one_and_two]
    assert [report["processes"] for report in reports] == [1, 2]
    one, two = (torch.tensor(report["losses"][f"{host}, {method_name}"]) for report in reports)
    assert len(one) == 4
    torch.testing.assert_close(two, one, **ROUNDING)
    files = [directory / host / method_name / "adapter_model.safetensors" for directory in one_and_two]
    one, two = map(load_file, files)
    assert one.keys() == two.keys()
    for name in one:
        torch.testing.assert_close(two[name], one[name], **ROUNDING, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.step("two processes, `ndlora sft`", host="SFTTrainer", method="nlora")
def test_ndlora_sft_under_accelerate_launch(base, options, datasets_by_form, losses_of, tmp_path):
    from ndlora_plugins.integrations.trl.sft import main

    (tmp_path / "data").mkdir()
    datasets_by_form["text"].to_json(tmp_path / "data/train.jsonl")
    keys = {**options, "model_name_or_path": base, "dataset_name": str(tmp_path / "data"), "max_steps": 2}
    keys |= {"save_strategy": "steps", "save_steps": 2, "ndlora": {"method": "nlora", "r": 4}}
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(keys))
    flags = ["--config", str(tmp_path / "run.yaml"), "--output_dir"]
    main([*flags, str(tmp_path / "one")])
    halves = ["--per_device_train_batch_size", "4"]
    run([*LAUNCH, "--no_python", "ndlora", "sft", *flags, tmp_path / "two", *halves], tmp_path)
    one, two = (losses_of(tmp_path / run / "checkpoint-2") for run in ("one", "two"))
    assert len(one) == 2 and two == pytest.approx(one, rel=1e-5)
