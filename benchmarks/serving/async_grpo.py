"""A few steps of TRL's AsyncGRPO against a vLLM server on the CPU, which gets the adapter as LoRA at every step.

`python -m benchmarks.serving.async_grpo .envs/vllm/bin/python` ends with what `ndlora verify` says of the policies that
the server has. TRL's trainer is made for CUDA: `on_cpu` stands in for three things.
"""

from __future__ import annotations

import tempfile
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Annotated, Any

import torch
import typer
from datasets import Dataset
from torch import Tensor, nn
from transformers import AutoTokenizer

from benchmarks.serving.__main__ import running
from benchmarks.serving.servers import SERVERS, Started
from ndlora_demo import finetune
from ndlora_demo.problems import generate
from ndlora_plugins import NdLoraConfig
from ndlora_plugins.integrations.peft.exports.export import export_adapter
from ndlora_plugins.integrations.serving.verify import verify_server
from ndlora_plugins.integrations.trl import sync_as_lora


def main(
    python: Annotated[Path, typer.Argument(help="The interpreter of vLLM's environment.")],
    steps: Annotated[int, typer.Option(help="Of the optimizer, each followed by a sync.")] = 3,
) -> None:
    """Train, and ask the server whether it serves what was trained."""
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        model, tokenizer, _ = finetune.load_model(None)
        for part in (model, tokenizer):
            part.save_pretrained(folder / "base")
        server = replace(SERVERS["vllm"], command=_for_training)
        with running(server, python.absolute(), folder / "base", [], folder) as url:
            trainer = train(folder, url.removesuffix("/v1"), steps)
            trainer.model.save_pretrained(folder / "adapter")
            base = str(folder / "base")
            export_adapter(folder / "adapter", folder / "lora", base=base, self_test=True)
            for version in (trainer.model_version - 1, trainer.model_version):
                name = f"trl-policy-v{version}"
                print(f"{name}: {verify_server(folder / 'lora', url, name, timeout=600)}")


def train(folder: Path, url: str, steps: int) -> Any:
    """The trainer after its steps."""
    from trl.chat_template_utils import qwen2_5_chat_template
    from trl.experimental.async_grpo import AsyncGRPOConfig, AsyncGRPOTrainer

    on_cpu()
    sync_as_lora()
    tokenizer = AutoTokenizer.from_pretrained(folder / "base")
    tokenizer.chat_template = qwen2_5_chat_template  # one whose answers TRL knows how to read
    problems = [{"prompt": [{"role": "user", "content": problem.question}]} for problem in generate(64, 0)]
    arguments = AsyncGRPOConfig(
        str(folder / "out"), vllm_server_base_url=url, max_steps=steps, num_generations=4, max_completion_length=12,
        per_device_train_batch_size=4, gradient_accumulation_steps=1, max_staleness=1, max_inflight_tasks=8,
        learning_rate=1e-3, use_cpu=True, bf16=False, gradient_checkpointing=False, report_to="none",
        save_strategy="no",
    )  # fmt: skip
    trainer = AsyncGRPOTrainer(
        str(folder / "base"),
        reward_funcs=digits,
        train_dataset=Dataset.from_list(problems),
        args=arguments,
        processing_class=tokenizer,
        peft_config=NdLoraConfig(task_type="CAUSAL_LM"),
    )
    trainer.train()
    return trainer


def digits(completions: list[Any], **others: Any) -> list[float]:
    """The share of an answer that is digits: a reward that differs between answers."""
    texts = [completion[-1]["content"] for completion in completions]
    return [sum(map(str.isdigit, text)) / max(len(text), 1) for text in texts]


def on_cpu() -> None:
    """Stand in for TRL's FlashAttention kernel, its look at the GPU, and its check that vLLM is in this environment."""
    from trl.experimental.async_grpo import async_grpo_trainer, async_rollout_worker, packing

    packing._flash_attn = lambda: SimpleNamespace(flash_attn_varlen_func=attention)
    async_grpo_trainer.get_peak_flops_per_device = lambda *arguments: None
    async_rollout_worker.is_vllm_available = lambda: True


def attention(
    query: Tensor, key: Tensor, value: Tensor, starts: Tensor, key_starts: Tensor, *longest: int, softmax_scale: float,
    **others: Any,
) -> Tensor:  # fmt: skip
    """Causal attention of sequences laid end to end, (tokens, heads, size); a query's sequence may begin earlier."""
    parts = []
    for k in range(len(starts) - 1):
        own, past = slice(starts[k], starts[k + 1]), slice(key_starts[k], key_starts[k + 1])
        q, *kv = (x[which].transpose(0, 1) for x, which in ((query, own), (key, past), (value, past)))
        seen = torch.ones(q.shape[1], kv[0].shape[1], dtype=torch.bool).tril(kv[0].shape[1] - q.shape[1])
        part = nn.functional.scaled_dot_product_attention(
            q, *kv, attn_mask=seen, scale=softmax_scale, enable_gqa=True
        )
        parts.append(part.transpose(0, 1))
    return torch.cat(parts)


def _for_training(python: Path, base: Path, adapters: list[Path], port: int, folder: Path) -> Started:
    command, settings = SERVERS["vllm"].command(python, base, [base], port, folder)
    command = command[: command.index("--lora-modules")]  # none at the start
    command[command.index("--max-loras") + 1] = "3"  # TRL: max_staleness + 2
    return command, {**settings, "VLLM_SERVER_DEV_MODE": "1"}


if __name__ == "__main__":
    typer.run(main)
