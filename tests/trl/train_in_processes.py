"""Started by test_two_processes.py: every method through two trainers and by hand under FSDP2, in a process alone and
in two together, with the same global batch. They are forks of this one, which has done the imports, with the
environment that torchrun and `accelerate launch` give. Writes losses and adapters.
"""

import json
import os
import socket
import sys
from pathlib import Path

import torch
from accelerate import PartialState
from datasets import Dataset
from peft import get_peft_model
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments
from trl import SFTConfig, SFTTrainer

from ndlora_plugins import NdLoraConfig
from ndlora_plugins.integrations.trl import NdLoraCallback

GLOBAL_BATCH, STEPS, RATE = 4, 4, 1e-2


def arguments(kind, output, world):
    return kind(
        output_dir=str(output),
        max_steps=STEPS,
        per_device_train_batch_size=GLOBAL_BATCH // world,
        learning_rate=RATE,
        adam_epsilon=1e-3,  # else a gradient of almost zero is blown up to a step as large as any
        logging_steps=1,
        logging_nan_inf_filter=False,
        save_strategy="no",
        report_to="none",
        bf16=False,
        use_cpu=True,
        disable_tqdm=True,
        seed=3,
    )


def with_sft_trainer(base, rows, config, output, world):
    texts = Dataset.from_list([{"input_ids": row} for row in rows])
    trainer = SFTTrainer(
        base, arguments(SFTConfig, output, world), train_dataset=texts, peft_config=config,
        callbacks=[NdLoraCallback()],
    )  # fmt: skip
    return finish(trainer, output)


def with_trainer(base, rows, config, output, world):
    data = [{"input_ids": row, "labels": row} for row in rows]
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), config)
    trainer = Trainer(
        model, arguments(TrainingArguments, output, world), train_dataset=data, callbacks=[NdLoraCallback()]
    )
    return finish(trainer, output)


def finish(trainer, output):
    trainer.train()
    trainer.save_model(str(output))
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def by_hand(base, rows, config, output, world):
    """FSDP2: each decoder layer sharded over the processes. accelerate does it on accelerators only."""
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
    from torch.distributed.fsdp import fully_shard

    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), config)
    if world > 1:
        mesh = torch.distributed.init_device_mesh("cpu", (world,))
        for layer in model.base_model.model.model.layers:
            fully_shard(layer, mesh=mesh)
        fully_shard(model, mesh=mesh)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=RATE, eps=1e-3)
    losses = []
    for step in range(STEPS):
        start = step * GLOBAL_BATCH % len(rows)
        batch = torch.tensor(rows[start : start + GLOBAL_BATCH][PartialState().process_index :: world])
        loss = model(input_ids=batch, labels=batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        loss = loss.detach()
        if world > 1:
            torch.distributed.all_reduce(loss, torch.distributed.ReduceOp.AVG)
        losses.append(loss.item())
    whole = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True))
    model.save_pretrained(output, state_dict=whole, is_main_process=PartialState().is_main_process)
    return losses


WAYS = {"SFTTrainer": with_sft_trainer, "Trainer": with_trainer, "FSDP2 by hand": by_hand}


def main(base, output, methods):
    world = PartialState(cpu=True).num_processes
    generator = torch.Generator().manual_seed(0)
    rows = torch.randint(5, 60, (8, 16), generator=generator).tolist()
    report = {"processes": world, "losses": {}}
    for way, train in WAYS.items():
        for name, options in json.loads(methods).items():
            config = NdLoraConfig(
                task_type="CAUSAL_LM", target_modules="all-linear", random_seed=1, **options
            )
            directory = Path(output, way, name)
            report["losses"][f"{way}, {name}"] = train(base, rows, config, directory, world)
    if PartialState().is_main_process:
        Path(output, "report.json").write_text(json.dumps(report))
    PartialState().wait_for_everyone()
    PartialState().destroy_process_group()


def start(rank, world, port):
    """Be one of so many processes."""
    where = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "RANK": rank, "LOCAL_RANK": rank}
    os.environ |= {name: str(value) for name, value in where.items()}
    os.environ |= {"WORLD_SIZE": str(world), "LOCAL_WORLD_SIZE": str(world)}


if __name__ == "__main__":
    base, output, methods = sys.argv[1:]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    children = []
    for name, rank, world in (("one", 0, 1), ("two", 0, 2), ("two", 1, 2)):
        child = os.fork()
        if not child:
            if world > 1:
                start(rank, world, port)
            main(base, Path(output, name), methods)
            sys.exit()
        children.append(child)
    sys.exit(any([os.waitpid(child, 0)[1] for child in children]))
