"""The real `axolotl` commands, in processes of their own, on a tiny real model on the CPU."""

import json
import re

import pytest

pytest.importorskip("axolotl")

import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

pytestmark = pytest.mark.slow

TOKENS = torch.arange(20)[None]
# the block `ndlora:`
METHODS = {
    "ndlinear": {"method": "ndlinear"},
    "slora": {"method": "slora"},
    "nlora": {"method": "nlora"},
    "inttune": {"method": "inttune"},
    "einsum": {"method": "einsum", "options": {"equation": "out r, r s, s in -> out in", "sizes": {"s": 3}}},
}


def logits(directory, adapter=None):
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    model = model if adapter is None else PeftModel.from_pretrained(model, adapter)
    with torch.no_grad():
        return model.eval()(TOKENS).logits


def saved_config(output):
    return json.loads((output / "adapter_config.json").read_text())


def logged_losses(printed):
    return [float(loss) for loss in re.findall(r"'loss': '([\d.]+)'", printed)]


def assert_trained_and_merged(tiny, output):
    with_adapter = logits(tiny, output)
    assert (with_adapter - logits(tiny)).abs().max() > 1e-4
    torch.testing.assert_close(logits(output / "merged"), with_adapter, atol=1e-5, rtol=1e-4)


@pytest.fixture(scope="module")
def adapter_line_alone(axolotl, least, tmp_path_factory):
    """Trained with `adapter: ndlora` and no other key of ours: (YAML, directory, what was printed)."""
    directory = tmp_path_factory.mktemp("alone")
    config = {**least(directory / "out"), "val_set_size": 0.2, "learning_rate": 0.05, "max_steps": 8}
    return config, directory, axolotl("train", config, directory, launcher="accelerate", fresh=True)


@pytest.mark.step("train", method="crossed")
@pytest.mark.step("val_set_size", method="crossed")
def test_the_adapter_line_alone_trains(adapter_line_alone):
    _, directory, printed = adapter_line_alone
    saved = saved_config(directory / "out")
    assert (saved["peft_type"], saved["method"], saved["r"]) == ("NDLORA", "crossed", 1)
    assert len(logged_losses(printed)) == 8
    assert "uses a fresh adapter" not in printed


@pytest.mark.step("merge-lora, shard by shard", method="crossed")
def test_merge_lora_by_default(axolotl, adapter_line_alone, tiny):
    config, directory, _ = adapter_line_alone
    assert "merged 14 layers" in axolotl("merge-lora", config, directory, fresh=True)
    assert_trained_and_merged(tiny, directory / "out")


@pytest.mark.step("train")
@pytest.mark.step("merge-lora, shard by shard")
@pytest.mark.parametrize("block", METHODS.values(), ids=METHODS)
def test_every_method_trains_and_merges(block, axolotl, tiny, least, tmp_path):
    config = {**least(tmp_path / "out"), "learning_rate": 0.05, "lora_r": 4, "ndlora": block}
    axolotl("train", config, tmp_path)
    assert saved_config(tmp_path / "out").items() >= block.items()
    assert "merged 14 layers" in axolotl("merge-lora", config, tmp_path)
    assert_trained_and_merged(tiny, tmp_path / "out")


@pytest.mark.step("evaluate", method="crossed")
def test_evaluate_uses_the_adapter_it_is_given_and_warns_without(axolotl, adapter_line_alone):
    config, directory, _ = adapter_line_alone
    losses = []
    for options in ((), (f"--lora-model-dir={directory / 'out'}",)):
        printed = axolotl("evaluate", config, directory, *options)
        assert ("evaluate uses a fresh adapter" in printed) is (not options)
        losses.append(float(re.search(r"train_loss: ([\d.]+)", printed).group(1)))
    assert losses[1] < losses[0]


@pytest.mark.step("inference", method="crossed")
def test_inference_uses_the_adapter_it_is_given(axolotl, adapter_line_alone):
    config, directory, _ = adapter_line_alone
    options = (f"--lora-model-dir={directory / 'out'}",)
    printed = axolotl("inference", config, directory, *options, stdin="add two\n")
    assert "uses a fresh adapter" not in printed and "method crossed" in printed


@pytest.mark.step("Axolotl's own keys, plugin listed", method="nlora")
@pytest.mark.step("sample packing, gradient checkpointing", method="nlora")
@pytest.mark.step("merge-lora, merge_method: legacy", method="nlora")
def test_axolotls_keys_and_the_block_with_the_plugin_listed(axolotl, tiny, least, tmp_path):
    config = {
        **least(tmp_path / "out"),
        "plugins": ["ndlora_plugins.integrations.axolotl.NdLoraPlugin"],
        "lora_r": 4,
        "lora_alpha": 8,
        "lora_dropout": 0.05,
        "lora_target_modules": ["q_proj", "v_proj", "down_proj"],
        "lora_exclude_modules": ["model.layers.0.self_attn.v_proj"],
        "lora_modules_to_save": ["lm_head"],
        "lora_rank_pattern": {"q_proj": 2},
        "lora_alpha_pattern": {"q_proj": 4},
        "peft_layers_to_transform": [0, 1],
        "peft_init_lora_weights": "n_lora",
        "peft_use_rslora": True,
        "ndlora": {"anchor": "snapshot", "random_seed": 3},
        "gradient_checkpointing": True,
        "sample_packing": True,
        "merge_method": "legacy",
    }
    axolotl("train", config, tmp_path)
    saved = saved_config(tmp_path / "out")
    expected = {
        "method": "nlora",
        "r": 4,
        "lora_alpha": 8,
        "lora_dropout": 0.05,
        "modules_to_save": ["lm_head"],
        "rank_pattern": {"q_proj": 2},
        "alpha_pattern": {"q_proj": 4},
        "layers_to_transform": [0, 1],
        "init_lora_weights": "n_lora",
        "use_rslora": True,
        "anchor": "snapshot",
        "random_seed": 3,
    }
    assert {key: saved[key] for key in expected} == expected
    names = load_file(tmp_path / "out" / "adapter_model.safetensors").keys()
    assert not any("layers.0.self_attn.v_proj" in name for name in names)
    assert any("layers.1.self_attn.v_proj" in name for name in names)
    assert any("lm_head" in name for name in names)
    axolotl("merge-lora", config, tmp_path)
    assert_trained_and_merged(tiny, tmp_path / "out")


@pytest.mark.step("load_in_4bit", method="inttune")
@pytest.mark.step("lora_model_dir as the start of a training", method="inttune")
def test_a_4_bit_base_and_a_second_training_that_goes_on(axolotl, least, tmp_path):
    config = {**least(tmp_path / "one"), "load_in_4bit": True, "ndlora": {"method": "inttune"}}
    config["learning_rate"] = 0.005
    config["lora_r"] = 4
    first = logged_losses(axolotl("train", config, tmp_path))
    storage = {layer["storage"] for layer in saved_config(tmp_path / "one")["base_fingerprint"].values()}
    assert storage == {"4bit"}
    config = {**config, "output_dir": str(tmp_path / "two"), "lora_model_dir": str(tmp_path / "one")}
    second = logged_losses(axolotl("train", config, tmp_path))
    assert second[0] < first[0]  # the same first batch: it starts where the first training ended
    before = load_file(tmp_path / "one" / "adapter_model.safetensors")
    after = load_file(tmp_path / "two" / "adapter_model.safetensors")
    assert before.keys() == after.keys()
    assert any((before[name] != after[name]).any() for name in before)


@pytest.mark.step("load_in_8bit", method="slora")
@pytest.mark.step("resume equals uninterrupted", method="slora")
def test_resuming_equals_not_stopping_on_an_8_bit_base(axolotl, least, tmp_path):
    config = {
        **least(tmp_path / "whole"),
        "max_steps": 4,
        "save_strategy": "steps",
        "save_steps": 2,
        "ndlora": {"method": "slora"},
        "lora_dropout": 0.1,
        "load_in_8bit": True,
    }
    axolotl("train", config, tmp_path)
    storage = {layer["storage"] for layer in saved_config(tmp_path / "whole")["base_fingerprint"].values()}
    assert storage == {"8bit"}
    resumed = {
        **config,
        "output_dir": str(tmp_path / "resumed"),
        "resume_from_checkpoint": str(tmp_path / "whole" / "checkpoint-2"),
    }
    axolotl("train", resumed, tmp_path)
    history = [
        json.loads((tmp_path / run / "checkpoint-4" / "trainer_state.json").read_text())["log_history"]
        for run in ("whole", "resumed")
    ]
    losses = [[entry["loss"] for entry in entries if "loss" in entry] for entries in history]
    assert len(losses[0]) == 4 and losses[0] == losses[1]
    whole, again = (load_file(tmp_path / run / "adapter_model.safetensors") for run in ("whole", "resumed"))
    assert whole.keys() == again.keys() and all(torch.equal(whole[name], again[name]) for name in whole)


@pytest.mark.step("rl: dpo", method="slora")
def test_preference_tuning(axolotl, tiny, least, preferences, tmp_path):
    config = {
        **least(tmp_path / "out"),
        "rl": "dpo",
        "datasets": [{"path": str(preferences), "ds_type": "json", "split": "train", "type": "chatml.intel"}],
        "ndlora": {"method": "slora"},
    }
    losses = logged_losses(axolotl("train", config, tmp_path))
    assert losses[0] == pytest.approx(0.6931, abs=1e-4)  # log 2: the reference is the model itself
    assert losses[-1] < losses[0]
    assert (logits(tiny, tmp_path / "out") - logits(tiny)).abs().max() > 1e-4


def test_a_wrong_yaml_ends_before_anything_is_written(axolotl, tiny, least, tmp_path):
    config = {**least(tmp_path / "out"), "peft_use_dora": True, "lora_mlp_kernel": True}
    printed = axolotl("train", config, tmp_path, ok=False, fresh=True)
    assert "`peft_use_dora: True` cannot apply to adapter: ndlora" in printed
    assert "`lora_mlp_kernel: True` cannot apply to adapter: ndlora" in printed
    assert not (tmp_path / "out").exists()


def test_an_option_that_the_method_does_not_have_ends_before_the_data_is_prepared(axolotl, least, tmp_path):
    config = {**least(tmp_path / "out"), "ndlora": {"method": "slora", "options": {"size": 4}}}
    config["dataset_prepared_path"] = str(tmp_path / "prepared")
    printed = axolotl("train", config, tmp_path, ok=False)
    assert "options={'size': ...}: method='slora' has no such option; it has none." in printed
    assert not (tmp_path / "out").exists() and not (tmp_path / "prepared").exists()
