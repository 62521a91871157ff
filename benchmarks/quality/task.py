"""What is learned: a model, of which the last blocks are adapted, and problems with worked answers."""

from __future__ import annotations

import copy
import json
import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from ndlora_demo import finetune
from ndlora_demo.problems import Problem, generate
from ndlora_plugins.errors import NdLoraValueError

__all__ = ["TASKS", "LastBlocks", "Task", "bench_for", "load_problems"]


@dataclass(frozen=True)
class Task:
    """One training task, small enough for one CPU core.

    Attributes:
        name: of its folder among the results.
        blocks: how many of the last blocks are adapted; what lies below them is computed once. 0: all.
        max_tokens: longer problems are left out.
        lines_held_out: how many of the file's last lines are kept from training.
        held_out: how many of those, the first that are short enough, the evaluation takes.
        steps, batch_size: of one run; a problem is seen at most once.
        curve: on how many held-out problems the loss is followed, every `curve_every` steps.
        exact: on how many held-out problems answers are generated at the end; 0: none.
    """

    name: str
    blocks: int = 6
    max_tokens: int = 160
    lines_held_out: int = 319
    held_out: int = 64
    steps: int = 40
    batch_size: int = 4
    curve: int = 16
    curve_every: int = 8
    exact: int = 0


TASKS = {
    "gsm8k": Task("gsm8k"),
    "gsm8k-long": Task("gsm8k-long", blocks=0, max_tokens=200, held_out=112, steps=120, curve_every=40),
    "arithmetic": Task("arithmetic", exact=64),
}


def load_problems(task: Task, data: Path | None, tokenizer: Any) -> tuple[list[Problem], list[Problem]]:
    """(to train on, held out), none longer than the task allows.

    Args:
        data: JSONL with "question" and "answer" (finetune's form); needed unless the task is "arithmetic".

    Raises:
        NdLoraValueError: no data, lines of another form, or too few problems.
    """
    wanted = task.steps * task.batch_size
    if task.name == "arithmetic":
        training, held_out = generate(2 * wanted, 0), generate(task.held_out, 0, held_out=True)
    elif data is None:
        raise NdLoraValueError(f"task {task.name!r} needs its problems: give a JSONL file with --data.")
    else:
        problems = [
            _problem(data, number, line) for number, line in enumerate(data.open(encoding="utf-8"), start=1)
        ]
        training, held_out = problems[: -task.lines_held_out], problems[-task.lines_held_out :]

    def short(problem: Problem) -> bool:
        return sum(map(len, finetune.encode(tokenizer, problem))) <= task.max_tokens

    training, held_out = list(filter(short, training)), list(filter(short, held_out))[: task.held_out]
    if len(training) < wanted or len(held_out) < task.held_out:
        raise NdLoraValueError(
            f"{data or task.name}: {len(training)} problems to train on and {len(held_out)} held out have at most "
            f"{task.max_tokens} tokens; {wanted} and {task.held_out} are needed."
        )
    return training, held_out


def _problem(data: Path, number: int, line: str) -> Problem:
    try:
        record = json.loads(line)
        return Problem(record["question"].strip(), record["answer"].strip())
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise NdLoraValueError(
            f'{data}, line {number}: expected a JSON object with the texts "question" and "answer".'
        ) from error


def bench_for(task: Task, bench: finetune.Bench, training: Sequence[Problem], seed: int) -> finetune.Bench:
    """The bench with this seed's batches: the same for every setting."""
    wanted = task.steps * task.batch_size
    drawn = random.Random(seed).sample(list(training), wanted)
    batches = [
        finetune.batch_of(bench.tokenizer, drawn[start : start + task.batch_size])
        for start in range(0, wanted, task.batch_size)
    ]
    return replace(bench, batches=batches)


class LastBlocks:
    """The last blocks of a model as a model of its own, which shares their modules.

    Where the embedding was stands a memory of what the frozen blocks below make of each problem, so that
    they run once for all runs. An adapter on `model` is an adapter on `whole`.

    Attributes:
        whole, model: the model, and its last blocks. They are the same where `blocks` is 0.
    """

    def __init__(self, whole: torch.nn.Module, blocks: int):
        self.whole, self.blocks = whole, blocks
        if blocks == 0:
            self.model = whole
            return
        layers = whole.get_decoder().layers
        config = copy.deepcopy(whole.config)
        config.num_hidden_layers, config.use_cache = blocks, False
        if getattr(config, "layer_types", None) is not None:
            config.layer_types = config.layer_types[-blocks:]
        with torch.device("meta"):
            self.model = type(whole)(config)
        decoder = self.model.get_decoder()
        for name, module in whole.get_decoder().named_children():
            setattr(decoder, name, module)
        decoder.layers = layers[len(layers) - blocks :]
        decoder.embed_tokens = self._memory = _Memory(whole.config.pad_token_id)
        self.model.set_output_embeddings(whole.get_output_embeddings())
        self.model.eval()

    def remember(self, tokenizer: Any, problems: Sequence[Problem], cache: Path | None = None) -> None:
        """Run the lower blocks on all problems, or read what they gave from `cache`, a safetensors file.

        Raises:
            NdLoraValueError: the model's last blocks alone do not give its loss.
        """
        if self.blocks == 0:
            return
        self._memory.pad = tokenizer.pad_token_id
        if cache is not None and cache.exists():
            self._memory.load(cache)
        lower = len(self.whole.get_decoder().layers) - self.blocks
        missing = sorted(
            (
                problem
                for problem in problems
                if self._memory.key(tokenizer, problem) not in self._memory.states
            ),
            key=lambda problem: len(problem.question),
        )
        for start in range(0, len(missing), 8):
            batch = finetune.batch_of(tokenizer, missing[start : start + 8])
            inputs = {name: value for name, value in batch.items() if name != "labels"}
            with torch.inference_mode():
                hidden = self.whole.get_decoder()(**inputs, output_hidden_states=True).hidden_states[lower]
            for row, mask, state in zip(batch["input_ids"], batch["attention_mask"], hidden, strict=True):
                self._memory.states[tuple(row[mask.bool()].tolist())] = state[mask.bool()].clone()
        if missing and cache is not None:
            self._memory.save(cache)
        self._check(tokenizer, problems[:2])

    @torch.inference_mode()
    def _check(self, tokenizer: Any, problems: Sequence[Problem]) -> None:
        batch = finetune.batch_of(tokenizer, problems)
        bench = finetune.Bench("", self.whole, tokenizer, [], [], 0, 0)
        losses = [finetune.loss(bench, model, batch).item() for model in (self.whole, self.model)]
        if not abs(losses[0] - losses[1]) <= 1e-3 * losses[0]:
            raise NdLoraValueError(
                f"the last {self.blocks} blocks alone give the loss {losses[1]:.4f}, the whole model "
                f"{losses[0]:.4f}: this model does more between its embedding and its blocks. Use --blocks 0."
            )


class _Memory(torch.nn.Module):
    """(rows, tokens) of token ids, padded on the left, to the hidden states that were remembered for each row."""

    def __init__(self, pad: int | None):
        super().__init__()
        self.pad = pad
        self.states: dict[tuple[int, ...], Tensor] = {}

    @staticmethod
    def key(tokenizer: Any, problem: Problem) -> tuple[int, ...]:
        question, answer = finetune.encode(tokenizer, problem)
        return (*question, *answer)

    def forward(self, input_ids: Tensor) -> Tensor:
        rows = []
        for row in input_ids.tolist():
            padding = next(index for index, token in enumerate(row) if token != self.pad)
            rows.append(torch.nn.functional.pad(self.states[tuple(row[padding:])], (0, 0, padding, 0)))
        return torch.stack(rows)

    def save(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        tensors = {
            "lengths": torch.tensor([len(key) for key in self.states]),
            "tokens": torch.tensor([token for key in self.states for token in key]),
            "states": torch.cat(list(self.states.values())),
        }
        save_file(tensors, path)

    def load(self, path: Path) -> None:
        tensors = load_file(path)
        lengths = tensors["lengths"].tolist()
        for tokens, states in zip(
            tensors["tokens"].split(lengths), tensors["states"].split(lengths), strict=True
        ):
            self.states[tuple(tokens.tolist())] = states
