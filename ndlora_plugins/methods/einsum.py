"""A structure of your own by configuration alone: any multilinear contraction, as an equation.

`NdLoraConfig(method="einsum", options={"equation": "out r, r s, s in -> out in", "sizes": {"s": 16}})`
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from ndlora_plugins.errors import NdLoraValueError
from ndlora_plugins.methods.base import Method
from ndlora_plugins.methods.modes import balanced_modes, check_modes
from ndlora_plugins.structures import Einsum, Layout
from ndlora_plugins.structures.einsum import Equation

__all__ = ["Contraction", "einsum"]


@dataclass(frozen=True)
class Contraction:
    """A contraction of named factors.

    Attributes:
        equation: such as "out r, r s, s in -> out in": factors by commas, axes by spaces. Behind "->" stand the
            axes of dW: those named out..., then those named in....
        sizes: of axes, a mapping or pairs. Left out, an inner axis has the rank; a single out or in axis has the
            layer's features, and several share them evenly.
        names: of the factors; "factor_1" and so on by default.
        trains: the names of those that train; all by default.
    """

    equation: str
    sizes: Mapping[str, int] | Sequence[tuple[str, int]] = ()
    names: Sequence[str] | None = None
    trains: Sequence[str] | None = None

    def __post_init__(self) -> None:
        parsed = Equation.parse(self.equation)
        try:
            sizes = dict(self.sizes)
        except (TypeError, ValueError) as error:
            raise NdLoraValueError(
                f"sizes={self.sizes!r}: give a mapping of axes to sizes, such as {{'r': 8}}."
            ) from error
        object.__setattr__(self, "sizes", tuple(sizes.items()))
        known = {axis for axes in parsed.factors for axis in axes}
        for axis, size in self.sizes:
            if axis not in known or not isinstance(size, int) or isinstance(size, bool) or size < 1:
                raise NdLoraValueError(
                    f"sizes={sizes!r}: {axis!r} must be an axis of equation={self.equation!r}, and its size "
                    f"an integer of at least 1."
                )
        count = len(parsed.factors)
        names = self.names or [f"factor_{k}" for k in range(1, count + 1)]
        if (
            len(names) != count
            or len(set(names)) < count
            or not all(str(name).isidentifier() for name in names)
        ):
            raise NdLoraValueError(
                f"names={list(names)!r}: equation={self.equation!r} has {count} factors; give each a name of its own, "
                f"of letters, digits and underscores."
            )
        trains = names if self.trains is None else self.trains
        if not trains or not set(trains) <= set(names):
            raise NdLoraValueError(
                f"trains={list(trains)!r}: name at least one of the factors {list(names)}."
            )
        object.__setattr__(self, "names", tuple(names))
        object.__setattr__(self, "trains", tuple(trains))


def contraction(layout: Layout) -> Einsum:
    """The structure that the layout's options, a `Contraction`, ask for.

    Raises:
        NdLoraValueError: axes of dW that do not multiply to the layer's features.
    """
    options = layout.options
    equation, sizes = Equation.parse(options.equation), dict(options.sizes)
    for side, axes, features in (
        ("out_modes", equation.outs, layout.out_features),
        ("in_modes", equation.ins, layout.in_features),
    ):
        given = [axis for axis in axes if axis in sizes]
        if not given:
            sizes |= zip(axes, balanced_modes(features, len(axes)), strict=True)
        elif len(given) < len(axes):
            left = [axis for axis in axes if axis not in sizes]
            raise NdLoraValueError(
                f"sizes={dict(options.sizes)!r} of equation={options.equation!r} has {given} without {left}: give all "
                f"or none."
            )
        check_modes(tuple(sizes[axis] for axis in axes), features, side)
    ranked = tuple(axis for axis in equation.inner if axis not in sizes)
    return Einsum(layout, equation, tuple(sizes.items()), options.names, ranked)


einsum = Method(
    name="einsum",
    summary="any multilinear contraction of named factors, given as an equation",
    source="docs/einsum.md",
    structure=contraction,
    factors=lambda options: options.names,
    trains=lambda options: options.trains,
    start="first_zero",
    Options=Contraction,
)
