"""Crossed modes: NdLinear-LoRA whose modes are uneven and cross, in = (n, in / n) and out = (out / n, n).

A term has in + out parameters, as LoRA r=1 has, and is an exact LoRA of rank n * n. Source: docs/quality.md.
"""

from dataclasses import dataclass, replace

from ndlora_plugins.methods.ndlinear import Modes, ndlinear

__all__ = ["CrossedModes", "crossed"]


@dataclass(frozen=True)
class CrossedModes(Modes):
    """`Modes` with small modes of size 4."""

    crossed_modes: int = 4


crossed = replace(
    ndlinear,
    name="crossed",
    summary="NdLinear with uneven modes that cross: LoRA r=1's parameters, an exact LoRA of rank 16",
    source="docs/quality.md, after arXiv 2503.17353",
    Options=CrossedModes,
)
