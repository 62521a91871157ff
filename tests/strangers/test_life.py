"""Each stranger's method through its whole life: train, save, load in a fresh process, check, merge, export."""

import json
import pathlib
import subprocess
import sys

import pytest
import torch
from peft import PeftModel, get_peft_model
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

from ndlora_plugins import NdLoraConfig
from ndlora_plugins.integrations.peft import measure_gradients
from ndlora_plugins.integrations.peft.adapters.check import check_adapter
from ndlora_plugins.integrations.peft.exports.export import export_adapter
from ndlora_plugins.integrations.trl import NdLoraCallback

FOLDER = pathlib.Path(__file__).parent
# file -> options of the configuration
STRANGERS = {
    "lora_xs": {},
    "dylora": {},
    "shared_sides": {"target_modules": ["q_proj", "o_proj"]},
    "lora_sb": {},
    "group_penalty": {},
}
LEARNING_RATE = {"lora_xs": 0.5, "lora_sb": 0.5}
# a fork for each: the process has the imports done, and knows of no stranger
FRESH_PROCESS = """
import importlib.util, json, os, sys, torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM
from ndlora_plugins import register_plugin
for path, base, adapter, expected in json.loads(sys.argv[1]):
    if child := os.fork():
        assert os.waitpid(child, 0)[1] == 0, path
        continue
    spec = importlib.util.spec_from_file_location("stranger", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    register_plugin(module, name="stranger")
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), adapter).eval()
    found = model(torch.arange(20).view(2, 10)).logits
    torch.testing.assert_close(found, load_file(expected)["logits"], rtol=1e-5, atol=1e-5)
    break
"""


@pytest.fixture
def adapted(stranger, make_llama, tokens, tmp_path):
    """A function: a stranger's name -> the base model of `tmp_path` with an adapter of its method."""
    make_llama().save_pretrained(tmp_path / "base")

    def make(name):
        module = stranger(name)
        base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
        config = NdLoraConfig(method=module.method.name, r=4, task_type="CAUSAL_LM", **STRANGERS[name])
        measure_gradients(base, config, lambda: base(tokens, labels=tokens).loss.backward())
        start = base(tokens).logits
        model = get_peft_model(base, config)
        torch.testing.assert_close(model.eval()(tokens).logits, start, rtol=1e-5, atol=1e-5)
        return model

    return make


def test_each_loads_in_a_fresh_process(adapted, tokens, shake, tmp_path):
    paths = []
    for name in STRANGERS:
        model = shake(adapted(name)).eval()
        model.save_pretrained(tmp_path / name)
        save_file({"logits": model(tokens).logits.detach()}, tmp_path / name / "logits")
        paths.append([str(FOLDER / f"{name}.py"), str(tmp_path / "base"), str(tmp_path / name)])
        paths[-1].append(str(tmp_path / name / "logits"))
    subprocess.run([sys.executable, "-P", "-c", FRESH_PROCESS, json.dumps(paths)], check=True)


@pytest.mark.slow
@pytest.mark.parametrize("name", STRANGERS)
def test_a_whole_life(name, adapted, tokens, tmp_path):
    model = adapted(name)
    arguments = TrainingArguments(
        tmp_path / "training",
        max_steps=8,
        learning_rate=LEARNING_RATE.get(name, 2e-2),
        per_device_train_batch_size=2,
        logging_steps=1,
        report_to="none",
        save_strategy="no",
        use_cpu=True,
    )
    rows = [{"input_ids": row, "labels": row} for row in tokens.repeat(4, 1)]
    trainer = Trainer(model, arguments, train_dataset=rows, callbacks=[NdLoraCallback()])
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[-1] < losses[0]

    logits = model.eval()(tokens).logits.detach()
    model.save_pretrained(tmp_path / "adapter")
    report = check_adapter(tmp_path / "adapter", str(tmp_path / "base"))
    assert report.ok, report.problems
    export_adapter(tmp_path / "adapter", tmp_path / "merged", "merged", base=str(tmp_path / "base"))
    export_adapter(tmp_path / "adapter", tmp_path / "lora", "lora", base=str(tmp_path / "base"))
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    exported = PeftModel.from_pretrained(again, tmp_path / "lora").eval()(tokens).logits
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval()(tokens).logits
    unloaded = model.merge_and_unload()(tokens).logits
    for found in (exported, merged, unloaded):
        torch.testing.assert_close(found, logits, rtol=1e-3, atol=1e-4)
