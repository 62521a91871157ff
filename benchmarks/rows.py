"""What the runs of one setting say at its best learning rate, and how pages show it."""

from __future__ import annotations

import math
import re
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from benchmarks.common import standard_error
from benchmarks.runs import best_rate, by_rate, loss_that_chooses, of_setting

__all__ = ["Row", "common_fields", "difference", "fill_page", "plus_minus", "sweep_table"]


@dataclass(frozen=True)
class Row:
    """One setting at its best learning rate.

    Attributes:
        losses: held-out loss by seed.
        at_edge: the best rate is the lowest or highest of more than two that were tried.
    """

    setting: str
    peft_type: str
    options: dict[str, Any]
    parameters: int
    learning_rate: float
    losses: dict[int, float]
    at_edge: bool

    @property
    def ours(self) -> bool:
        return self.peft_type == "NDLORA"

    @property
    def loss(self) -> float:
        return statistics.mean(self.losses.values())

    @property
    def error(self) -> float | None:
        """The standard error over the seeds; None for one seed."""
        return standard_error(list(self.losses.values()))


def common_fields(
    results: Sequence[dict[str, Any]],
) -> tuple[dict[str, Any], list[dict[str, Any]]] | None:
    """The fields of `Row` and the runs at the best rate, of one setting; None if nothing has converged yet."""
    best = best_rate(results)
    if best is None:
        return None
    rates = by_rate(results)
    runs = rates[best]
    return {
        "setting": runs[0]["setting"]["name"],
        "peft_type": runs[0]["setting"]["peft_type"],
        "options": runs[0]["setting"]["options"],
        "parameters": runs[0]["parameters"],
        "learning_rate": best,
        "losses": {run["seed"]: run["held_out_loss"] for run in runs},
        "at_edge": len(rates) > 2 and best in (min(rates), max(rates)),
    }, runs


def difference(
    row: Row, other: Row, values: Callable[[Any], Mapping[int, float]] = lambda row: row.losses
) -> tuple[float, float | None]:
    """Mean and standard error of the row's value less the other's, seed by seed: both saw the same data in turn.

    Args:
        values: a row's, by seed.
    """
    left, right = values(row), values(other)
    differences = [left[seed] - right[seed] for seed in left if seed in right]
    return statistics.mean(differences), standard_error(differences)


def plus_minus(mean: float, error: float | None, signed: bool = False, digits: int = 3) -> str:
    """`1.234 ± 0.056`."""
    sign = "+" if signed else ""
    return f"{mean:{sign}.{digits}f}" + ("" if error is None else f" ± {error:.{digits}f}")


def sweep_table(results: Sequence[dict[str, Any]], digits: int = 3) -> str:
    """Markdown: the loss that chooses, of every setting at every learning rate, the mean over the seeds that ran."""
    swept = [result for result in results if result["learning_rate"]]
    rates = sorted({result["learning_rate"] for result in swept})
    lines = [
        "| setting | " + " | ".join(f"{rate:g}" for rate in rates) + " |\n",
        "|---|" + "---:|" * len(rates) + "\n",
    ]
    for name in dict.fromkeys(result["setting"]["name"] for result in swept):
        own = of_setting(swept, name)
        best, losses = best_rate(own), {rate: loss_that_chooses(runs) for rate, runs in by_rate(own).items()}
        cells = []
        for rate in rates:
            loss = losses.get(rate)
            text = "" if loss is None else f"{loss:.{digits}f}" if math.isfinite(loss) else "diverged"
            cells.append(f"**{text}**" if rate == best else text)
        lines.append(f"| {name} | " + " | ".join(cells) + " |\n")
    return "".join(lines)


_GENERATED = re.compile(r"(<!-- (\w+) ([\w-]+): .*? -->\n).*?(<!-- end -->)", re.DOTALL)


def fill_page(text: str, make: Callable[[str, str], str]) -> str:
    """A page with its generated parts made anew; a part is marked `<!-- PART TASK: ... -->`.

    Args:
        make: (part, task) -> its text.
    """
    return _GENERATED.sub(lambda match: match[1] + make(match[2], match[3]) + match[4], text)
