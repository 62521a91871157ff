"""The other trainings of the real `axolotl` commands: preprocessed data, KTO, reward modelling, early stopping, the
callback, a recipe of examples/axolotl in miniature.
"""

import json
import re
from pathlib import Path

import pytest

pytest.importorskip("axolotl")

import torch
import yaml
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from ndlora_plugins import NdLoraConfig

pytestmark = pytest.mark.slow

RECIPES = Path(__file__).parents[2] / "examples" / "axolotl"
TOKENS = torch.arange(20)[None]


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return {"path": str(path), "ds_type": "json", "split": "train"}


def losses_of(checkpoint, key="loss"):
    state = json.loads((checkpoint / "trainer_state.json").read_text())
    return [entry[key] for entry in state["log_history"] if key in entry]


def logits(directory, adapter):
    """Of the base model, and with the adapter."""
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    with torch.no_grad():
        before = model.eval()(TOKENS).logits
        return before, PeftModel.from_pretrained(model, adapter).eval()(TOKENS).logits


@pytest.mark.step("preprocess, then train", method="slora")
@pytest.mark.step("callback: update norms, schedule, plot, export", method="slora")
@pytest.mark.step("model card", method="slora")
def test_preprocess_then_train_with_the_callback(axolotl, tiny, least, tmp_path):
    config = {
        **least(tmp_path / "out"),
        "dataset_prepared_path": str(tmp_path / "prepared"),
        "max_steps": 4,
        "lora_r": 4,
        "ndlora": {"method": "slora", "callback": {"core_only_at": 2, "export": "merged", "plot": "run.png"}},
    }
    assert "Success! Preprocessed data path" in axolotl("preprocess", config, tmp_path)
    prepared = sorted((tmp_path / "prepared").rglob("*.arrow"))
    printed = axolotl("train", config, tmp_path)
    assert prepared and sorted((tmp_path / "prepared").rglob("*.arrow")) == prepared
    assert printed.count("ndlora/default/update_norm_max") == 4
    assert (tmp_path / "run.png").is_file()
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "out/merged", dtype=torch.float32).eval()
    before, trained = logits(tiny, tmp_path / "out")
    assert not torch.allclose(before, trained, atol=1e-3)
    torch.testing.assert_close(merged(TOKENS).logits.detach(), trained, atol=1e-5, rtol=1e-4)
    card = (tmp_path / "out/README.md").read_text()
    assert card.count("## NDLORA adapter") == 1 and "| learning rate | 0.01 |" in card
    header = yaml.safe_load(card.split("---\n")[1])
    assert {"ndlora", "slora"} <= set(header["tags"]) and "/" not in str(header.get("base_model", ""))


@pytest.mark.step("rl: kto", method="inttune")
def test_kto(axolotl, tiny, least, tmp_path):
    rows = [
        {"prompt": "add two", "completion": "three more" if i % 2 else "minus", "label": bool(i % 2)}
        for i in range(16)
    ]
    config = {
        **least(tmp_path / "out"),
        "rl": "kto",
        "datasets": [{**write(tmp_path / "rows.jsonl", rows), "type": "chatml.prompt_pairs"}],
        "remove_unused_columns": False,
        "lora_r": 4,
        "learning_rate": 0.05,
        "ndlora": {"method": "inttune"},
        "save_strategy": "steps",
        "save_steps": 3,
    }
    axolotl("train", config, tmp_path)
    history = losses_of(tmp_path / "out/checkpoint-3")
    assert len(history) == 3 and history[0] == pytest.approx(
        0.5, abs=1e-3
    )  # the reference is the model itself
    before, trained = logits(tiny, tmp_path / "out")
    assert not torch.allclose(before, trained, atol=1e-4)


@pytest.mark.step("reward_model: true", method="crossed")
def test_reward_modelling(axolotl, tiny, least, tmp_path):
    rows = [
        {"system": "", "input": f"add {word}", "chosen": "three more", "rejected": "minus the"}
        for word in ("one", "two", "three", "four") * 4
    ]
    config = {
        **least(tmp_path / "out"),
        "reward_model": True,
        "model_type": "AutoModelForSequenceClassification",
        "num_labels": 1,
        "chat_template": "tokenizer_default",
        "datasets": [{**write(tmp_path / "rows.jsonl", rows), "type": "bradley_terry.chat_template"}],
        "remove_unused_columns": False,
        "save_strategy": "steps",
        "save_steps": 3,
    }
    axolotl("train", config, tmp_path)
    history = losses_of(tmp_path / "out/checkpoint-3")
    assert len(history) == 3 and history[-1] < history[0]
    assert json.loads((tmp_path / "out/adapter_config.json").read_text())["task_type"] == "SEQ_CLS"


@pytest.mark.step("early stopping", method="nlora")
def test_early_stopping_keeps_the_best_adapter(axolotl, least, tmp_path):
    config = {
        **least(tmp_path / "out"),
        "val_set_size": 0.2,
        "eval_steps": 1,
        "save_steps": 1,
        "early_stopping_patience": 2,
        "save_total_limit": 30,
        "max_steps": 20,
        "learning_rate": 1.0,  # too large on purpose
        "lora_r": 4,
        "peft_init_lora_weights": "n_lora",
    }
    del config["save_strategy"]
    axolotl("train", config, tmp_path)
    last = max((tmp_path / "out").glob("checkpoint-*"), key=lambda path: int(path.name.split("-")[1]))
    evaluated = losses_of(last, "eval_loss")[1:]  # the first is from before the first step
    best = evaluated.index(min(evaluated)) + 1
    assert len(evaluated) == best + 2 < 20
    kept, final = (
        load_file(directory / "adapter_model.safetensors")
        for directory in (tmp_path / f"out/checkpoint-{best}", tmp_path / "out")
    )
    assert kept.keys() == final.keys() and all(torch.equal(kept[name], final[name]) for name in kept)


@pytest.mark.step("what Axolotl saves under FSDP2 (its function, one process)")
@pytest.mark.parametrize("method", ["crossed", "ndlinear", "slora", "nlora", "inttune"])
def test_what_axolotl_gathers_under_fsdp2_is_the_whole_adapter(method, tiny, tmp_path):
    # it takes every parameter whose name contains "lora_", as ours do in "ndlora_"
    from axolotl.integrations.expert_parallel.shard import save_fsdp2_lora_adapter

    config = NdLoraConfig(method=method, r=4, task_type="CAUSAL_LM")
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(tiny, dtype=torch.float32), config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += 0.1
    assert save_fsdp2_lora_adapter(model, str(tmp_path))
    _, loaded = logits(tiny, tmp_path)
    torch.testing.assert_close(loaded, model.eval()(TOKENS).logits.detach())


@pytest.mark.step("a recipe of examples/axolotl in miniature", method="nlora")
def test_a_recipe_in_miniature(axolotl, tiny, tmp_path):
    rows = [{"query": "add two and one", "response": "three more"}] * 16
    recipe = yaml.safe_load((RECIPES / "llama2-7b-metamathqa-nlora.yml").read_text())
    data = [{**recipe["datasets"][0], **write(tmp_path / "rows.jsonl", rows)}]
    replaced = {"base_model": str(tiny), "datasets": data, "output_dir": str(tmp_path / "out")}
    sizes = {"lora_r": 4, "sequence_len": 128, "micro_batch_size": 2, "gradient_accumulation_steps": 1}
    config = {**recipe, **replaced, **sizes, "max_steps": 4}
    printed = axolotl("train", config, tmp_path)
    history = [float(loss) for loss in re.findall(r"'loss': '([\d.]+)'", printed)]
    assert len(history) == 4
    before, trained = logits(tiny, tmp_path / "out")
    assert not torch.equal(before, trained)
    saved = json.loads((tmp_path / "out/adapter_config.json").read_text())
    assert (saved["method"], saved["r"], saved["lora_alpha"]) == ("nlora", 4, recipe["lora_alpha"])
