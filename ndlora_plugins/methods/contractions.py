"""Contractions of more than two or three factors: Tucker cores, tensor trains and rings.

Sources: FLoRA, arXiv 2405.14739 (SJTU-DeepVisionLab/FLoRA); TT-LoRA, arXiv 2408.01008; TLoRA, arXiv 2501.08727 (its
residual); TeRA, arXiv 2509.03234, whose exact form could not be read: `random_tucker` follows its abstract.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

from ndlora_plugins.methods.base import Method
from ndlora_plugins.methods.modes import balanced_modes
from ndlora_plugins.methods.options import check_choice, check_number
from ndlora_plugins.structures import Chain, Composed, Einsum, Factor, Layout, Structure
from ndlora_plugins.structures.einsum import Equation

__all__ = ["random_tucker", "tensor_ring", "tensor_train", "tucker"]


def _numbered(name: str, sizes: Sequence[object]) -> list[str]:
    return [f"{name}{k}" for k in range(1, len(sizes) + 1)]


@dataclass(frozen=True)
class Kernel:
    """The core of convolutions.

    Attributes:
        kernel_rank: of each axis of a kernel that is longer.
    """

    kernel_rank: int = 2

    def __post_init__(self) -> None:
        check_number("kernel_rank", self.kernel_rank, 1, 64, whole=True)


def _tucker(layout: Layout) -> Structure:
    kernel = layout.trailing
    if not kernel:
        chain = Chain(layout)
        named = {"axis_in": "down", "core": "core", "axis_out": "up"}
        own = tuple(replace(factor, name=name) for name, factor in zip(named, chain.factors, strict=True))
        ranks = {name: chain.rank_axes[named[name]] for name in named}
        return Composed(layout, chain, own, lambda f: {named[n]: f[n] for n in named}, _tucker, ranks)
    axes, ranks = _numbered("in_kernel", kernel), _numbered("r_kernel", kernel)
    factors = (("out", "r_out"), ("r_out", "r_in", *ranks), ("r_in", "in"), *zip(axes, ranks, strict=True))
    sizes = {"out": layout.out_features, "in": layout.in_features // math.prod(kernel)}
    sizes |= dict(zip(axes, kernel, strict=True))
    sizes |= {axis: min(size, layout.options.kernel_rank) for axis, size in zip(ranks, kernel, strict=True)}
    names = ("axis_out", "core", "axis_in", *_numbered("kernel_", kernel))
    equation = Equation(factors, ("out",), ("in", *axes))
    return Einsum(layout, equation, tuple(sizes.items()), names, ("r_out", "r_in"))


tucker = Method(
    name="tucker",
    summary="a small core in the weight's own dimensions, a factor for each: FLoRA, for convolutions too",
    source="arXiv 2405.14739",
    structure=_tucker,
    factors=("axis_in", "core", "axis_out"),
    start="core_zero",
    Options=Kernel,
)


@dataclass(frozen=True)
class Ring:
    """The split of the features.

    Attributes:
        num_modes: of each side, as even as they come.
    """

    num_modes: int = 2
    most: ClassVar[int] = 6

    def __post_init__(self) -> None:
        check_number("num_modes", self.num_modes, 2, self.most, whole=True)


@dataclass(frozen=True)
class Train(Ring):
    """The split of `Ring`, and the order in which the modes are joined.

    Attributes:
        order: "matrix", factor k has mode k of both sides; "sides", first the modes of out, then those of in: a LoRA
            of the same rank whose two sides are trains.
    """

    num_modes: int = 3
    order: str = "matrix"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice("order", self.order, ("matrix", "sides"))


@dataclass(frozen=True)
class Network(Ring):
    """The split of `Ring` into fewer modes: each is four factors more, and every cut between them is looked at."""

    most: ClassVar[int] = 3


def _modes(layout: Layout) -> tuple[dict[str, int], dict[str, int]]:
    """The axes of out and those of in, with their sizes."""
    features = {"out": layout.out_features, "in": layout.in_features}
    modes = {side: balanced_modes(size, layout.options.num_modes) for side, size in features.items()}
    outs, ins = (dict(zip(_numbered(side, sizes), sizes, strict=True)) for side, sizes in modes.items())
    return outs, ins


def _train(layout: Layout, places: Sequence[Sequence[str]], closed: bool = False) -> Einsum:
    """Factors with these axes each, neighbours joined by bonds of the layout's rank; closed, the ends too."""
    bonds = [f"bond{k}" for k in range(len(places) + 1)]
    if closed:
        bonds[-1] = bonds[0]
    factors: list[tuple[str, ...]] = [
        (left, *axes, right) for left, axes, right in zip(bonds, places, bonds[1:], strict=False)
    ]
    if not closed:
        bonds, factors[0], factors[-1] = bonds[1:-1], factors[0][1:], factors[-1][:-1]
    outs, ins = _modes(layout)
    equation = Equation(tuple(factors), tuple(outs), tuple(ins))
    sizes = (*outs.items(), *ins.items())
    return Einsum(layout, equation, sizes, tuple(_numbered("train_", places)), tuple(dict.fromkeys(bonds)))


def _tensor_train(layout: Layout) -> Einsum:
    outs, ins = _modes(layout)
    in_order = layout.options.order == "matrix"
    return _train(layout, [*zip(outs, ins, strict=True)] if in_order else [(axis,) for axis in (*outs, *ins)])


tensor_train = Method(
    name="tensor_train",
    summary="modes with bonds between neighbours: NdLinear's terms for two, fewer numbers for more",
    source="arXiv 2408.01008",
    structure=_tensor_train,
    factors=("train_1", "train_2"),
    start="train_step",
    rank=4,
    Options=Train,
)


def _tensor_ring(layout: Layout) -> Einsum:
    outs, ins = _modes(layout)
    return _train(layout, [(axis,) for axis in (*outs, *ins)], closed=True)


tensor_ring = Method(
    name="tensor_ring",
    summary="a train whose ends are joined, the modes of out before those of in: TLoRA's residual",
    source="arXiv 2501.08727",
    structure=_tensor_ring,
    factors=("train_1", "train_2"),
    start="train_step",
    rank=2,
    Options=Ring,
)


def _random_tucker(layout: Layout) -> Einsum:
    outs, ins = _modes(layout)
    sizes = outs | ins
    ranks = [f"r_{axis}" for axis in sizes]
    factors = (*((axis,) for axis in sizes), *zip(sizes, ranks, strict=True), tuple(ranks))
    names = (*(f"scale_{axis}" for axis in sizes), *(f"random_{axis}" for axis in sizes), "random_core")
    equation = Equation(factors, tuple(outs), tuple(ins))
    return Einsum(layout, equation, tuple(sizes.items()), names, tuple(ranks))


def _random_key(factor: Factor, layer: str, layout: Layout) -> str | None:
    if not factor.name.startswith("random_"):
        return None
    return f"{factor.name}_of_{layout.out_features}x{layout.in_features}"


def _scales(options: Ring) -> tuple[str, ...]:
    return tuple(f"scale_{side}{k}" for side in ("out", "in") for k in range(1, options.num_modes + 1))


random_tucker = Method(
    name="random_tucker",
    summary="a random Tucker network that layers of one shape share; a vector for each mode trains",
    source="after the abstract of arXiv 2509.03234",
    structure=_random_tucker,
    factors=("scale_out1", "scale_in1", "random_core"),
    trains=_scales,
    shared=_random_key,
    start="random_network",
    rank=4,
    Options=Network,
)
