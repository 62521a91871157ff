"""One run: one setting, one learning rate, one seed; what it gave, as JSON."""

from __future__ import annotations

import json
import math
import platform
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from peft import get_peft_model

from benchmarks.common import begin_peak, peak_memory
from benchmarks.quality.settings import Setting, peft_config
from benchmarks.quality.task import LastBlocks, Task
from ndlora_demo import finetune

__all__ = ["Run", "describe", "path_of", "read_results", "run"]

_PACKAGES = ("ndlora-plugins", "torch", "peft", "transformers")


@dataclass(frozen=True)
class Run:
    """What identifies a run of a task."""

    setting: Setting
    learning_rate: float
    seed: int


class _Diverged(Exception):
    pass


def path_of(results: Path, task: Task, run: Run) -> Path:
    """Where the run's JSON lies."""
    return results / task.name / run.setting.name / f"lr{run.learning_rate:g}-seed{run.seed}.json"


def describe(task: Task, model: str) -> dict[str, Any]:
    """What was trained, as every run's JSON has it."""
    return {**asdict(task), "model": model}


def read_results(folder: Path) -> list[dict[str, Any]]:
    """Every run that is done in one task's folder, in the order of the files' names."""
    return [json.loads(path.read_text()) for path in sorted(folder.glob("*/*.json"))]


def run(
    wanted: Run, task: Task, bench: finetune.Bench, blocks: LastBlocks, on_step: Callable[[int, float], None]
) -> dict[str, Any]:
    """Attach the adapter, train, evaluate, and take it off again.

    Args:
        bench: `bench.model` is `blocks.model`, its batches are the seed's.
        on_step: called with each step (from 1) and its training loss.

    Returns:
        What the JSON holds. `held_out_loss` is None if the training diverged.
    """
    followed = replace(bench, held_out=bench.held_out[: task.curve])
    weights = {name: value.clone() for name, value in bench.model.get_decoder().layers.state_dict().items()}
    torch.manual_seed(wanted.seed)
    begin_peak(bench.model.device)
    model = get_peft_model(bench.model, peft_config(wanted.setting)).eval()
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
    return {
        "task": describe(task, bench.name),
        "setting": {key: getattr(wanted.setting, key) for key in ("name", "peft_type", "options")},
        "learning_rate": wanted.learning_rate,
        "seed": wanted.seed,
        "parameters": parameters,
        "held_out_loss": _rounded(held_out),
        "exact_match": _rounded(exact),
        "curve": [[step, _rounded(loss)] for step, loss in curve],
        "training_losses": [_rounded(loss) for loss in losses],
        "seconds_a_step": _rounded(statistics.median(seconds)),
        "peak_memory_bytes": peak,
        "versions": {name: version(name) for name in _PACKAGES} | {"python": platform.python_version()},
    }


def _rounded(value: float | None) -> float | None:
    return round(value, 5) if value is not None and math.isfinite(value) else None
