"""Which run comes next: a function of the runs that are done, so a killed queue goes on where it stopped."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from benchmarks.quality.runs import Run
from benchmarks.quality.settings import GRID, Setting

__all__ = ["SEEDS", "best_rate", "missing", "of_setting"]

SEEDS = (0, 1, 2)  # the sweep runs at the first


def of_setting(results: Iterable[dict[str, Any]], setting: str) -> list[dict[str, Any]]:
    """The results of one setting."""
    return [result for result in results if result["setting"]["name"] == setting]


def best_rate(results: Sequence[dict[str, Any]]) -> float | None:
    """The learning rate with the lowest held-out loss at the sweep's seed; None if every run diverged."""
    swept = [
        (result["held_out_loss"], result["learning_rate"])
        for result in results
        if result["seed"] == SEEDS[0] and result["held_out_loss"] is not None
    ]
    return min(swept)[1] if swept else None


def missing(setting: Setting, results: Sequence[dict[str, Any]], seeds: Sequence[int] = SEEDS) -> list[Run]:
    """The runs of one setting that are known to be missing; after them there may be more.

    First the sweep's four rates; then one rate beyond while the best is at an edge; then the other seeds at the best.
    Of a setting with two rates: these, then one other seed at the better.

    Args:
        results: of this setting.
        seeds: the first is the sweep's.
    """
    done = {(result["learning_rate"], result["seed"]) for result in results}
    swept = sorted({rate for rate, seed in done if seed == SEEDS[0]})
    first = [rate for rate in setting.first_rates if rate not in swept]
    if first:
        return [Run(setting, rate, SEEDS[0]) for rate in first]
    best = best_rate(results)
    if setting.tried == 2:
        return [] if best is None or (best, seeds[1]) in done else [Run(setting, best, seeds[1])]
    if best is None or best == swept[0]:
        beyond = GRID.index(swept[0]) - 1
    elif best == swept[-1]:
        beyond = GRID.index(best) + 1
    else:
        return [Run(setting, best, seed) for seed in seeds[1:] if (best, seed) not in done]
    return [Run(setting, GRID[beyond], SEEDS[0])] if 0 <= beyond < len(GRID) else []
