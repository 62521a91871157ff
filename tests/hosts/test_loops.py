"""Loops of one's own, Lightning, Ray Train and lm-eval: the examples in miniature, and what their files hold."""

import json
import os
import subprocess
import sys

import pytest
import torch

step = pytest.mark.step
TEXTS = ["Two and two is four.", "Three and two is five.", "Four and two is six.", "Five and two is seven."]


@pytest.fixture(scope="session")
def tiny(save_tiny_model, tmp_path_factory):
    return str(save_tiny_model(tmp_path_factory.mktemp("tiny") / "model", TEXTS))


@step("train, save, load", host="plain loop", method="crossed")
def test_the_plain_loop(tiny, example, tmp_path):
    losses = example("plain_loop").main([tiny, "--steps", "4", "--output", str(tmp_path / "adapter")])
    assert losses[-1] < losses[0]


@step("train, save, load, continue", host="Lightning", method="crossed")
def test_lightning(tiny, example, tmp_path):
    lightning = pytest.importorskip("lightning")
    script = example("lightning_module")
    module, loaded = script.main([tiny, "--steps", "2", "--output", str(tmp_path / "adapter")])
    words = torch.arange(10)[None]
    expected = module.model.eval()(words).logits
    torch.testing.assert_close(loaded.eval()(words).logits, expected)
    checkpoint = torch.load(tmp_path / "adapter.ckpt", weights_only=False)
    assert checkpoint["state_dict"] and all("ndlora" in name for name in checkpoint["state_dict"])
    again = script.AdapterModule.load_from_checkpoint(tmp_path / "adapter.ckpt")
    torch.testing.assert_close(again.model.eval()(words).logits, expected)
    trainer = lightning.Trainer(
        max_steps=3, accelerator="cpu", logger=False, enable_progress_bar=False, enable_checkpointing=False
    )
    rows = torch.utils.data.DataLoader([{"input_ids": torch.arange(8)}] * 4, batch_size=2)
    trainer.fit(script.AdapterModule(tiny), rows, ckpt_path=str(tmp_path / "adapter.ckpt"))
    assert trainer.global_step == 3


@step("train, save", host="Ray Train", method="crossed")
@pytest.mark.slow
def test_ray_train(tiny, tmp_path):
    """One worker; the loop is the plain one."""
    pytest.importorskip("ray.train")
    code = f"""
import ray, sys
from ray.train import ScalingConfig
from ray.train.torch import TorchTrainer
def loop(config):
    from peft import get_peft_model
    import torch
    from transformers import AutoModelForCausalLM
    from peft import PEFT_TYPE_TO_CONFIG_MAPPING
    model = AutoModelForCausalLM.from_pretrained({tiny!r})
    model = get_peft_model(model, PEFT_TYPE_TO_CONFIG_MAPPING["NDLORA"](task_type="CAUSAL_LM"))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    ids = torch.arange(20).view(2, 10)
    for _ in range(2):
        model(ids, labels=ids).loss.backward(); optimizer.step(); optimizer.zero_grad()
    model.save_pretrained({str(tmp_path / "adapter")!r})
ray.init(num_cpus=1, include_dashboard=False)
run = ray.train.RunConfig(storage_path={str(tmp_path / "runs")!r})
TorchTrainer(loop, scaling_config=ScalingConfig(num_workers=1, use_gpu=False), run_config=run).fit()
"""
    environment = {
        **os.environ,
        "RAY_AUTH_MODE": "disabled",
    }  # else it writes a token into the home directory
    subprocess.run([sys.executable, "-P", "-c", code], env=environment, check=True, timeout=300)
    assert (tmp_path / "adapter" / "adapter_model.safetensors").is_file()


TASK = """
task: sums
dataset_path: json
dataset_kwargs: {data_files: {test: DATA}}
output_type: multiple_choice
test_split: test
doc_to_text: "{{question}}"
doc_to_choice: ["four", "five"]
doc_to_target: answer
metric_list: [{metric: acc}]
"""


@step("load", host="lm-eval", method="crossed")
@pytest.mark.slow
def test_lm_eval(tiny, make_llama, shake, tmp_path):
    """`--model_args pretrained=BASE,peft=ADAPTER` as its users write it, with a task of one's own."""
    lm_eval = pytest.importorskip("lm_eval")
    pytest.importorskip("lm_eval.models.huggingface")
    tasks = pytest.importorskip("lm_eval.tasks")
    from peft import get_peft_model
    from transformers import AutoModelForCausalLM

    from ndlora_plugins import NdLoraConfig

    model = get_peft_model(AutoModelForCausalLM.from_pretrained(tiny), NdLoraConfig(task_type="CAUSAL_LM"))
    shake(model, 0.5).save_pretrained(tmp_path / "adapter")
    rows = [{"question": "Two and two is", "answer": 0}, {"question": "Three and two is", "answer": 1}]
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "sums.yaml").write_text(TASK.replace("DATA", str(tmp_path / "data.jsonl")))
    manager = tasks.TaskManager(include_path=str(tmp_path))
    found = {
        name: lm_eval.simple_evaluate(
            model="hf",
            model_args=f"pretrained={tiny},dtype=float32{more}",
            tasks=["sums"],
            task_manager=manager,
            device="cpu",
            log_samples=True,
        )["samples"]["sums"][0]["resps"]
        for name, more in {"base": "", "adapter": f",peft={tmp_path / 'adapter'}"}.items()
    }
    assert found["base"] != found["adapter"]
