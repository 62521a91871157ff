"""What the processes run that are killed: a training, an export, and what both need."""

from __future__ import annotations

import os
import resource
import sys
from pathlib import Path

# method -> NdLoraConfig's arguments, NdLoraCallback's
METHODS = {
    "ndlinear": ({"method": "ndlinear", "r": 2}, {}),
    "slora": ({"method": "slora", "r": 4}, {"core_only_at": 0.5}),
    "nlora": ({"method": "nlora", "r": 4}, {"core_only_at": 0.5}),
    "inttune": ({"method": "inttune", "r": 8}, {}),
}
TRAINERS = ("Trainer", "SFTTrainer")
STEPS, SAVE_EVERY = 12, 2
EXPORTS = ("merged", "lora")
ADAPTERS = {"first": {"method": "slora", "r": 8}, "second": {"method": "slora", "r": 4}}


def train(base: str, output: str, method: str, trainer: str, resume: str | None) -> None:
    """Train a tiny model to its end and save the adapter in `output`/adapter."""
    import torch
    from datasets import Dataset
    from peft import get_peft_model
    from transformers import AutoModelForCausalLM, Trainer, TrainingArguments
    from trl import SFTConfig, SFTTrainer

    from ndlora_plugins import NdLoraConfig
    from ndlora_plugins.integrations.trl import NdLoraCallback

    options, watched = METHODS[method]
    generator = torch.Generator().manual_seed(0)
    rows = [
        {"input_ids": row, "labels": row}
        for row in torch.randint(5, 250, (16, 24), generator=generator).tolist()
    ]
    # dropout and the order of the data: what a training that goes on has to draw as the undisturbed one did
    config = NdLoraConfig(
        task_type="CAUSAL_LM", target_modules="all-linear", lora_dropout=0.1, random_seed=1, **options
    )
    kind = TrainingArguments if trainer == "Trainer" else SFTConfig
    arguments = kind(
        output_dir=output,
        max_steps=STEPS,
        save_steps=SAVE_EVERY,
        per_device_train_batch_size=4,
        learning_rate=1e-2,
        logging_steps=1,
        report_to="none",
        bf16=False,
        use_cpu=True,
        gradient_checkpointing=False,
        disable_tqdm=True,
        seed=3,
    )
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    callbacks = [NdLoraCallback(**watched)]
    if trainer == "Trainer":
        host = Trainer(get_peft_model(model, config), arguments, train_dataset=rows, callbacks=callbacks)
    else:
        data = Dataset.from_list(rows)
        host = SFTTrainer(model, arguments, train_dataset=data, peft_config=config, callbacks=callbacks)
    host.train(resume_from_checkpoint=resume)
    host.save_model(str(Path(output, "adapter")))


def export(adapter: str, to: str, output: str, largest_file: int | None) -> None:
    """`ndlora export`, with its own exit status; no file may grow beyond `largest_file` bytes."""
    from ndlora_plugins.commands.main import run

    if largest_file is not None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (largest_file, resource.RLIM_INFINITY))
    sys.argv = ["ndlora", "export", adapter, "--to", to, "--output", output]
    run()


def make_inputs(directory: str) -> None:
    """A tiny base model to train, and one of 15 MB in many files with two adapters, as if trained, to export."""
    import torch
    from peft import get_peft_model
    from tokenizers import Tokenizer, models
    from transformers import (
        AutoModelForCausalLM,
        LlamaConfig,
        LlamaForCausalLM,
        PreTrainedTokenizerFast,
    )

    from ndlora_plugins import NdLoraConfig

    torch.manual_seed(0)
    small = {"num_attention_heads": 4, "num_hidden_layers": 2, "vocab_size": 256}
    words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(256)}, unk_token="w0"))
    PreTrainedTokenizerFast(tokenizer_object=words, pad_token="w3", eos_token="w2").save_pretrained(
        f"{directory}/small"
    )
    LlamaForCausalLM(LlamaConfig(hidden_size=32, intermediate_size=48, **small)).save_pretrained(
        f"{directory}/small"
    )
    large = {"num_attention_heads": 4, "num_hidden_layers": 6, "vocab_size": 2000}
    base = f"{directory}/base"
    LlamaForCausalLM(LlamaConfig(hidden_size=256, intermediate_size=512, **large)).save_pretrained(
        base, max_shard_size="1MB"
    )
    for name, options in ADAPTERS.items():
        model = get_peft_model(AutoModelForCausalLM.from_pretrained(base), NdLoraConfig(**options))
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.data += 0.02 * torch.randn_like(parameter)
        model.save_pretrained(f"{directory}/{name}")


def quietly(log: str, job, arguments) -> None:
    """Run `job` with its output in a file."""
    with open(log, "a") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    os.truncate(log, 0)
    job(*arguments)
