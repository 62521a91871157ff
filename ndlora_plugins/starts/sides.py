"""Starts of methods that keep a side, or a choice of features, from the weight, the gradient or a seed."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Generator, Tensor

from ndlora_plugins.methods.frozen_sides import FirstStep
from ndlora_plugins.starts.base import (
    RECIPE_ALPHA,
    Seen,
    Start,
    Values,
    down_gain,
    kaiming_uniform,
    random_values,
)
from ndlora_plugins.starts.chain import scaled_slices, smaller_side
from ndlora_plugins.starts.singular import largest_singular_vectors
from ndlora_plugins.structures import Chain, Structure

__all__ = ["starts"]

SIDES = ("down", "core", "up")

# lora_sb's sides are so much longer than orthonormal ones, and its core shorter by the square: the model is the same,
# and a LoRA recipe's learning rate holds (with orthonormal sides 3 to 10 times that was best; docs/evidence.md).
LORA_SB_LENGTH = 2.0


def _shape(structure: Structure, name: str) -> tuple[int, ...]:
    return next(factor.shape for factor in structure.factors if factor.name == name)


def _zero_core(structure: Chain, down: Tensor, up: Tensor) -> Values:
    return {"down": down, "core": torch.zeros(_shape(structure, "core")), "up": up}


def _lora_xs(structure: Chain, trains: frozenset[str], seen: Seen, generator: Generator | None) -> Values:
    left, values, right = largest_singular_vectors(seen.weight.float(), structure.layout.rank)
    return _zero_core(structure, values[:, None] * right, left.T)


def _singular_sides(reads: str) -> Callable[..., Values]:
    """A start's function: scaled sides from the largest singular vectors of what it reads, a core of zeros."""

    def function(structure: Chain, trains: frozenset[str], seen: Seen, generator: Generator | None) -> Values:
        left, _, right = largest_singular_vectors(getattr(seen, reads).float(), structure.layout.rank)
        return _scaled_sides(structure, trains, right, left.T)

    return function


def _scaled_sides(structure: Chain, trains: frozenset[str], down: Tensor, up: Tensor) -> Values:
    """Sides scaled so that a LoRA recipe's learning rate holds, and a core of zeros: see `scaled_slices`."""
    return scaled_slices(structure, trains, _zero_core(structure, down, up))


def _random_sides(
    structure: Chain, trains: frozenset[str], seen: Seen, generator: Generator | None
) -> Values:
    sides = {name: torch.randn(_shape(structure, name), generator=seen.draw(name)) for name in ("down", "up")}
    return _scaled_sides(structure, trains, **sides)


def _lu(structure: Chain, trains: frozenset[str], seen: Seen, generator: Generator | None) -> Values:
    rank = structure.layout.rank
    permutation, lower, upper = torch.linalg.lu(seen.weight.float())
    pivots = upper.diagonal()[:rank, None]
    down = upper[:rank] / torch.where(pivots == 0, 1, pivots)
    return _scaled_sides(structure, trains, down, permutation @ lower[:, :rank])


def _lora_sb(structure: Chain, trains: frozenset[str], seen: Seen, generator: Generator | None) -> Values:
    gradient, options = seen.gradient.float(), structure.layout.options
    if not isinstance(options, FirstStep):  # another method's
        options = FirstStep()
    if options.sign:
        step = gradient.sign()
    else:  # as long as its sign
        step = gradient * (math.sqrt(gradient.numel()) / gradient.norm().clamp(min=1e-30))
    left, values, right = largest_singular_vectors(-options.first_step * step, structure.layout.rank)
    core = values / LORA_SB_LENGTH**2
    return structure.hold(LORA_SB_LENGTH * right, LORA_SB_LENGTH * left.T) | {
        "core": core if structure.core == "diagonal" else torch.diag(core)
    }


def _lora_ga(structure: Chain, trains: frozenset[str], seen: Seen, generator: Generator | None) -> Values:
    rank = structure.layout.rank
    left, _, right = largest_singular_vectors(seen.gradient.float(), 2 * rank)
    return scaled_slices(structure, trains, structure.hold(right[:rank], left[rank:].T))


def _seeded(structure: Structure, trains: frozenset[str], seen: Seen, generator: Generator | None) -> Values:
    values = {factor.name: kaiming_uniform(factor, seen.draw(factor.name)) for factor in structure.factors}
    return _with_no_up(structure, values)


def _with_no_up(structure: Structure, values: Values) -> Values:
    """Up zero, down so long that the first step is LoRA's."""
    down = down_gain(structure.layout) * values["down"]
    return values | {"down": down, "up": torch.zeros_like(values["up"])}


def _tiles(structure: Chain, trains: frozenset[str], seen: Seen, generator: Generator | None) -> Values:
    layout = structure.layout
    tiles = torch.eye(layout.rank).repeat(1, -(-layout.in_features // layout.rank))[:, : layout.in_features]
    return structure.hold(tiles, torch.zeros(_shape(structure, "up")))


def _smallest_singular(
    structure: Chain, trains: frozenset[str], seen: Seen, generator: Generator | None
) -> Values:
    # the smallest values first; each vector's sum is not negative
    left = torch.linalg.svd(seen.weight.float(), full_matrices=False).U
    vectors = left.flip(1)[:, : structure.layout.rank]
    up = vectors * torch.where(vectors.sum(0) < 0, -1.0, 1.0)
    return structure.hold(torch.zeros(_shape(structure, "down")), up)


def _open_gates(structure: Chain, trains: frozenset[str], seen: Seen, generator: Generator | None) -> Values:
    values = _with_no_up(structure, random_values(structure, trains, seen, generator))
    return structure.hold(values["down"], values["up"])


def _features(reads: str) -> Callable[..., Values]:
    """A start's function: features drawn from the seed, or the longest of what it reads; the other side zero."""

    def function(structure: Chain, trains: frozenset[str], seen: Seen, generator: Generator | None) -> Values:
        values, count = {}, structure.layout.rank
        for factor in structure.factors:
            if factor.indices is None:
                values[factor.name] = torch.zeros(factor.shape)
                continue
            if reads == "seed":
                order = torch.randperm(factor.indices, generator=seen.draw(factor.name))
            else:  # of equal norms the first
                norms = getattr(seen, reads).float().norm(dim=1 if factor.name == "rows" else 0)
                order = norms.sort(descending=True, stable=True).indices
            values[factor.name] = order[:count].sort().values
        return values

    return function


def _half_side(structure: Chain) -> int:
    return smaller_side(structure) // 2


def _choices(side: str, other: str) -> tuple[Start, ...]:
    rules = (
        ("random", "seed", "drawn from the seed"),
        ("weight", "weight", "of the largest norm in the weight"),
        ("gradient", "gradient", "of the largest gradient"),
    )
    return tuple(
        Start(
            name=f"{name}_{side}",
            summary=f"{side} {text}, their change zero",
            source="arXiv 2412.06289",
            gives=(side, other),
            zero=(other,),
            reads=frozenset({reads}),
            recomputable=reads != "gradient",
            function=_features(reads),
        )
        for name, reads, text in rules
    )


starts = (
    Start(
        name="svd_step",
        summary="sides from the largest singular vectors of the weight, scaled so that a LoRA recipe holds; core zero",
        source="arXiv 2405.17604; scaled_slices in ndlora_plugins/starts/chain.py",
        gives=SIDES,
        zero=("core",),
        reads=frozenset({"weight"}),
        function=_singular_sides("weight"),
        max_rank=smaller_side,
        alpha=RECIPE_ALPHA,
    ),
    Start(
        name="random_sides",
        summary="normal sides, drawn from the seed by the layer's name, scaled so that a LoRA recipe holds; core zero",
        source="arXiv 2310.11454; scaled_slices in ndlora_plugins/starts/chain.py",
        gives=SIDES,
        zero=("core",),
        reads=frozenset({"seed"}),
        function=_random_sides,
        alpha=RECIPE_ALPHA,
    ),
    Start(
        name="lora_xs",
        summary="down from singular values and vectors, up from vectors of the weight, core zero",
        source="arXiv 2405.17604; github.com/MohammadrezaBanaei/LoRA-XS, there with a core of noise of 1e-5",
        gives=SIDES,
        zero=("core",),
        reads=frozenset({"weight"}),
        function=_lora_xs,
        max_rank=smaller_side,
        implies="lora_xs",
    ),
    Start(
        name="lu",
        summary="sides from the LU decomposition with partial pivoting, scaled so that a LoRA recipe holds; core zero",
        source="github.com/SKDDJ/LoLDU (minloldu/loldu.py)",
        gives=SIDES,
        zero=("core",),
        reads=frozenset({"weight"}),
        function=_lu,
        max_rank=smaller_side,
        alpha=RECIPE_ALPHA,
    ),
    Start(
        name="lora_sb",
        summary="the largest singular vectors and values of a first step of full fine-tuning: moves the model by it",
        source="arXiv 2411.19557; github.com/RaghavSinghal10/lora-sb, there with orthonormal sides",
        gives=SIDES,
        reads=frozenset({"gradient"}),
        recomputable=False,
        moves=True,
        function=_lora_sb,
        max_rank=smaller_side,
        implies="lora_sb",
    ),
    Start(
        name="gradient_step",
        summary="sides from the first gradient's singular vectors, scaled so that a LoRA recipe holds; core zero",
        source="arXiv 2411.19557; scaled_slices in ndlora_plugins/starts/chain.py",
        gives=SIDES,
        zero=("core",),
        reads=frozenset({"gradient"}),
        recomputable=False,
        function=_singular_sides("gradient"),
        max_rank=smaller_side,
        alpha=RECIPE_ALPHA,
    ),
    Start(
        name="lora_ga",
        summary="down from the first r, up from the next r singular vectors of the first gradient",
        source="arXiv 2407.05000; github.com/Outsider565/LoRA-GA (ArB2r), scaled as n_lora_step",
        gives=SIDES,
        reads=frozenset({"gradient"}),
        recomputable=False,
        function=_lora_ga,
        max_rank=_half_side,
        alpha=RECIPE_ALPHA,
    ),
    Start(
        name="seeded",
        summary="up zero, the others Kaiming-uniform, drawn from the seed by the layer's name",
        source="arXiv 2403.12313",
        gives=("down", "up"),
        zero=("up",),
        reads=frozenset({"seed"}),
        function=_seeded,
        alpha=RECIPE_ALPHA,
    ),
    Start(
        name="tiles",
        summary="down a row of identity matrices, up zero",
        source="arXiv 2409.15371; peft tuners/miss/layer.py",
        gives=("down", "up"),
        zero=("up",),
        reads=frozenset({"seed"}),
        function=_tiles,
    ),
    Start(
        name="smallest_singular",
        summary="up from the smallest singular vectors of the weight, down zero",
        source="arXiv 2604.01694; peft tuners/lora/variants.py",
        gives=("down", "up"),
        zero=("down",),
        reads=frozenset({"weight"}),
        recomputable=False,
        function=_smallest_singular,
        max_rank=smaller_side,
    ),
    Start(
        name="open_gates",
        summary="down Kaiming-uniform, the core an identity, up zero",
        source="arXiv 2311.11696, there with gates from N(0, 1)",
        gives=SIDES,
        zero=("up",),
        function=_open_gates,
        alpha=RECIPE_ALPHA,
    ),
    *_choices("rows", "down"),
    *_choices("columns", "up"),
)
