"""Tables and a picture of the runs that are done; `python -m benchmarks.quality.report` writes the quality pages."""

from __future__ import annotations

import re
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.common import standard_error
from benchmarks.picture import draw
from benchmarks.quality import sweep
from benchmarks.quality.runs import read_results
from benchmarks.quality.settings import settings_for
from benchmarks.quality.task import TASKS

__all__ = ["Row", "front", "page", "recipe_table", "rows", "sweep_table", "table", "write_files"]

BASELINE = "lora-r8"
RESULTS = Path(__file__).parent / "results"
PAGES = tuple(Path(__file__).parents[2] / "docs" / name for name in ("quality.md", "quality_tables.md"))
_GENERATED = re.compile(r"(<!-- (\w+) ([\w-]+): .*? -->\n).*?(<!-- end -->)", re.DOTALL)


@dataclass(frozen=True)
class Row:
    """One setting at its best learning rate.

    Attributes:
        losses: held-out loss in nats a token, one a seed.
        curve: (step, loss on the followed problems), the mean over the seeds.
        at_edge: the best rate is still the lowest or highest that was tried.
    """

    setting: str
    ours: bool
    options: dict[str, Any]
    parameters: int
    learning_rate: float
    losses: dict[int, float]
    curve: list[tuple[int, float]]
    exact_match: float | None
    seconds_a_step: float
    peak_memory: int | None
    at_edge: bool

    @property
    def loss(self) -> float:
        return statistics.mean(self.losses.values())

    @property
    def error(self) -> float | None:
        """The standard error over the seeds; None for one seed."""
        return standard_error(list(self.losses.values()))


def rows(results: Sequence[dict[str, Any]]) -> list[Row]:
    """A row for each setting with a finished sweep's start, by number of parameters."""
    found = []
    known = {each.name: each for each in settings_for(results[0]["task"]["name"])} if results else {}
    for name in dict.fromkeys(result["setting"]["name"] for result in results):
        own = sweep.of_setting(results, name)
        rates = sorted({result["learning_rate"] for result in own if result["seed"] == sweep.SEEDS[0]})
        best = sweep.best_rate(own)
        tried = known[name].tried if name in known else 4
        if best is None or len(rates) < tried:
            continue
        runs = [r for r in own if r["learning_rate"] == best and r["held_out_loss"] is not None]
        exact = [r["exact_match"] for r in runs if r["exact_match"] is not None]
        peaks = [r["peak_memory_bytes"] for r in runs if r["peak_memory_bytes"] is not None]
        found.append(
            Row(
                setting=name,
                ours=runs[0]["setting"]["peft_type"] == "NDLORA",
                options=runs[0]["setting"]["options"],
                parameters=runs[0]["parameters"],
                learning_rate=best,
                losses={r["seed"]: r["held_out_loss"] for r in runs},
                curve=[
                    (points[0][0], statistics.mean(loss for _, loss in points))
                    for points in zip(*(r["curve"] for r in runs), strict=True)
                ],
                exact_match=statistics.mean(exact) if exact else None,
                seconds_a_step=statistics.median(r["seconds_a_step"] for r in runs),
                peak_memory=max(peaks, default=None),
                at_edge=tried > 2 and best in (rates[0], rates[-1]),
            )
        )
    return sorted(found, key=lambda row: (row.parameters, row.setting))


def front(found: Iterable[Row]) -> list[Row]:
    """The rows that no other one beats in both parameters and loss: the Pareto front."""
    kept: list[Row] = []
    for row in sorted(found, key=lambda row: (row.parameters, row.loss)):
        if not kept or row.loss < kept[-1].loss:
            kept.append(row)
    return kept


def difference(row: Row, baseline: Row) -> tuple[float, float | None]:
    """Mean and standard error of the loss less the baseline's, seed by seed: both saw the same problems in turn."""
    differences = [row.losses[seed] - baseline.losses[seed] for seed in row.losses if seed in baseline.losses]
    return statistics.mean(differences), standard_error(differences)


def steps_to_reach(row: Row, baseline: Row) -> int | None:
    """The first followed step at which the row's loss is at most the baseline's last one; None if never."""
    return next((step for step, loss in row.curve if loss <= baseline.curve[-1][1]), None)


def table(results: Sequence[dict[str, Any]]) -> str:
    """Markdown: one line a setting."""
    found = rows(results)
    baseline = next((row for row in found if row.setting == BASELINE), None)
    on_front = {row.setting for row in front(found)}
    lines = [
        "| setting | parameters | best learning rate | held-out loss | less LoRA r=8's | seeds | exact match | "
        "steps to LoRA r=8's last loss | s a step | peak GB |\n",
        "|---|---:|---:|---:|---:|---:|---:|---:|---:|---:|\n",
    ]
    for row in found:
        name = f"**{row.setting}**" if row.setting in on_front else row.setting
        less = reached = ""
        if baseline is not None:
            less = _plus_minus(*difference(row, baseline), signed=True)
            reached = str(steps_to_reach(row, baseline) or "-")
        cells = [
            name,
            f"{row.parameters:,}",
            f"{row.learning_rate:g}" + (" (edge)" if row.at_edge else ""),
            _plus_minus(row.loss, row.error),
            less,
            str(len(row.losses)),
            "" if row.exact_match is None else f"{row.exact_match:.1%}",
            reached,
            f"{row.seconds_a_step:.2f}",
            "" if row.peak_memory is None else f"{row.peak_memory / 1e9:.1f}",
        ]
        lines.append("| " + " | ".join(cells) + " |\n")
    return "".join(lines)


def sweep_table(results: Sequence[dict[str, Any]]) -> str:
    """Markdown: the held-out loss of every setting at every learning rate, at the sweep's seed."""
    rates = sorted({result["learning_rate"] for result in results})
    lines = [
        "| setting | " + " | ".join(f"{rate:g}" for rate in rates) + " |\n",
        "|---|" + "---:|" * len(rates) + "\n",
    ]
    for name in dict.fromkeys(result["setting"]["name"] for result in results):
        own = sweep.of_setting(results, name)
        best = sweep.best_rate(own)
        losses = {r["learning_rate"]: r["held_out_loss"] for r in own if r["seed"] == sweep.SEEDS[0]}
        cells = [_swept(losses, rate, best) for rate in rates]
        lines.append(f"| {name} | " + " | ".join(cells) + " |\n")
    return "".join(lines)


def _swept(losses: dict[float, float | None], rate: float, best: float | None) -> str:
    if rate not in losses:
        return ""
    loss = losses[rate]
    text = "diverged" if loss is None else f"{loss:.4f}"
    return f"**{text}**" if rate == best else text


def _plus_minus(mean: float, error: float | None, signed: bool = False) -> str:
    sign = "+" if signed else ""
    return f"{mean:{sign}.4f}" + ("" if error is None else f" ± {error:.4f}")


def recipe_table(results: Sequence[dict[str, Any]]) -> str:
    """Markdown, as configurations with their learning rates: the settings on the Pareto front, the best of each of our
    methods that has none there, and LoRA r=8.
    """
    found = rows(results)
    baseline = [row for row in found if row.setting == BASELINE]
    best = [row for row in front(found) if row.setting != BASELINE]
    shown = {row.options.get("method") for row in best}
    for row in sorted(found, key=lambda row: row.loss):
        if row.ours and row.options.get("method") not in shown:
            shown.add(row.options.get("method"))
            best.append(row)
    lines = [
        "| configuration | parameters | learning rate | held-out loss |\n",
        "|---|---:|---:|---:|\n",
    ]
    for row in [*best, *baseline]:
        options = ", ".join(f"{name}={value!r}" for name, value in row.options.items()).replace("'", '"')
        lines.append(
            f"| {row.setting}: `{options}` | {row.parameters:,} | {row.learning_rate:g} | "
            f"{_plus_minus(row.loss, row.error)} |\n"
        )
    return "".join(lines)


def write_files(folder: Path) -> None:
    """results.md beside the runs of one task, and loss.png unless they are single trials."""
    results = read_results(folder)
    (folder / "results.md").write_text(table(results) + "\n" + sweep_table(results))
    if folder.name in TASKS:
        found = rows(results)
        levels = {row.setting: row.loss for row in found if row.setting == BASELINE}
        draw(found, folder / "loss.png", folder.name, "nats a token", levels)


_PARTS = {"table": table, "recipes": recipe_table, "sweep": sweep_table}


def page(text: str) -> str:
    """A page with its generated parts made anew; a part is marked `<!-- PART TASK: ... -->`."""
    return _GENERATED.sub(lambda m: m[1] + _PARTS[m[2]](read_results(RESULTS / m[3])) + m[4], text)


if __name__ == "__main__":
    for file in PAGES:
        file.write_text(page(file.read_text()))
    for folder in sorted(RESULTS.iterdir()):
        write_files(folder)
