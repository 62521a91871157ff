"""`SFTTrainer(peft_config=NdLoraConfig(...))`: trained, saved, loaded again, resumed."""

import json
import math
import os
import pathlib
import runpy
import subprocess
import sys

import pytest
import torch

from ndlora_plugins import NdLoraConfig
from ndlora_plugins.integrations.trl import NdLoraCallback

pytest.importorskip("trl")
pytestmark = pytest.mark.slow

EXAMPLES = pathlib.Path(__file__).parents[2] / "examples"
# what a user switches on in SFTConfig -> form of the data, further arguments
WAYS = {
    "plain": ("text", {"max_length": 64}),
    "packing": ("text", {"max_length": 64, "packing": True, "packing_strategy": "wrapped"}),
    "assistant only": ("messages", {"max_length": 128, "assistant_only_loss": True}),
    "bfloat16 and checkpointing": ("messages", {"bf16": True, "gradient_checkpointing": True}),
}
# in a process of its own, which imports PEFT only
RELOAD = """
import sys, json, torch
from transformers import AutoModelForCausalLM
from peft import PeftModel
base, adapter, tokens = sys.argv[1:]
model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
model = PeftModel.from_pretrained(model, adapter).eval()
logits = model(torch.tensor([json.loads(tokens)])).logits[0, -1]
print("LOGITS", json.dumps(logits.tolist()))
"""


@pytest.fixture
def train(base, datasets_by_form, options):
    """Function (method's arguments, form, checkpoint, further SFTConfig arguments) -> the trained trainer."""
    from trl import SFTConfig, SFTTrainer

    def run(method, form="text", resume=None, callbacks=None, **more):
        trainer = SFTTrainer(
            base,
            args=SFTConfig(**{**options, **more}, model_init_kwargs={"dtype": "float32"}),
            train_dataset=datasets_by_form[form],
            peft_config=NdLoraConfig(task_type="CAUSAL_LM", random_seed=1, **method),
            callbacks=[NdLoraCallback()] if callbacks is None else callbacks,
        )
        trainer.train(resume_from_checkpoint=resume)
        return trainer

    return run


def logits_of(model, tokens):
    with torch.no_grad():
        return model.eval()(torch.tensor([tokens], device=model.device)).logits[0, -1]


@pytest.mark.step("train", host="SFTTrainer")
@pytest.mark.parametrize(("form", "more"), WAYS.values(), ids=WAYS)
def test_trains_and_leaves_the_base_weights_as_they_are(
    form, more, method, train, losses, model, fingerprint
):
    trainer = train(method, form, **more)
    history = losses(trainer)
    assert len(history) == 4 and all(map(math.isfinite, history))
    assert history[-1] < history[0]
    assert all(
        0 < entry["ndlora/default/update_norm"] for entry in trainer.state.log_history if "loss" in entry
    )
    assert fingerprint(trainer.model) == fingerprint(model)


@pytest.mark.step("save, load under another seed", host="SFTTrainer")
def test_a_saved_adapter_gives_the_same_logits_under_another_seed(method, train, base, model, tmp_path):
    from peft import PeftModel

    trainer = train(method)
    trainer.save_model(tmp_path / "adapter")
    torch.manual_seed(99)
    reloaded = PeftModel.from_pretrained(model, tmp_path / "adapter")
    tokens = [5, 20, 33, 47]
    assert torch.equal(logits_of(reloaded, tokens), logits_of(trainer.model, tokens))
    with reloaded.disable_adapter():
        assert not torch.equal(logits_of(reloaded, tokens), logits_of(trainer.model, tokens))


@pytest.mark.step("load where we are never imported", host="SFTTrainer", method="nlora")
def test_a_process_that_does_not_import_us_loads_the_adapter(train, base, tmp_path):
    trainer = train({"method": "nlora", "r": 4})
    trainer.save_model(tmp_path / "adapter")
    tokens = [5, 20, 33, 47]
    done = subprocess.run(
        [sys.executable, "-P", "-c", RELOAD, base, str(tmp_path / "adapter"), json.dumps(tokens)],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stderr
    printed = next(line for line in done.stdout.splitlines() if line.startswith("LOGITS"))
    expected = logits_of(trainer.model, tokens)
    torch.testing.assert_close(torch.tensor(json.loads(printed.removeprefix("LOGITS"))), expected)


@pytest.mark.step("resume equals uninterrupted", host="SFTTrainer")
def test_resuming_equals_an_uninterrupted_run(method, train, losses, tmp_path):
    whole = train(method, save_strategy="steps", save_steps=2, output_dir=str(tmp_path / "whole"))
    resumed = train(method, resume=str(tmp_path / "whole/checkpoint-2"), output_dir=str(tmp_path / "resumed"))
    assert resumed.state.log_history[0]["ndlora/default/update_norm"] > 0
    assert losses(resumed) == losses(whole)
    for name, tensor in whole.model.state_dict().items():
        assert torch.equal(resumed.model.state_dict()[name], tensor), name


@pytest.mark.step("added chat tokens", host="SFTTrainer")
def test_added_chat_tokens_train_and_are_saved(method, train, base, tokenizer, losses, model, tmp_path):
    from peft import PeftModel

    tokenizer.add_tokens(["<|turn|>", "<|over|>"], special_tokens=True)
    tokenizer.chat_template = tokenizer.chat_template.replace("user: ", "<|turn|> user: ")
    tokenizer.save_pretrained(tmp_path / "other")
    trainer = train(method, "messages", chat_template_path=str(tmp_path / "other"))
    assert losses(trainer)[-1] < losses(trainer)[0]
    trainer.save_model(tmp_path / "adapter")
    torch.manual_seed(99)
    model.resize_token_embeddings(len(trainer.processing_class))
    reloaded = PeftModel.from_pretrained(model, tmp_path / "adapter")
    tokens = [5, 20, trainer.processing_class.convert_tokens_to_ids("<|turn|>"), 47]
    torch.testing.assert_close(logits_of(reloaded, tokens), logits_of(trainer.model, tokens))


def test_the_example(base, tmp_path):
    data = tmp_path / "data.jsonl"
    lines = [{"prompt": f"{k} and two is", "completion": f" {k + 2}."} for k in range(40)]
    data.write_text("\n".join(map(json.dumps, lines)))
    main = runpy.run_path(str(EXAMPLES / "trl_sft.py"))["main"]
    before, after, model = main([base, str(data), "--steps", "20", "--output", str(tmp_path / "adapter")])
    assert after < before and model.peft_config["default"].peft_type == "NDLORA"
