"""NdLinear-LoRA: a sum of Kronecker products of small matrices, one for each mode of the layer's features.

Source: arXiv 2503.17353; https://github.com/ensemble-core/NdLinear-LoRA (`NdLinearLoRA`), there with two even modes
and one term and without a bias. https://github.com/ensemble-core/NdLinear (`ndlinear.py`) has N modes.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from ndlora_plugins.errors import NdLoraValueError
from ndlora_plugins.methods.base import Method
from ndlora_plugins.methods.modes import balanced_modes, check_modes, crossed_modes
from ndlora_plugins.methods.options import check_number
from ndlora_plugins.structures import KroneckerSum, Layout

__all__ = ["Modes", "kronecker_sum", "ndlinear"]


@dataclass(frozen=True)
class Modes:
    """The split of the features into modes.

    Attributes:
        num_modes: into how many, where `in_modes`, `out_modes` do not say it; experts and the axes of a kernel are
            modes of their own beside them.
        crossed_modes: the size of the small modes of `modes.crossed_modes`; None for even ones.
        in_modes, out_modes: by hand.
    """

    num_modes: int = 2
    crossed_modes: int | None = None
    in_modes: Sequence[int] | None = None
    out_modes: Sequence[int] | None = None

    def __post_init__(self) -> None:
        check_number("num_modes", self.num_modes, least=1, whole=True)
        if self.crossed_modes is not None:
            check_number("crossed_modes", self.crossed_modes, least=1, whole=True)
        for side in ("in_modes", "out_modes"):
            given = getattr(self, side)
            if given is not None:
                if not isinstance(given, Sequence) or isinstance(given, str):
                    raise NdLoraValueError(f"{side}={given!r}: give a list of integers, such as [32, 64].")
                object.__setattr__(self, side, tuple(given))


def kronecker_sum(layout: Layout) -> KroneckerSum:
    """The structure whose modes the layout's options, a `Modes`, ask for.

    The axes of a weight beyond out and in have modes of their own: experts before, the kernel behind.

    Raises:
        NdLoraValueError: modes by hand that do not multiply to the features, or too few.
    """
    options = layout.options
    given = {"in_modes": options.in_modes, "out_modes": options.out_modes}
    lengths = {len(modes) for modes in given.values() if modes is not None}
    if len(lengths) > 1:
        raise NdLoraValueError(
            f"in_modes={list(options.in_modes)} and out_modes={list(options.out_modes)} must "
            f"be equally many: each pair of modes is one factor."
        )
    before, after = layout.modes
    num_modes = lengths.pop() - len(before) - len(after) if lengths else options.num_modes
    least = 1 if before or after else 2
    if num_modes < least:
        beside = f" beside its own axes {[*before, *after]}" if before or after else ""
        raise NdLoraValueError(
            f"{num_modes} modes{beside}: at least {least} {'is' if least == 1 else 'are'} needed."
        )
    # (experts, out) x (in, height, width): an axis of one side has a mode of size 1 on the other
    sides = {
        "in_modes": (layout.in_features, (1,) * len(before), after),
        "out_modes": (layout.out_features, before, (1,) * len(after)),
    }
    rest = {side: features // math.prod((*first, *last)) for side, (features, first, last) in sides.items()}
    crossed = {}
    if options.crossed_modes is not None and given == {"in_modes": None, "out_modes": None}:
        split = crossed_modes(rest["in_modes"], rest["out_modes"], options.crossed_modes, num_modes)
        crossed = dict(zip(rest, split, strict=True))
    found = []
    for side, (features, first, last) in sides.items():
        if given[side] is not None:
            found.append(check_modes(given[side], features, side))
        else:
            split = crossed.get(side) or balanced_modes(rest[side], num_modes)
            found.append((*first, *split, *last))
    return KroneckerSum(layout, *found)


ndlinear = Method(
    name="ndlinear",
    summary="structured N-dimensional update: a small matrix for each of two even modes of the layer",
    source="arXiv 2503.17353",
    structure=kronecker_sum,
    factors=("mode_1", "mode_2"),
    start="lora_step",
    rank=1,
    Options=Modes,
)
