"""From the JSON of a run: the bars with what was measured, the tables of docs/speed.md and docs/speed_tables.md."""

from __future__ import annotations

import json
import re
import statistics
from collections.abc import Iterable
from pathlib import Path

from benchmarks.speed.bars import BARS, CUDA_BARS, LARGE, kept_of, layers_of, model_ratios_of, ratios_of
from benchmarks.speed.cases import DTYPES, LAYERS, cases
from benchmarks.speed.family import family_table
from benchmarks.speed.variants import BASELINE, ON_CUDA, OURS, VARIANTS

__all__ = [
    "PAGES",
    "RESULTS",
    "bars_table",
    "layers_table",
    "models_table",
    "parts_table",
    "summary_table",
    "write_docs",
]

_DOCS = Path(__file__).resolve().parents[2] / "docs"
PAGES = (_DOCS / "speed.md", _DOCS / "speed_tables.md")
RESULTS = Path(__file__).resolve().parent / "results"
# a part of the page, and whose results it shows: the name of a file in results/
_GENERATED = re.compile(r"(<!-- speed: (\w+) of ([\w-]+) -->\n).*?(<!-- end -->)", re.DOTALL)


def _figure(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}" if value >= 0.02 else f"1/{1 / value:,.0f}"


def summary_table(found: dict) -> str:
    """Mean ratios to LoRA r=8: of the large models' layers, of a model's step and generation, and what is kept."""
    large = {dtype: list(layers_of(found, models=LARGE, dtypes=(dtype,))) for dtype in DTYPES}
    columns = {
        f"layer, {dtype}": lambda v, cases=cases: ratios_of(cases, v) for dtype, cases in large.items()
    }
    columns |= {
        f"{kind}, {dtype}": lambda v, kind=kind, dtype=dtype: model_ratios_of(found, kind, dtype, v)
        for kind in ("training step", "generation")
        for dtype in DTYPES
    }
    columns |= {
        f"kept, {dtype}": lambda v, cases=cases: kept_of(cases, (v,)) for dtype, cases in large.items()
    }
    lines = [f"| | {' | '.join(columns)} |", "|---|" + "---:|" * len(columns)]
    for variant in VARIANTS:
        cells = [_mean(ratios) if (ratios := values_of(variant)) else "" for values_of in columns.values()]
        name = f"**{variant}**" if variant in OURS else variant
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def bars_table(found: dict) -> str:
    """Every bar that was measured: what it asks for, what was found, and how many cases that is."""
    lines = [
        "| work | bar: mean (worst) | measured: mean (worst) | cases | |",
        "|---|---|---|---|---|",
    ]
    for bar in (*BARS, *CUDA_BARS):
        ratios = bar.ratios(found)
        asked = " ".join(
            part
            for part in (_figure(bar.mean), f"({_figure(bar.worst)})" if bar.worst is not None else "")
            if part
        )
        if not ratios:
            continue
        mean, worst = statistics.mean(ratios), max(ratios)
        met = (bar.mean is None or mean <= bar.mean) and (bar.worst is None or worst <= bar.worst)
        lines.append(
            f"| {bar.work} | {asked} | {_figure(mean)} ({_figure(worst)}) | {len(ratios)} | "
            f"{'met' if met else '**missed**'} |"
        )
    return "\n".join(lines) + "\n"


def _mean(ratios: list[float]) -> str:
    return f"{statistics.mean(ratios):.2f}"


def _spread(ratios: list[float]) -> str:
    return f"{_mean(ratios)} ({min(ratios):.2f} to {max(ratios):.2f})"


def layers_table(found: dict) -> str:
    """Ratios to LoRA r=8 in the mean over shapes and tokens, with the least and the largest."""
    groups = [(model, dtype) for model in LAYERS for dtype in DTYPES]
    groups = [group for group in groups if list(layers_of(found, models=group[:1], dtypes=group[1:]))]
    lines = [
        "| | " + " | ".join(f"{model} {dtype}" for model, dtype in groups) + " |",
        "|---|" + "---|" * len(groups),
    ]
    all_variants = (*VARIANTS, *ON_CUDA)
    per_variant = (
        ("forward + backward", all_variants, ratios_of, _spread),
        ("forward", all_variants, lambda layers, v: ratios_of(layers, v, what="forward"), _spread),
        ("adapter alone, forward + backward", [v for v in all_variants if v != "no adapter"], _alone, _mean),
        ("kept for backward", all_variants, lambda layers, v: kept_of(layers, (v,)), _mean),
    )
    for title, variants, values_of, cell in per_variant:
        for variant in variants:
            found_ratios = [
                values_of(layers_of(found, models=(model,), dtypes=(dtype,)), variant)
                for model, dtype in groups
            ]
            if any(found_ratios):
                cells = [cell(ratios) if ratios else "" for ratios in found_ratios]
                lines.append(f"| {title}, {variant} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def _alone(cases: Iterable[dict], variant: str) -> list[float]:
    """What the adapter adds to the bare layer, against what LoRA adds."""
    bare = "no adapter"
    return [
        (case["both"][variant]["ms"] - case["both"][bare]["ms"])
        / (case["both"][BASELINE]["ms"] - case["both"][bare]["ms"])
        for case in cases
        if variant in case["both"]
    ]


def models_table(found: dict) -> str:
    """Of whole models: ratio to LoRA r=8, or to eager, with its quartiles, ms, and memory."""
    lines = ["| | ratio (quartiles) | ms | kept for backward | peak memory |", "|---|---|---|---|---|"]
    for name, case in found["cases"].items():
        for what in ("step", "generation", "compiled"):
            for variant, figures in case.get(what, {}).items():
                spread = f"{figures['ratio_low']:.2f} to {figures['ratio_high']:.2f}"
                memory = [
                    f"{case[kind][variant] / 1e6:,.0f} MB" if case.get(kind, {}).get(variant) else ""
                    for kind in ("kept", "peak")
                ]
                lines.append(
                    f"| {name}: {variant} | {figures['ratio']:.2f} ({spread}) | {figures['ms']:,.0f} | "
                    + " | ".join(memory)
                    + " |"
                )
        for variant, milliseconds in case.get("ms", {}).items():
            lines.append(f"| {name}: {variant} | | {milliseconds:,.1f} | | |")
    return "\n".join(lines) + "\n"


def parts_table(found: dict) -> str:
    """Of a run of `benchmarks.gpu`: how long its parts took, what came of them, and what failed."""
    lines = ["| part | seconds | result | failures |", "|---|---|---|---|"]
    for name, part in found.get("parts", {}).items():
        lines.append(f"| {name} | {part['seconds']} | {part['result']} | {len(part['failures']) or ''} |")
    failures = [
        f"- {name}: {line}" for name, part in found.get("parts", {}).items() for line in part["failures"]
    ]
    return "\n".join([*lines, "", *failures]).rstrip() + "\n"


def _machine(found: dict) -> str:
    """A sentence on where it was measured and how much of it, and what was not."""
    machine = found["machine"]
    cuda = f", CUDA {machine['cuda']}, float32 products by TF32" if "cuda" in machine else ""
    missing = [case.name for case in cases(cuda=bool(cuda)) if case.name not in found["cases"]]
    sentence = (
        f"{machine['device']}, {machine['threads']} threads, torch {machine['torch']}, peft {machine['peft']}{cuda}; "
        f"{len(found['cases'])} cases of {len(found['cases']) + len(missing)}.\n"
    )
    if not missing:
        return sentence
    return sentence + f"\n<details><summary>Not measured</summary>\n\n{'; '.join(missing)}.\n</details>\n"


_PARTS = {
    "machine": _machine,
    "summary": summary_table,
    "bars": bars_table,
    "layers": layers_table,
    "models": models_table,
    "family": family_table,
    "parts": parts_table,
}


def write_docs(text: str) -> str:
    """A page with its tables made anew from the results."""
    results = {path.stem: json.loads(path.read_text()) for path in RESULTS.glob("*.json")}
    return _GENERATED.sub(lambda match: match[1] + _PARTS[match[2]](results[match[3]]) + match[4], text)


if __name__ == "__main__":
    for page in PAGES:
        page.write_text(write_docs(page.read_text()))
