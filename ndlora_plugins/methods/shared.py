"""Sides that all layers of the model share, with something small of each layer's own between them.

Sources: LoTR, arXiv 2402.01376 (daskol/lotr); FacT, arXiv 2212.03145 (JieShibo/PETL-ViT); LoRTA, arXiv 2410.04060;
S2-LoRA, arXiv 2309.11756; MetaTT, arXiv 2506.09105; NOLA, arXiv 2310.02556 (UCDvision/NOLA).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ndlora_plugins.methods.base import Method
from ndlora_plugins.methods.crossed import CrossedModes, crossed
from ndlora_plugins.methods.ndlinear import kronecker_sum
from ndlora_plugins.methods.options import check_choice, check_number
from ndlora_plugins.structures import Chain, Composed, Factor, Layout
from ndlora_plugins.structures.base import Factors

__all__ = ["STEP", "metatt", "nola", "shared_core", "shared_crossed", "shared_diagonal"]

# What a number of a shared factor counts. A factor that a model has once moves as far as one that each layer has, and
# learned best at three times a LoRA recipe's learning rate: so it is held a third as large, and counts three times.
STEP = 3.0


@dataclass(frozen=True)
class Sharing:
    """The layers that share their sides.

    Attributes:
        share: "all", cut to each layer's size; "kind", those of one name such as q_proj; "shape", those of one width.
    """

    share: str = "all"

    def __post_init__(self) -> None:
        check_choice("share", self.share, ("all", "kind", "shape"))


@dataclass(frozen=True)
class CoreSharing(Sharing):
    """`Sharing`, and a choice of what lies between the sides.

    Attributes:
        core: "full", a matrix a layer; "tucker", a vector a layer that mixes rank shared matrices.
    """

    core: str = "full"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice("core", self.core, ("full", "tucker"))


def _wide_sides(layout: Layout, share: str) -> tuple[Factor, Factor]:
    """The sides, as wide as the widest layer that shares them."""
    ins, outs = layout.in_features, layout.out_features
    if share == "all" and layout.largest is not None:
        ins, outs = layout.largest
    rank = layout.rank
    fan_in = 1 if layout.one_hot else layout.in_features
    return Factor("side_in", (rank, ins), fan_in), Factor("side_out", (outs, rank), rank)


def _cut_sides(layout: Layout, core: Callable[[Factors], Tensor]) -> Callable[[Factors], Factors]:
    """Own factors -> those of a chain: the sides cut to the layer's size, and the core that `core` makes."""

    def compose(factors: Factors) -> Factors:
        down = STEP * factors["side_in"][:, : layout.in_features]
        return {"down": down, "core": core(factors), "up": STEP * factors["side_out"][: layout.out_features]}

    return compose


def _side_key(factor: Factor, layer: str, layout: Layout) -> str | None:
    """The key under which a side is shared, or None."""
    if factor.name not in ("side_in", "side_out"):
        return None
    share = layout.options.share
    if share == "all":
        return factor.name
    width = factor.shape[1] if factor.name == "side_in" else factor.shape[0]
    return f"{factor.name}_{_kind(layer) if share == 'kind' else width}"


def _kind(layer: str) -> str:
    return layer.rpartition(".")[2]


def _place(layer: str) -> str:
    """The index of the layer in the model: the first number in the name."""
    return next((part for part in layer.split(".") if part.isdecimal()), "0")


_RANKS = {"side_in": (0,), "side_out": (1,)}


def _shared_core(layout: Layout) -> Composed:
    down, up = _wide_sides(layout, layout.options.share)
    rank = layout.rank
    if layout.options.core == "tucker":
        own = (down, Factor("core", (rank,)), Factor("basis", (rank, rank, rank), rank), up)
        compose = _cut_sides(layout, lambda f: STEP * torch.einsum("abk,k->ab", f["basis"], f["core"]))
        ranks = _RANKS | {"core": (0,), "basis": (0, 1, 2)}
    else:
        own = (down, Factor("core", (rank, rank), rank), up)
        compose, ranks = _cut_sides(layout, lambda f: STEP * f["core"]), _RANKS | {"core": (0, 1)}
    return Composed(layout, Chain(layout), own, compose, _shared_core, ranks)


def _shared_core_key(factor: Factor, layer: str, layout: Layout) -> str | None:
    if factor.name == "basis":
        return "basis" if layout.options.share == "all" else f"basis_{_kind(layer)}"
    return _side_key(factor, layer, layout)


shared_core = Method(
    name="shared_core",
    summary="one pair of sides for all layers, cut to size, and a rank x rank core a layer",
    source="arXiv 2402.01376; arXiv 2212.03145",
    structure=_shared_core,
    factors=("side_in", "core", "side_out"),
    shared=_shared_core_key,
    start="shared_core_zero",
    rank=16,
    Options=CoreSharing,
)


def _shared_diagonal(layout: Layout) -> Composed:
    down, up = _wide_sides(layout, layout.options.share)
    own = (down, Factor("core", (layout.rank,)), up)
    compose = _cut_sides(layout, lambda f: STEP * f["core"])
    ranks = _RANKS | {"core": (0,)}
    return Composed(layout, Chain(layout, core="diagonal"), own, compose, _shared_diagonal, ranks)


shared_diagonal = replace(
    shared_core,
    name="shared_diagonal",
    summary="one pair of sides for all layers, cut to size, and a number a rank and layer",
    source="arXiv 2309.11756; arXiv 2410.04060",
    structure=_shared_diagonal,
    shared=_side_key,
    start="shared_up_zero",
    rank=32,
    Options=Sharing,
)


@dataclass(frozen=True)
class TrainCores(Sharing):
    """`Sharing`, and the cores of the train.

    Attributes:
        core: "full", a matrix for each layer and each kind; "diagonal", a vector: a sum of products of rank 1 over all
            axes (LoRTA's form).
    """

    core: str = "full"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice("core", self.core, ("full", "diagonal"))


def _metatt(layout: Layout) -> Composed:
    down, up = _wide_sides(layout, layout.options.share)
    rank, full = layout.rank, layout.options.core == "full"
    shape = (rank, rank) if full else (rank,)
    own = (down, Factor("kind", shape, rank), Factor("layer", shape, rank), up)

    def core(factors: Factors) -> Tensor:
        layer, kind = STEP * factors["layer"], STEP * factors["kind"]
        return layer @ kind if full else layer * kind

    axes = (0, 1) if full else (0,)
    ranks = _RANKS | {"kind": axes, "layer": axes}
    chain = Chain(layout, core=layout.options.core)
    return Composed(layout, chain, own, _cut_sides(layout, core), _metatt, ranks)


def _metatt_key(factor: Factor, layer: str, layout: Layout) -> str | None:
    own = {"kind": f"kind_{_kind(layer)}", "layer": f"layer_{_place(layer)}"}
    return own.get(factor.name) or _side_key(factor, layer, layout)


metatt = Method(
    name="metatt",
    summary="one tensor train over output, layer, kind and input features: the fewest numbers",
    source="arXiv 2506.09105",
    structure=_metatt,
    factors=("side_in", "kind", "layer", "side_out"),
    shared=_metatt_key,
    start="shared_up_zero",
    rank=16,
    Options=TrainCores,
)


@dataclass(frozen=True)
class SharedModes(CrossedModes):
    """`CrossedModes`; layers that read equally wide inputs share the last mode, before those of a kernel."""


def _mode_key(factor: Factor, layer: str, layout: Layout) -> str | None:
    last = len(kronecker_sum(layout).factors) - len(layout.modes[1])
    if factor.name == "mode_1" or factor.name != f"mode_{last}":
        return None
    return "_".join(map(str, (factor.name, *factor.shape)))


shared_crossed = replace(
    crossed,
    name="shared_crossed",
    summary="crossed modes of which equally wide layers share the last one: about half of the numbers",
    source="docs/methods.md",
    shared=_mode_key,
    Options=SharedModes,
)


@dataclass(frozen=True)
class Bases:
    """The random matrices.

    Attributes:
        bases: how many for each side; a layer trains as many numbers for each.
    """

    bases: int = 512

    def __post_init__(self) -> None:
        check_number("bases", self.bases, least=1, whole=True)


def _nola(layout: Layout) -> Composed:
    ins, outs = layout.largest or (layout.in_features, layout.out_features)
    rank, count = layout.rank, layout.options.bases
    own = (
        Factor("down_mix", (count,)),
        Factor("down_bases", (count, rank, ins)),
        Factor("up_mix", (count,)),
        Factor("up_bases", (count, outs, rank)),
    )
    # whatever the rank, of which a smaller one is a slice
    down_gain = 1 / math.sqrt(count * (1 if layout.one_hot else layout.in_features))
    up_gain = math.sqrt(3 * layout.out_features) / count

    def compose(factors: Factors) -> Factors:
        down = torch.tensordot(factors["down_mix"], factors["down_bases"][..., : layout.in_features], 1)
        up = torch.tensordot(factors["up_mix"], factors["up_bases"][:, : layout.out_features], 1)
        return {"down": down_gain * down, "up": up_gain * up}

    ranks = {"down_bases": (1,), "up_bases": (2,)}
    return Composed(layout, Chain(layout, core="none"), own, compose, _nola, ranks)


nola = Method(
    name="nola",
    summary="LoRA whose sides are mixtures of random matrices that all layers share: 2 x 512 numbers a layer",
    source="arXiv 2310.02556",
    structure=_nola,
    factors=("down_mix", "down_bases", "up_mix", "up_bases"),
    trains=("down_mix", "up_mix"),
    shared=lambda factor, layer, layout: factor.name if factor.name.endswith("_bases") else None,
    start="mixed_bases",
    Options=Bases,
)
