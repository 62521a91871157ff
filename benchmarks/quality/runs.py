"""One run: one setting, one learning rate, one seed; what it gave, as a line of the results."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from typing import Any

import torch
from peft import get_peft_model

from benchmarks.common import begin_peak, peak_memory
from benchmarks.quality.settings import peft_config
from benchmarks.quality.task import LastBlocks, Task
from benchmarks.runs import Run, make_result, measure_if_read, rounded
from ndlora_demo import finetune

__all__ = ["describe", "run"]


class _Diverged(Exception):
    pass


def describe(task: Task, model: str) -> dict[str, Any]:
    """What was trained, as every line of the results has it."""
    return {**asdict(task), "model": model}


def run(
    wanted: Run, task: Task, bench: finetune.Bench, blocks: LastBlocks, on_step: Callable[[int, float], None]
) -> dict[str, Any]:
    """Attach the adapter, train, evaluate, and take it off again.

    Args:
        bench: `bench.model` is `blocks.model`, its batches are the seed's.
        on_step: called with each step (from 1) and its training loss.

    Returns:
        A line of the results. `held_out_loss` is None if the training diverged.
    """
    followed = replace(bench, held_out=bench.held_out[: task.curve])
    weights = {name: value.clone() for name, value in bench.model.get_decoder().layers.state_dict().items()}
    torch.manual_seed(wanted.seed)
    begin_peak(bench.model.device)
    config = peft_config(wanted.setting)
    measure_if_read(
        bench.model, config, lambda batch: finetune.loss(bench, bench.model, batch), bench.batches
    )
    model = get_peft_model(bench.model, config).eval()
    curve = [(0, finetune.held_out_loss(followed, model))]
    losses: list[float] = []
    seconds: list[float] = []
    started = time.perf_counter()

    def after_step(loss: float) -> None:
        nonlocal started
        seconds.append(time.perf_counter() - started)
        losses.append(loss)
        on_step(len(losses), loss)
        if not math.isfinite(loss):
            raise _Diverged
        if len(losses) % task.curve_every == 0:
            curve.append((len(losses), finetune.held_out_loss(followed, model)))
        started = time.perf_counter()

    held_out = exact = None
    try:
        finetune.train(bench, model, wanted.learning_rate, after_step)
        held_out = finetune.held_out_loss(bench, model)
        if task.exact:
            exact = finetune.exact_match(replace(bench, model=blocks.whole), blocks.whole)
    except _Diverged:
        model.zero_grad(set_to_none=True)
    parameters = sum(p.numel() for p in model.parameters() if p.requires_grad)
    peak = peak_memory(bench.model.device)
    # PiSSA writes the base weight, and `unload` leaves it so
    model.unload().get_decoder().layers.load_state_dict(weights)
    found = {
        "held_out_loss": rounded(held_out),
        "exact_match": rounded(exact),
        "curve": [[step, rounded(loss)] for step, loss in curve],
        "training_losses": [rounded(loss) for loss in losses],
        "seconds_a_step": rounded(statistics.median(seconds)),
        "peak_memory_bytes": peak,
    }
    return make_result(task.name, describe(task, bench.name), wanted, parameters, found)
