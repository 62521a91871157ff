"""From the JSON of a run: the bars with what was measured, the tables of docs/speed.md, a picture."""

from __future__ import annotations

import json
import re
import statistics
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

from benchmarks.speed.cases import DTYPES, LAYERS, cases
from benchmarks.speed.family import family_table
from benchmarks.speed.variants import BASELINE, KRONECKER, OURS, VARIANTS

__all__ = ["BARS", "LAYER", "PAGE", "Bar", "bars_table", "layers_table", "models_table", "write_docs"]

PAGE = Path(__file__).resolve().parents[2] / "docs" / "speed.md"
RESULTS = Path(__file__).resolve().parent / "results"
LAYER = re.compile(
    r"layer, (?P<model>.+), (?P<shape>\d+ -> \d+), (?P<tokens>\d+) tokens, (?P<dtype>\w+)(, r=(?P<rank>\d+))?"
)
_LARGE = ("Qwen3-1.7B", "Llama-3-8B")
# a part of the page, and whose results it shows: the name of a file in results/
_GENERATED = re.compile(r"(<!-- speed: (\w+) of ([\w-]+) -->\n).*?(<!-- end -->)", re.DOTALL)


def _layers(found: dict, *, models=tuple(LAYERS), dtypes=tuple(DTYPES), rank=None) -> Iterable[dict]:
    for name, case in found["cases"].items():
        match = LAYER.fullmatch(name)
        if match and match["model"] in models and match["dtype"] in dtypes and match["rank"] == rank:
            yield case


def _ratios(cases: Iterable[dict], variant: str, other: str = BASELINE, what: str = "both") -> list[float]:
    """Of the cases that have both."""
    return [
        case[what][variant]["ratio"] / case[what][other]["ratio"]
        for case in cases
        if {variant, other} <= case.get(what, {}).keys()
    ]


def _kept(cases: Iterable[dict], variants: Iterable[str]) -> list[float]:
    variants = tuple(variants)
    return [
        case["kept"][variant] / case["kept"][BASELINE]
        for case in cases
        for variant in variants
        if variant in case["kept"]
    ]


def _model(found: dict, kind: str, dtype: str, variant: str, other: str = BASELINE) -> list[float]:
    return [
        ratio
        for name, case in found["cases"].items()
        if name.startswith(kind) and name.endswith(dtype)
        for ratio in _ratios([case], variant, other, "step" if kind == "training step" else kind)
    ]


def _compiled(found: dict, variant: str, dtype: str) -> list[float]:
    return [
        case["compiled"]["compiled"]["ratio"]
        for name, case in found["cases"].items()
        if name.startswith("compiled, ") and name.endswith(f", {variant}, {dtype}")
    ]


def _start(found: dict, other: str) -> list[float]:
    case = found["cases"].get("start, 4096 x 4096, r=128")
    return [case["ms"]["n_lora"] / case["ms"][other]] if case else []


@dataclass(frozen=True)
class Bar:
    """A figure that must not be exceeded: in the mean, and by the worst."""

    work: str
    ratios: Callable[[dict], list[float]]
    mean: float | None = None
    worst: float | None = None


BARS = (
    *(
        Bar(
            f"whole layer, {variant} / LoRA r=8, Qwen3-1.7B and Llama-3-8B, {dtype}",
            lambda found, dtype=dtype, variant=variant: _ratios(
                _layers(found, models=_LARGE, dtypes=(dtype,)), variant
            ),
            mean,
            worst,
        )
        for variant in KRONECKER
        for dtype, mean, worst in (("float32", 1.00, 1.06), ("bfloat16", 1.03, 1.08))
    ),
    *(
        Bar(
            f"whole layer, {variant} / LoRA r=8, SmolLM2-135M, {dtype}",
            lambda found, dtype=dtype, variant=variant: _ratios(
                _layers(found, models=("SmolLM2-135M",), dtypes=(dtype,)), variant
            ),
            mean,
        )
        for variant in KRONECKER
        for dtype, mean in (("float32", 1.02), ("bfloat16", 1.10))
    ),
    Bar("whole layer, NdLinear / LoKr", lambda f: _ratios(_layers(f), "NdLinear", "LoKr"), 0.40, 0.50),
    Bar(
        "whole layer, NdLinear / reference",
        lambda f: _ratios(_layers(f), "NdLinear", "reference NdLinear"),
        0.92,
        1.00,
    ),
    *(
        Bar(
            f"whole layer, {variant} / LoRA, r={rank or 8}",
            lambda found, variant=variant, rank=rank: _ratios(_layers(found, rank=rank), variant),
            mean,
        )
        for variant, mean in (("SLoRA", 1.03), ("NLoRA", 1.08), ("IntTune", 0.97))
        for rank in (None, "128")
    ),
    *(
        Bar(
            f"kept for backward, NdLinear, SLoRA, NLoRA / LoRA r=8, {dtype}",
            lambda found, dtype=dtype: _kept(_layers(found, dtypes=(dtype,)), (*KRONECKER, "SLoRA", "NLoRA")),
            worst=worst,
        )
        for dtype, worst in (("float32", 1.0), ("bfloat16", 0.7))
    ),
    Bar(
        "kept for backward, IntTune / LoRA r=8",
        lambda f: _kept(_layers(f), ("IntTune",)),
        worst=0.1,
    ),
    *(
        Bar(
            f"training step, SmolLM2-135M, {variant} / {other}, {dtype}",
            lambda found, dtype=dtype, variant=variant, other=other: _model(
                found, "training step", dtype, variant, other
            ),
            mean,
        )
        for variant, other, dtype, mean in (
            *((variant, BASELINE, "float32", 1.00) for variant in KRONECKER),
            *((variant, BASELINE, "bfloat16", 0.94) for variant in KRONECKER),
            ("NdLinear", "LoKr", "float32", 0.55),
            ("NdLinear", "LoKr", "bfloat16", 0.55),
        )
    ),
    Bar("start of one 4096 x 4096 layer, r=128, n_lora / pissa", lambda f: _start(f, "pissa"), 1 / 2000),
    Bar(
        "start of one 4096 x 4096 layer, r=128, n_lora / pissa_niter_4",
        lambda f: _start(f, "pissa_niter_4"),
        1 / 100,
    ),
    *(
        Bar(
            f"generation, SmolLM2-135M, not merged, {variant} / LoRA, {dtype}",
            lambda found, dtype=dtype, variant=variant: _model(found, "generation", dtype, variant),
            1.00,
        )
        for variant in OURS
        for dtype in DTYPES
    ),
    *(
        Bar(
            f"torch.compile / eager, 8 layers of SmolLM2-135M, {variant}, {dtype}",
            lambda found, dtype=dtype, variant=variant: _compiled(found, variant, dtype),
            1.00,
        )
        for variant in OURS
        for dtype in DTYPES
    ),
)


# of what is measured on a GPU alone
_CUDA_BARS = tuple(
    Bar(
        f"whole layer, NdLinear by Triton / NdLinear, {dtype}",
        lambda found, dtype=dtype: _ratios(_layers(found, dtypes=(dtype,)), "NdLinear, Triton", "NdLinear"),
        1.00,
    )
    for dtype in DTYPES
)


def _figure(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}" if value >= 0.02 else f"1/{1 / value:,.0f}"


def bars_table(found: dict) -> str:
    """Every bar that was measured: what it asks for, what was found, and how many cases that is."""
    lines = [
        "| work | bar: mean (worst) | measured: mean (worst) | cases | |",
        "|---|---|---|---|---|",
    ]
    for bar in (*BARS, *_CUDA_BARS):
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
    groups = [group for group in groups if list(_layers(found, models=group[:1], dtypes=group[1:]))]
    lines = [
        "| | " + " | ".join(f"{model} {dtype}" for model, dtype in groups) + " |",
        "|---|" + "---|" * len(groups),
    ]
    per_variant = (
        ("forward + backward", VARIANTS, _ratios, _spread),
        ("forward", VARIANTS, lambda layers, v: _ratios(layers, v, what="forward"), _spread),
        ("adapter alone, forward + backward", [v for v in VARIANTS if v != "no adapter"], _alone, _mean),
        ("kept for backward", VARIANTS, lambda layers, v: _kept(layers, (v,)), _mean),
    )
    for title, variants, ratios_of, cell in per_variant:
        for variant in variants:
            found_ratios = [
                ratios_of(_layers(found, models=(model,), dtypes=(dtype,)), variant)
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


def _machine(found: dict) -> str:
    """A sentence on where it was measured and how much of it, and what was not."""
    machine = found["machine"]
    missing = [case.name for case in cases() if case.name not in found["cases"]]
    sentence = (
        f"{machine['device']}, {machine['threads']} threads, torch {machine['torch']}, peft {machine['peft']}; "
        f"{len(found['cases'])} cases of {len(found['cases']) + len(missing)}.\n"
    )
    if not missing:
        return sentence
    return sentence + f"\n<details><summary>Not measured</summary>\n\n{'; '.join(missing)}.\n</details>\n"


_PARTS = {
    "machine": _machine,
    "bars": bars_table,
    "layers": layers_table,
    "models": models_table,
    "family": family_table,
}


def write_docs(text: str) -> str:
    """The page with its tables made anew from the results."""
    results = {path.stem: json.loads(path.read_text()) for path in RESULTS.glob("*.json")}
    return _GENERATED.sub(lambda match: match[1] + _PARTS[match[2]](results[match[3]]) + match[4], text)


if __name__ == "__main__":
    PAGE.write_text(write_docs(PAGE.read_text()))
