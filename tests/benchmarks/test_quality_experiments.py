"""The experiments for PEFT's method_comparison load, plan on the model's shapes, and name their learning rate."""

import json
import pathlib
import sys

import pytest
import torch
from peft import PeftConfig

from ndlora_plugins.integrations.peft.tuner.targets import plan_model

ROOT = pathlib.Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))  # the benchmarks are not installed
from benchmarks.quality.experiments import EXPERIMENTS, FOLDER, MODELS, file_texts  # noqa: E402

sys.path.remove(str(ROOT))
FOLDERS = sorted(FOLDER.glob("*/experiments/ndlora/*"))
# numbers that PEFT's own LoRA of rank 32 has on the same layers: what its results say
LORA_32 = {"image-gen": 38_338_560}
SMALLEST, LARGEST = 100_000, 1_600_000  # of the image experiments


def task_of(folder):
    return folder.relative_to(FOLDER).parts[0]


@pytest.fixture(scope="module")
def models():
    """A function: a task's model on "meta", made once."""
    made = {}

    def model(task):
        if task == "image-gen":
            pytest.importorskip("diffusers")
        if task not in made:
            with torch.device("meta"):
                made[task] = MODELS[task]()
        return made[task]

    return model


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: folder.name)
def test_an_experiment_can_be_run(folder, models):
    config = PeftConfig.from_pretrained(str(folder))
    assert type(config).__name__ == "NdLoraConfig"
    count = sum(plan.num_parameters for _, plan in plan_model(models(task_of(folder)), config))
    assert count > 0 and (task_of(folder) != "image-gen" or SMALLEST <= count <= LARGEST)
    # PEFT's runner takes what it does not find here from its default_training_params.json
    parameters = json.loads((folder / "training_params.json").read_text())
    assert parameters.keys() == {"optimizer_kwargs"}
    assert folder.name.endswith(f"lr_{parameters['optimizer_kwargs']['lr']:g}")


@pytest.mark.parametrize("task", EXPERIMENTS)
def test_the_folders_are_those_of_the_table(task):
    for name in EXPERIMENTS[task]:
        folder = FOLDER / task / "experiments" / "ndlora" / name
        assert {path.name: path.read_text() for path in folder.iterdir()} == file_texts(task, name)


def test_the_image_model_has_the_shapes_of_pefts_benchmark(models):
    targets = EXPERIMENTS["image-gen"]["flux2-klein-ndlinear-lr_0.001"][0]["target_modules"]
    layers = [
        layer
        for name, layer in models("image-gen").named_modules()
        if any(name.endswith(f".{target}") for target in targets)
    ]
    assert sum(32 * (layer.in_features + layer.out_features) for layer in layers) == LORA_32["image-gen"]
