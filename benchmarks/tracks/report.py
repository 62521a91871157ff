"""Tables and pictures of the runs that are done; `python -m benchmarks.tracks.report` writes the evidence pages."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.common import write_json
from benchmarks.picture import draw
from benchmarks.rows import difference, fill_page, plus_minus, sweep_table
from benchmarks.runs import read_results
from benchmarks.tracks import known
from benchmarks.tracks.fronts import draw_fronts
from benchmarks.tracks.rows import BASELINE, BUDGETS, NOTHING, TrackRow, best_within, rows
from benchmarks.tracks.settings import SEEDS, settings_for

__all__ = ["bars", "budget_table", "field_results", "page", "reward_table", "table"]

RESULTS = Path(__file__).parent / "results"
LANGUAGE = Path(__file__).parents[1] / "quality" / "results" / "gsm8k.jsonl"
PAGES = tuple(Path(__file__).parents[2] / "docs" / name for name in ("evidence.md", "evidence_tables.md"))
_UNITS = {"sentences": "squared error of the rating", "images": "cross-entropy of the digits"}
_MEASURES = {"held_out_score": "score", "transfer_loss": "transfer", "forgetting": "forgetting"}


def _split(found: Sequence[TrackRow]) -> tuple[TrackRow | None, list[TrackRow], list[TrackRow]]:
    """(the baseline, ours, PEFT's)."""
    baseline = next((row for row in found if row.setting == BASELINE), None)
    adapters = [row for row in found if row.setting != NOTHING]
    return baseline, [row for row in adapters if row.ours], [row for row in adapters if not row.ours]


def table(results: Sequence[dict[str, Any]]) -> str:
    """Markdown: one line a setting, by number of parameters."""
    found = rows(results)
    baseline = _split(found)[0]
    if baseline is None:
        return "Not run yet.\n"
    measures = [name for name in _MEASURES if name in found[0].measures]
    header = ["setting", "parameters", "of LoRA r=8's", "best rate", "held-out loss", "less LoRA r=8's"]
    header += [_MEASURES[name] for name in measures]
    lines = [f"| {' | '.join(header)} |\n", "|---|" + "---:|" * (len(header) - 1) + "\n"]
    for row in found:
        cells = [
            f"**{row.setting}**" if row.ours else row.setting,
            f"{row.parameters:,}",
            f"1/{baseline.parameters / row.parameters:.3g}" if row.parameters else "",
            (f"{row.learning_rate:g}" + (" (edge)" if row.at_edge else "")) if row.parameters else "",
            plus_minus(row.loss, row.error),
            plus_minus(*difference(row, baseline), signed=True),
            *(f"{row.mean(name):.3f}" for name in measures),
        ]
        lines.append("| " + " | ".join(cells) + " |\n")
    done = {row.setting for row in found}
    missing = [each.name for each in settings_for(results[0]["task"]) if each.name not in done]
    if missing:
        lines.append(f"\nNot run to the end yet, of the field: {'; '.join(missing)}.\n")
    return "".join(lines)


def budget_table(results: Sequence[dict[str, Any]]) -> str:
    """Markdown: for each budget the best of ours beside the best of PEFT's."""
    baseline, ours, peft = _split(rows(results))
    if baseline is None:
        return "Not run yet.\n"
    lines = [
        "| budget | ours | loss | PEFT's | loss | ours less PEFT's | |\n",
        "|---|---|---:|---|---:|---:|---|\n",
    ]
    for part in BUDGETS:
        pair = [best_within(some, baseline.parameters / part) for some in (ours, peft)]
        cells = [f"1/{part} ({baseline.parameters // part:,})"]
        for row in pair:
            cells += (
                ["none", ""]
                if row is None
                else [f"{row.setting} ({row.parameters:,})", plus_minus(row.loss, row.error)]
            )
        if None in pair:
            cells += ["", ""]
        else:
            mean, error = difference(*pair)
            cells += [plus_minus(mean, error, signed=True), _verdict(mean, error)]
        lines.append("| " + " | ".join(cells) + " |\n")
    return "".join(lines)


def bars(results: Sequence[dict[str, Any]]) -> str:
    """Markdown: what was asked of the track beforehand, and whether it came out."""
    baseline, ours, peft = _split(rows(results))
    if baseline is None:
        return "Not run yet.\n"
    pairs = [[best_within(some, baseline.parameters / part) for some in (ours, peft)] for part in BUDGETS]
    verdicts = [_verdict(*difference(*pair)) for pair in pairs if None not in pair]
    worse, better, of = verdicts.count("worse"), verdicts.count("better"), len(verdicts)
    lines = [
        _bar(f"at no budget worse than PEFT's best ({worse} of {of})", not worse),
        _bar(f"better at half of the budgets or more ({better} of {of})", 2 * better >= of),
    ]
    for part in (8, 16):
        row = best_within(ours, baseline.parameters / part)
        if row is not None:
            mean, error = difference(row, baseline)
            lines.append(
                _bar(
                    f"1/{part}: {row.setting} at LoRA r=8's loss ({plus_minus(mean, error, True)})",
                    mean <= error,
                )
            )
    within = [row for row in ours if row.parameters <= baseline.parameters / 8]
    equal = [row for row in within if _verdict(*difference(row, baseline)) != "worse"]
    least = min(equal, key=lambda row: row.mean("forgetting"), default=None)
    for how, row in (
        ("chosen by validation", best_within(within, baseline.parameters)),
        ("at its loss", least),
    ):
        if row is not None:
            mean, error = difference(row, baseline, lambda row: row.measures["forgetting"])
            text = (
                f"1/8: {row.setting}, {how}, forgets no more than LoRA r=8 ({plus_minus(mean, error, True)})"
            )
            lines.append(_bar(text, mean <= error))
    return "".join(lines)


def reward_table(results: Sequence[dict[str, Any]]) -> str:
    """Markdown: one line a setting, of the seeds that are there so far."""
    found = rows(results, seeds=SEEDS[:1])
    baseline = _split(found)[0]
    if baseline is None:
        return "Not run yet.\n"
    header = ["setting", "parameters", "of LoRA r=8's", "rate", "seeds", "reward", "less LoRA r=8's"]
    header += ["greedy", "first quarter", "last quarter", "forgetting"]
    lines = [f"| {' | '.join(header)} |\n", "|---|" + "---:|" * (len(header) - 1) + "\n"]
    for row in found:
        mean, error = difference(row, baseline)
        trained = row.parameters > 0
        cells = [
            f"**{row.setting}**" if row.ours else row.setting,
            f"{row.parameters:,}",
            f"1/{baseline.parameters / row.parameters:.3g}" if trained else "",
            f"{row.learning_rate:g}" if trained else "",
            f"{len(row.losses)}" if trained else "",
            plus_minus(1 - row.loss, row.error),
            plus_minus(-mean, error, signed=True) if trained and row is not baseline else "",
            *(
                "" if (value := row.mean(name)) is None else f"{value:.3f}"
                for name in ("held_out_score", "reward_first", "reward_last", "forgetting")
            ),
        ]
        lines.append("| " + " | ".join(cells) + " |\n")
    done = {row.setting for row in found}
    missing = [each.name for each in settings_for("rl") if each.name not in done]
    if missing:
        lines.append(f"\nNot run yet: {'; '.join(missing)}.\n")
    return "".join(lines)


def _verdict(mean: float, error: float) -> str:
    """Of a difference of losses: beyond one standard error or not."""
    return "better" if mean < -error else "worse" if mean > error else "equal"


def _bar(text: str, reached: bool) -> str:
    return f"- {'reached' if reached else '**missed**'}: {text}\n"


_PARTS = {
    "table": table,
    "budgets": budget_table,
    "bars": bars,
    "sweep": sweep_table,
    "rewards": reward_table,
}


def page(text: str) -> str:
    """A page with its generated parts made anew."""
    return fill_page(text, lambda part, track: _PARTS[part](read_results(RESULTS / f"{track}.jsonl")))


def field_results() -> dict[str, list[dict[str, Any]]]:
    """The results of the tracks that carry the whole field."""
    return {track: read_results(RESULTS / f"{track}.jsonl") for track in ("images", "sentences")}


if __name__ == "__main__":
    for file in PAGES:
        file.write_text(page(file.read_text()))
    files = field_results()
    write_json(known.known(files, LANGUAGE), known.FILE)
    found = {track: rows(results) for track, results in files.items()}
    for track, each in found.items():
        losses = {row.setting: row.loss for row in each}
        levels = {"the head alone": losses[NOTHING], "LoRA r=8": losses[BASELINE]}
        adapters = [row for row in each if row.setting != NOTHING]
        draw(adapters, RESULTS / f"{track}.png", track, _UNITS[track], levels, top=losses[NOTHING])
    draw_fronts({track: found[track] for track in ("sentences", "images")}, RESULTS / "fronts.png")
