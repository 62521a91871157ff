"""Trainings that see a part of the ranks in each step, so that the first ranks can be used alone.

Sources: DyLoRA, arXiv 2210.07558 (huawei-noah/Efficient-NLP, DyLoRA/loralib/DyLoRA.py); Maestro's ordered dropout,
arXiv 2308.14929 (SamuelHorvath/Maestro-LoD).
"""

from dataclasses import dataclass

from ndlora_plugins.schedules.base import Ranks, Schedule, check_choice, check_number

__all__ = ["nested_rank", "ordered_dropout"]


@dataclass(frozen=True)
class NestedRank:
    """
    Attributes:
        least: a number of ranks from here up to the whole rank is drawn for each step.
        learn: "last": of the ranks that are seen the last one gets a gradient; or "all".
        scale: the update of the first b ranks is that of scaling alpha / b ("rank"), alpha / sqrt(b) ("root", for
            `use_rslora`), or the adapter's own ("none").
    """

    least: int = 1
    learn: str = "last"
    scale: str = "rank"

    def __post_init__(self):
        check_number("least", self.least, 1, whole=True)
        check_choice("learn", self.learn, ("last", "all"))
        check_choice("scale", self.scale, ("rank", "root", "none"))


def nested(options, moment, place):
    least = min(options.least, place.highest)
    seen = min(least + moment.draw(place.highest - least + 1), place.rank)
    return Ranks(seen, seen - 1 if options.learn == "last" else 0)


def nested_scale(options, rank, seen):
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
    """
    Attributes:
        tails: strength of a penalty on the norms of the factors' ranks from each rank on; the paper has 1e-6.
    """

    tails: float = 0.0

    def __post_init__(self):
        check_number("tails", self.tails)


def ordered(options, moment, place):
    if moment.draw(place.count) != place.index:
        return Ranks(place.rank)
    return Ranks(1 + moment.draw(place.rank, " ranks"))


def tail_norms(options, training):
    if not options.tails:
        return None
    total = 0.0
    for layer in training.layers:
        for name, value in layer.trained.items():
            for axis in layer.structure.rank_axes.get(name, ()):
                squares = value.square().movedim(axis, 0).reshape(value.shape[axis], -1).sum(1)
                total = total + (squares.flip(0).cumsum(0) + 1e-12).sqrt().sum()
    return options.tails * total


ordered_dropout = Schedule(
    name="ordered_dropout",
    summary="each step one layer, drawn anew, sees its first ranks only",
    source="Maestro, arXiv 2308.14929",
    Options=OrderedDropout,
    ranks=ordered,
    penalty=tail_norms,
)
