"""Trainings that see a part of the ranks in each step, so that the first ranks can be used alone.

Sources: DyLoRA, arXiv 2210.07558 (huawei-noah/Efficient-NLP, DyLoRA/loralib/DyLoRA.py); Maestro's ordered dropout,
arXiv 2308.14929 (SamuelHorvath/Maestro-LoD).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ndlora_plugins.methods.options import check_choice, check_number
from ndlora_plugins.schedules.base import Moment, Place, Ranks, Schedule, Training
from ndlora_plugins.schedules.penalties import squares, trains_ranks

__all__ = ["nested_rank", "ordered_dropout"]


@dataclass(frozen=True)
class NestedRank:
    """Options of `nested_rank`.

    Attributes:
        least: a number of ranks from here up to the whole rank is drawn for each step.
        learn: "last": of the ranks that are seen the last one gets a gradient; or "all".
        scale: the update of the first b ranks is that of scaling alpha / b ("rank"), alpha / sqrt(b) ("root", for
            `use_rslora`), or the adapter's own ("none").
    """

    least: int = 1
    learn: str = "last"
    scale: str = "rank"

    def __post_init__(self) -> None:
        check_number("least", self.least, least=1, whole=True)
        check_choice("learn", self.learn, ("last", "all"))
        check_choice("scale", self.scale, ("rank", "root", "none"))


def nested(options: NestedRank, moment: Moment, place: Place) -> Ranks:
    """Draw how many ranks all layers see; a layer of fewer sees all of its own."""
    least = min(options.least, place.highest)
    seen = min(least + moment.draw(place.highest - least + 1), place.rank)
    return Ranks(seen, seen - 1 if options.learn == "last" else 0)


def nested_scale(options: NestedRank, rank: int, seen: int) -> float:
    """The scaling of the first `seen` ranks over that of all."""
    return (rank / seen) ** {"rank": 1.0, "root": 0.5, "none": 0.0}[options.scale]


nested_rank = Schedule(
    name="nested_rank",
    summary="each step sees the first b ranks, b drawn anew: any smaller rank is a slice afterwards",
    source="DyLoRA, arXiv 2210.07558",
    Options=NestedRank,
    ranks=nested,
    scale=nested_scale,
)


@dataclass(frozen=True)
class OrderedDropout:
    """Options of `ordered_dropout`.

    Attributes:
        tails: strength of a penalty on the norms of the factors' ranks from each rank on; the paper has 1e-6.
    """

    tails: float = 0.0

    def __post_init__(self) -> None:
        check_number("tails", self.tails)


def ordered(options: OrderedDropout, moment: Moment, place: Place) -> Ranks:
    """Draw the layer that sees a part of its ranks, and how many."""
    if moment.draw(place.count) != place.index:
        return Ranks(place.rank)
    return Ranks(1 + moment.draw(place.rank, " ranks"))


def tail_norms(options: OrderedDropout, training: Training) -> Tensor | None:
    """The norms of the factors' ranks from each rank on, times `tails`."""
    if not options.tails:
        return None
    norms = [
        (squares(value, axis).flip(0).cumsum(0) + 1e-12).sqrt().sum()
        for layer in training.layers
        for name, value in layer.trained.items()
        for axis in layer.structure.rank_axes.get(name, ())
    ]
    return options.tails * torch.stack(norms).sum()


def without_tails(options: OrderedDropout, plan: Any) -> str | None:
    """The reason why a layer has no tails that a penalty could shorten, or None."""
    if options.tails and not trains_ranks(plan):
        return "what it trains has no rank axis, and so no tails: set tails=0"
    return None


ordered_dropout = Schedule(
    name="ordered_dropout",
    summary="each step one layer, drawn anew, sees its first ranks only",
    source="Maestro, arXiv 2308.14929",
    Options=OrderedDropout,
    ranks=ordered,
    penalty=tail_norms,
    misfit=without_tails,
)
