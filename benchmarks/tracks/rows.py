"""What the lines of a track's results say of each setting, at its best learning rate."""

from __future__ import annotations

import statistics
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from benchmarks.rows import Row, common_fields
from benchmarks.runs import of_setting
from benchmarks.tracks.settings import SEEDS

__all__ = ["BASELINE", "BUDGETS", "NOTHING", "TrackRow", "best_within", "rows"]

BASELINE, NOTHING = "LoRA r=8", "head alone"
_MEASURES = ("held_out_score", "transfer_loss", "forgetting", "reward_first", "reward_last")
BUDGETS = (128, 64, 32, 16, 8, 4)  # one of so many parts of the baseline's parameters


@dataclass(frozen=True)
class TrackRow(Row):
    """One setting at its best learning rate; the measures have one value a seed."""

    validation: dict[int, float]
    measures: dict[str, dict[int, float]]

    def mean(self, measure: str) -> float | None:
        """Of a measure over the seeds; None where the track has none."""
        found = self.measures.get(measure)
        return statistics.mean(found.values()) if found else None


def rows(results: Sequence[dict[str, Any]], seeds: Collection[int] = SEEDS) -> list[TrackRow]:
    """A row for each setting whose sweep and seeds are done, by number of parameters.

    Args:
        seeds: those that must be done.
    """
    found = []
    for name in dict.fromkeys(result["setting"]["name"] for result in results):
        common = common_fields(of_setting(results, name))
        if common is None or not set(seeds) <= common[0]["losses"].keys():
            continue
        fields, runs = common
        validation = {run["seed"]: run["validation_loss"] for run in runs}
        measures = {m: {run["seed"]: run[m] for run in runs} for m in _MEASURES if m in runs[0]}
        found.append(TrackRow(**fields, validation=validation, measures=measures))
    return sorted(found, key=lambda row: (row.parameters, row.setting))


def best_within(found: Iterable[TrackRow], parameters: float) -> TrackRow | None:
    """The row with the lowest validation loss, the mean over the seeds, of those with at most so many parameters."""
    fit = [row for row in found if 0 < row.parameters <= parameters]
    return min(fit, key=lambda row: statistics.mean(row.validation.values()), default=None)
