"""What a schedule is: what happens to an adapter during training, beside the gradient of the loss."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from torch import Tensor

from ndlora_plugins.methods.options import NoOptions
from ndlora_plugins.structures.base import Structure

__all__ = [
    "Chosen",
    "Moment",
    "Outputs",
    "Place",
    "Ranks",
    "Schedule",
    "TrainedLayer",
    "Training",
]


@dataclass(frozen=True)
class Moment:
    """One training step, the same in every layer and in what gradient checkpointing runs again.

    Attributes:
        step: of the optimiser, from 0.
        seed: of the adapter.
    """

    step: int
    seed: int = 0

    def draw(self, high: int, of: str = "") -> int:
        """A number from 0 up to below `high`; the same for the same step, seed and `of`, on every machine."""
        digest = hashlib.blake2b(f"{self.seed} {self.step}{of}".encode(), digest_size=8).digest()
        return int.from_bytes(digest, "little") % high


@dataclass(frozen=True)
class Place:
    """A layer among those of its adapter.

    Attributes:
        index, count: it is the index-th of so many, in the model's order.
        rank: its own.
        highest: the largest rank of them.
    """

    index: int
    count: int
    rank: int
    highest: int


class Ranks(NamedTuple):
    """The ranks that a training forward sees.

    Attributes:
        seen: the first so many.
        learning: of these, the ranks from here on get a gradient.
        scale: what the update is multiplied by; filled in from the record's own `scale`.
    """

    seen: int
    learning: int = 0
    scale: float = 1.0


@dataclass(frozen=True)
class TrainedLayer:
    """One layer as penalties and changes see it.

    Attributes:
        trained: factor -> parameter; with the snapshot anchor the change since the start.
        frozen: factor -> tensor, of those held beside it.
        rate: the learning rate of the parameters, in a change after a step; None where no optimizer is known.
    """

    name: str
    structure: Structure
    trained: Mapping[str, Tensor]
    frozen: Mapping[str, Tensor]
    rate: float | None = None


class Outputs(NamedTuple):
    """The result of the last training forward.

    Attributes:
        logits, base: (..., classes), of the model and, without gradient, of its base.
        counted: (...) booleans, the positions that the loss counts.
        divisor: what the loss divides a sum over these positions by.
    """

    logits: Tensor
    base: Tensor
    counted: Tensor
    divisor: float | Tensor


@dataclass(frozen=True)
class Training:
    """One adapter in training.

    Attributes:
        outputs: None unless the record `reads_outputs`.
    """

    layers: tuple[TrainedLayer, ...]
    moment: Moment
    outputs: Outputs | None = None


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """Something that happens during training. Hand an instance to the hook `ndlora_schedules`.

    Attributes:
        name: a key of `NdLoraCallback(schedules={...})`.
        summary: one line for `ndlora methods`.
        source: paper, or reference file.
        Options: a frozen dataclass of its options; its `__post_init__` checks them.
        ranks: (options, moment, place) -> the ranks that a training forward of this layer sees.
        scale: (options, rank, seen) -> what the update of the first `seen` ranks is multiplied by, in training and in
            `ndlora export --rank`.
        penalty: (options, training) -> a scalar that is added to the loss, or None.
        after_step: (options, training) -> changes factors in place after an optimizer's step; gives the layers whose
            factors are other ones now, for which the optimizer forgets what it knew.
        reads_outputs: the penalty reads what the model and its base give.
        misfit: (options, `LayerAdapter` of a layer) -> why it cannot work there, or None.
    """

    name: str
    summary: str
    source: str
    Options: type = NoOptions
    ranks: Callable[[Any, Moment, Place], Ranks] | None = None
    scale: Callable[[Any, int, int], float] | None = None
    penalty: Callable[[Any, Training], Tensor | None] | None = None
    after_step: Callable[[Any, Training], Iterable[TrainedLayer] | None] | None = None
    reads_outputs: bool = False
    misfit: Callable[[Any, Any], str | None] | None = None


class Chosen(NamedTuple):
    """A schedule with its options, checked."""

    schedule: Schedule
    options: Any

    def ranks(self, moment: Moment, place: Place) -> Ranks:
        """The ranks that a training forward of this layer sees, with their scale."""
        if self.schedule.ranks is None:
            return Ranks(place.rank)
        found = self.schedule.ranks(self.options, moment, place)
        return found._replace(scale=self.scale(place.rank, found.seen))

    def scale(self, rank: int, seen: int) -> float:
        """The factor that the update of the first `seen` of so many ranks is multiplied by."""
        return 1.0 if self.schedule.scale is None else self.schedule.scale(self.options, rank, seen)

    def misfit(self, plan: Any) -> str | None:
        """The reason why it cannot work on a layer, or None."""
        if self.schedule.ranks is not None and not any(plan.structure.rank_axes.values()):
            return "its update has no rank axis, of which a part could be hidden"
        return None if self.schedule.misfit is None else self.schedule.misfit(self.options, plan)
