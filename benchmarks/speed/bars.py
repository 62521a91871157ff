"""The bars of docs/speed_tables.md, and what a run of the benchmark has measured of them."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from benchmarks.speed.cases import DTYPES, LAYERS
from benchmarks.speed.variants import BASELINE, KRONECKER, OURS

__all__ = [
    "BARS",
    "CUDA_BARS",
    "LARGE",
    "LAYER",
    "Bar",
    "kept_of",
    "layers_of",
    "model_ratios_of",
    "ratios_of",
]

LAYER = re.compile(
    r"layer, (?P<model>.+), (?P<shape>\d+ -> \d+), (?P<tokens>\d+) tokens, (?P<dtype>\w+)(, r=(?P<rank>\d+))?"
)
LARGE = ("Qwen3-1.7B", "Llama-3-8B")


def layers_of(found: dict, *, models=tuple(LAYERS), dtypes=tuple(DTYPES), rank=None) -> Iterable[dict]:
    for name, case in found["cases"].items():
        match = LAYER.fullmatch(name)
        if match and match["model"] in models and match["dtype"] in dtypes and match["rank"] == rank:
            yield case


def ratios_of(cases: Iterable[dict], variant: str, other: str = BASELINE, what: str = "both") -> list[float]:
    """Of the cases that have both."""
    return [
        case[what][variant]["ratio"] / case[what][other]["ratio"]
        for case in cases
        if {variant, other} <= case.get(what, {}).keys()
    ]


def kept_of(cases: Iterable[dict], variants: Iterable[str]) -> list[float]:
    variants = tuple(variants)
    return [
        case["kept"][variant] / case["kept"][BASELINE]
        for case in cases
        for variant in variants
        if variant in case["kept"]
    ]


def model_ratios_of(found: dict, kind: str, dtype: str, variant: str, other: str = BASELINE) -> list[float]:
    return [
        ratio
        for name, case in found["cases"].items()
        if name.startswith(kind) and name.endswith(dtype)
        for ratio in ratios_of([case], variant, other, "generation" if kind == "generation" else "step")
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
            lambda found, dtype=dtype, variant=variant: ratios_of(
                layers_of(found, models=LARGE, dtypes=(dtype,)), variant
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
            lambda found, dtype=dtype, variant=variant: ratios_of(
                layers_of(found, models=("SmolLM2-135M",), dtypes=(dtype,)), variant
            ),
            mean,
        )
        for variant in KRONECKER
        for dtype, mean in (("float32", 1.02), ("bfloat16", 1.10))
    ),
    Bar("whole layer, NdLinear / LoKr", lambda f: ratios_of(layers_of(f), "NdLinear", "LoKr"), 0.40, 0.50),
    Bar(
        "whole layer, NdLinear / reference",
        lambda f: ratios_of(layers_of(f), "NdLinear", "reference NdLinear"),
        0.92,
        1.00,
    ),
    *(
        Bar(
            f"whole layer, {variant} / LoRA, r={rank or 8}",
            lambda found, variant=variant, rank=rank: ratios_of(layers_of(found, rank=rank), variant),
            mean,
        )
        for variant, mean in (("SLoRA", 1.03), ("NLoRA", 1.08), ("IntTune", 0.97))
        for rank in (None, "128")
    ),
    *(
        Bar(
            f"kept for backward, NdLinear, SLoRA, NLoRA / LoRA r=8, {dtype}",
            lambda found, dtype=dtype: kept_of(
                layers_of(found, dtypes=(dtype,)), (*KRONECKER, "SLoRA", "NLoRA")
            ),
            worst=worst,
        )
        for dtype, worst in (("float32", 1.0), ("bfloat16", 0.7))
    ),
    Bar(
        "kept for backward, IntTune / LoRA r=8",
        lambda f: kept_of(layers_of(f), ("IntTune",)),
        worst=0.1,
    ),
    *(
        Bar(
            f"training step, SmolLM2-135M, {variant} / {other}, {dtype}",
            lambda found, dtype=dtype, variant=variant, other=other: model_ratios_of(
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
            lambda found, dtype=dtype, variant=variant: model_ratios_of(found, "generation", dtype, variant),
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
_TRITON = ("NdLinear, Triton", "NdLinear")
CUDA_BARS = (
    *(
        Bar(
            f"training step, 4 blocks of Llama-3-8B, {variant} / LoRA r=8, bfloat16",
            lambda found, variant=variant: model_ratios_of(
                found, "block stack, 4 of Llama-3-8B", "bfloat16", variant
            ),
            1.00,
        )
        for variant in OURS
    ),
    *(
        Bar(
            f"whole layer, NdLinear by Triton / NdLinear, {dtype}",
            lambda found, dtype=dtype: ratios_of(layers_of(found, dtypes=(dtype,)), *_TRITON),
            1.00,
        )
        for dtype in DTYPES
    ),
    *(
        Bar(
            f"{kind}, NdLinear by Triton / NdLinear, {dtype}",
            lambda found, kind=kind, dtype=dtype: model_ratios_of(found, kind, dtype, *_TRITON),
            1.00,
        )
        for kind in ("block stack", "training step", "generation")
        for dtype in DTYPES
    ),
)
