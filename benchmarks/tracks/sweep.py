"""Which run comes next: a function of the lines that are there, so a killed queue goes on where it stopped."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from benchmarks.tracks.settings import GRID, SEEDS, Setting
from benchmarks.tracks.track import Run

__all__ = ["SEEDS", "best_rate", "missing", "of_setting", "read_results"]


def read_results(path: Path) -> list[dict[str, Any]]:
    """Every run that is done; a last line that a kill cut short is not one."""
    if not path.exists():
        return []
    return [json.loads(line) for line in path.read_text().splitlines(keepends=True) if line.endswith("}\n")]


def of_setting(results: Iterable[dict[str, Any]], setting: str) -> list[dict[str, Any]]:
    """The results of one setting."""
    return [result for result in results if result["setting"]["name"] == setting]


def best_rate(results: Sequence[dict[str, Any]]) -> float | None:
    """The rate with the lowest validation loss at the sweep's seed; None if every run diverged."""
    swept = [
        (result["validation_loss"], result["learning_rate"])
        for result in results
        if result["seed"] == SEEDS[0] and result["validation_loss"] is not None
    ]
    return min(swept)[1] if swept else None


def missing(setting: Setting, results: Sequence[dict[str, Any]]) -> list[Run]:
    """The runs of one setting that are known to be missing; after them there may be more.

    First the sweep's rates; then one rate beyond while the best is at an edge, unless only two are tried; then the
    other seeds at the best.
    """
    done = {(result["learning_rate"], result["seed"]) for result in results}
    if setting.peft_type == "NONE":
        return [Run(setting, 0.0, seed) for seed in setting.seeds if (0.0, seed) not in done]
    swept = sorted({rate for rate, seed in done if seed == SEEDS[0]})
    first = [rate for rate in setting.first_rates if rate not in swept]
    if first:
        return [Run(setting, rate, SEEDS[0]) for rate in first]
    best = best_rate(results)
    if best is not None and (setting.tried == 2 or swept[0] < best < swept[-1]):
        return [Run(setting, best, seed) for seed in setting.seeds[1:] if (best, seed) not in done]
    beyond = GRID.index(best) + 1 if best == swept[-1] else GRID.index(swept[0]) - 1
    return [Run(setting, GRID[beyond], SEEDS[0])] if 0 <= beyond < len(GRID) else []
