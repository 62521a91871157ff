"""Tables and a picture of the runs that are done; `python -m benchmarks.quality.report` writes the quality pages."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.picture import draw
from benchmarks.quality.settings import settings_for
from benchmarks.rows import Row, common_fields, difference, fill_page, plus_minus, sweep_table
from benchmarks.runs import SWEEP_SEED, of_setting, read_results

__all__ = ["LanguageRow", "front", "page", "recipe_table", "rows", "table", "write_files"]

BASELINE = "lora-r8"
RESULTS = Path(__file__).parent / "results"
PAGES = tuple(Path(__file__).parents[2] / "docs" / name for name in ("quality.md", "quality_tables.md"))


@dataclass(frozen=True)
class LanguageRow(Row):
    """One setting at its best learning rate.

    Attributes:
        losses: in nats a token.
        curve: (step, loss on the followed problems), the mean over the seeds.
    """

    curve: list[tuple[int, float]]
    exact_match: float | None
    seconds_a_step: float
    peak_memory: int | None


def rows(results: Sequence[dict[str, Any]]) -> list[LanguageRow]:
    """A row for each setting with a finished sweep's start, by number of parameters."""
    found = []
    tried = {each.name: each.tried for each in settings_for(results[0]["task"])} if results else {}
    for name in dict.fromkeys(result["setting"]["name"] for result in results):
        own = of_setting(results, name)
        common, rates = common_fields(own), {result["learning_rate"] for result in own}
        if common is None or len(rates) < tried.get(name, 4):
            continue
        fields, runs = common
        exact = [r["exact_match"] for r in runs if r["exact_match"] is not None]
        peaks = [r["peak_memory_bytes"] for r in runs if r["peak_memory_bytes"] is not None]
        row = LanguageRow(
            **fields,
            curve=[
                (points[0][0], statistics.mean(loss for _, loss in points))
                for points in zip(*(r["curve"] for r in runs), strict=True)
            ],
            exact_match=statistics.mean(exact) if exact else None,
            seconds_a_step=statistics.median(r["seconds_a_step"] for r in runs),
            peak_memory=max(peaks, default=None),
        )
        found.append(row)
    return sorted(found, key=lambda row: (row.parameters, row.setting))


def front(found: Iterable[LanguageRow]) -> list[LanguageRow]:
    """The rows that no other one beats in both parameters and loss: the Pareto front."""
    kept: list[LanguageRow] = []
    for row in sorted(found, key=lambda row: (row.parameters, row.loss)):
        if not kept or row.loss < kept[-1].loss:
            kept.append(row)
    return kept


def steps_to_reach(row: LanguageRow, baseline: LanguageRow) -> int | None:
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
            less = plus_minus(*difference(row, baseline), signed=True, digits=4)
            reached = str(steps_to_reach(row, baseline) or "-")
        cells = [
            name,
            f"{row.parameters:,}",
            f"{row.learning_rate:g}" + (" (edge)" if row.at_edge else ""),
            plus_minus(row.loss, row.error, digits=4),
            less,
            str(len(row.losses)),
            "" if row.exact_match is None else f"{row.exact_match:.1%}",
            reached,
            f"{row.seconds_a_step:.2f}",
            "" if row.peak_memory is None else f"{row.peak_memory / 1e9:.1f}",
        ]
        lines.append("| " + " | ".join(cells) + " |\n")
    return "".join(lines)


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
            f"{plus_minus(row.loss, row.error, digits=4)} |\n"
        )
    return "".join(lines)


def write_files(path: Path) -> None:
    """TASK.md and TASK.png beside the results of one task."""
    results = read_results(path)
    path.with_suffix(".md").write_text(table(results) + "\n" + _sweep(results))
    _draw(results, path)


def _draw(results: Sequence[dict[str, Any]], path: Path) -> None:
    found = rows(results)
    levels = {row.setting: row.loss for row in found if row.setting == BASELINE}
    draw(found, path.with_suffix(".png"), path.stem, "nats a token", levels)


def _sweep(results: Sequence[dict[str, Any]]) -> str:
    return sweep_table([result for result in results if result["seed"] == SWEEP_SEED], digits=4)


_PARTS = {"table": table, "recipes": recipe_table, "sweep": _sweep}


def page(text: str) -> str:
    """A page with its generated parts made anew."""
    return fill_page(text, lambda part, task: _PARTS[part](read_results(RESULTS / f"{task}.jsonl")))


if __name__ == "__main__":
    for file in PAGES:
        file.write_text(page(file.read_text()))
    for path in sorted(RESULTS.glob("*.jsonl")):
        _draw(read_results(path), path)
