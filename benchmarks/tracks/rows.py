"""What the lines of a track's results say of each setting, at its best learning rate."""

from __future__ import annotations

import statistics
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from benchmarks.common import standard_error
from benchmarks.tracks import sweep

__all__ = ["BASELINE", "BUDGETS", "NOTHING", "Row", "best_within", "difference", "rows"]

BASELINE, NOTHING = "LoRA r=8", "head alone"
_MEASURES = ("held_out_score", "transfer_loss", "forgetting", "reward_first", "reward_last")
BUDGETS = (128, 64, 32, 16, 8, 4)  # one of so many parts of the baseline's parameters


@dataclass(frozen=True)
class Row:
    """One setting at its best learning rate; the measures have one value a seed.

    Attributes:
        at_edge: the best rate is the lowest or highest that was tried.
    """

    setting: str
    peft_type: str
    options: dict[str, Any]
    parameters: int
    learning_rate: float
    at_edge: bool
    losses: dict[int, float]
    validation: dict[int, float]
    measures: dict[str, dict[int, float]]

    @property
    def ours(self) -> bool:
        return self.peft_type == "NDLORA"

    @property
    def loss(self) -> float:
        return statistics.mean(self.losses.values())

    @property
    def error(self) -> float | None:
        return standard_error(list(self.losses.values()))

    def mean(self, measure: str) -> float | None:
        """Of a measure over the seeds; None where the track has none."""
        found = self.measures.get(measure)
        return statistics.mean(found.values()) if found else None


def rows(results: Sequence[dict[str, Any]], seeds: Collection[int] = sweep.SEEDS) -> list[Row]:
    """A row for each setting whose sweep and seeds are done, by number of parameters.

    Args:
        seeds: those that must be done.
    """
    found = []
    for name in dict.fromkeys(result["setting"]["name"] for result in results):
        own = sweep.of_setting(results, name)
        best = sweep.best_rate(own)
        runs = [r for r in own if r["learning_rate"] == best and r["held_out_loss"] is not None]
        rates = sorted({result["learning_rate"] for result in own if result["seed"] == sweep.SEEDS[0]})
        edge = best in (rates[0], rates[-1]) and name != NOTHING
        if best is None or not set(seeds) <= {r["seed"] for r in runs}:
            continue
        found.append(
            Row(
                setting=name,
                peft_type=runs[0]["setting"]["peft_type"],
                options=runs[0]["setting"]["options"],
                parameters=runs[0]["parameters"],
                learning_rate=best,
                at_edge=edge,
                losses={r["seed"]: r["held_out_loss"] for r in runs},
                validation={r["seed"]: r["validation_loss"] for r in runs},
                measures={
                    measure: {r["seed"]: r[measure] for r in runs}
                    for measure in _MEASURES
                    if measure in runs[0]
                },
            )
        )
    return sorted(found, key=lambda row: (row.parameters, row.setting))


def difference(row: Row, other: Row, measure: str | None = None) -> tuple[float, float | None]:
    """Mean and standard error of the row's value less the other's, seed by seed: both saw the same data in turn."""
    left, right = (r.losses if measure is None else r.measures[measure] for r in (row, other))
    differences = [left[seed] - right[seed] for seed in left if seed in right]
    return statistics.mean(differences), standard_error(differences)


def best_within(found: Iterable[Row], parameters: float) -> Row | None:
    """The row with the lowest validation loss, the mean over the seeds, of those with at most so many parameters."""
    fit = [row for row in found if 0 < row.parameters <= parameters]
    return min(fit, key=lambda row: statistics.mean(row.validation.values()), default=None)
