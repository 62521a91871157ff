"""The experiments for PEFT's method_comparison load, and name the learning rate that they have."""

import json
import pathlib

import pytest
from peft import PeftConfig

from ndlora_plugins.adapter import plan_layer

ROOT = pathlib.Path(__file__).resolve().parents[2]
FOLDERS = sorted((ROOT / "benchmarks/quality/method_comparison/MetaMathQA/experiments/ndlora").iterdir())
LLAMA_3_2_3B = {"q_proj": (3072, 3072), "v_proj": (3072, 1024)}  # in, out


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: folder.name)
def test_an_experiment_can_be_run(folder):
    config = PeftConfig.from_pretrained(str(folder))
    assert type(config).__name__ == "NdLoraConfig" and config.target_modules == set(LLAMA_3_2_3B)
    for layer, (in_features, out_features) in LLAMA_3_2_3B.items():
        assert plan_layer(config.options_for(layer), in_features, out_features, layer).num_parameters > 0
    # PEFT's runner takes what it does not find here from its default_training_params.json
    parameters = json.loads((folder / "training_params.json").read_text())
    assert parameters.keys() == {"optimizer_kwargs"}
    assert folder.name.endswith(f"lr_{parameters['optimizer_kwargs']['lr']:g}")
