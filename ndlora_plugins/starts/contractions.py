"""Starts of contractions and of what layers share: one factor zero, the first step as large as LoRA's."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Generator, Tensor

from ndlora_plugins.methods.shared import STEP
from ndlora_plugins.starts.base import RECIPE_ALPHA, Seen, Start, Values, down_gain, random_values
from ndlora_plugins.structures import Structure

__all__ = ["first_step", "starts"]

_PROBES = 16


def first_step(structure: Structure, values: Values, name: str) -> float:
    """The length by which Adam's first step of one factor, which is zero, moves the output, LoRA's step being 1.

    Adam changes every number of the factor by the learning rate, with its gradient's sign: the output moves along a
    direction d by the sum of the absolute values of d's gradient by the factor. It is measured on random inputs and
    directions, and divided by the same of LoRA: see `modes.first_step_gain`.
    """
    layout, generator = structure.layout, torch.Generator().manual_seed(0)
    leaf = torch.zeros_like(values[name], device="cpu", requires_grad=True)
    factors = {**{key: value.cpu().float() for key, value in values.items()}, name: leaf}
    moved = 0.0
    for _ in range(_PROBES):
        direction = torch.randn(layout.out_features, generator=generator)
        with torch.enable_grad():
            if layout.one_hot:
                output = structure.lookup(
                    factors, torch.randint(layout.in_features, (1,), generator=generator)
                )
            else:
                output = structure.apply(factors, torch.randn(1, layout.in_features, generator=generator))
            (gradient,) = torch.autograd.grad((output * direction).sum(), leaf)
        moved += float(gradient.abs().sum()) / _PROBES
    # of an up of zeros behind a Kaiming-uniform down, or what an embedding's LoRA has
    lora = layout.rank * layout.out_features * 2 / math.pi / math.sqrt(3) * down_gain(layout)
    return moved / lora


def _scaled(structure: Structure, trains: frozenset[str], values: Values, zero: str) -> Values:
    """One factor zero, the others that train scaled alike so that the first step is LoRA's."""
    values = values | {zero: torch.zeros_like(values[zero])}
    others = [name for name in values if name in trains and name != zero]
    gain = max(first_step(structure, values, zero), 1e-30) ** (-1 / len(others))
    return values | {name: gain * values[name] for name in others}


def _scaled_but_zero(zero: str) -> Callable[..., Values]:
    """A start's function: one factor zero, the others Kaiming-uniform, scaled as `_scaled` does."""

    def function(
        structure: Structure, trains: frozenset[str], seen: Seen, generator: Generator | None
    ) -> Values:
        return _scaled(structure, trains, random_values(structure, trains, seen, generator), zero)

    return function


def _drawn(seen: Seen, name: str, shape: tuple[int, ...], bound: float) -> Tensor:
    """U(-bound, bound) from the seed, once for all layers that share it."""
    if name in seen.shared:
        return seen.shared[name]
    return torch.empty(shape).uniform_(-bound, bound, generator=seen.draw(name))


def _random_network(
    structure: Structure, trains: frozenset[str], seen: Seen, generator: Generator | None
) -> Values:
    values = {
        factor.name: torch.ones(factor.shape)
        if factor.name in trains
        else _drawn(seen, factor.name, factor.shape, math.sqrt(3 / factor.fan_in))
        for factor in structure.factors
    }
    return _scaled(structure, trains, values, structure.factors[0].name)


def _mixed_bases(
    structure: Structure, trains: frozenset[str], seen: Seen, generator: Generator | None
) -> Values:
    shapes = {factor.name: factor.shape for factor in structure.factors}
    # with mixes of 1 `down` is as long as LoRA's, and one step of all of `up`'s as its step
    bounds = {"down_bases": 1.0, "up_bases": math.sqrt(structure.layout.rank)}
    values = {name: _drawn(seen, name, shapes[name], bound) for name, bound in bounds.items()}
    mix = torch.empty(shapes["down_mix"]).normal_(generator=seen.draw("down_mix"))
    return {"down_mix": down_gain(structure.layout) * mix, "up_mix": torch.zeros(shapes["up_mix"]), **values}


def _shared_core_zero(
    structure: Structure, trains: frozenset[str], seen: Seen, generator: Generator | None
) -> Values:
    values = _normal(structure, generator)
    rank = structure.layout.rank
    # each number of side_out from N(0, 9.2 / rank ** 1.5): the best of those that were tried
    spread = {"core": 0.0, "side_out": 9.2 / rank}
    return {name: spread.get(name, 1.0) * value for name, value in values.items()}


def _shared_up_zero(
    structure: Structure, trains: frozenset[str], seen: Seen, generator: Generator | None
) -> Values:
    # layers that share their sides and had equal cores would all move alike in the first steps
    values = _normal(structure, generator)
    for name, value in values.items():
        if name == "side_in":
            values[name] = down_gain(structure.layout) * value / STEP  # what side_out counts more
        elif name != "side_out":
            turned = torch.linalg.qr(value)[0] if value.dim() == 2 else value.sign()
            values[name] = turned / STEP
    return values | {"side_out": torch.zeros_like(values["side_out"])}


def _normal(structure: Structure, generator: Generator | None) -> Values:
    """N(0, 1 / fan_in), as held: a shared number counts STEP times."""
    return {
        factor.name: torch.empty(factor.shape).normal_(generator=generator)
        / (STEP * math.sqrt(factor.fan_in))
        for factor in structure.factors
    }


starts = (
    Start(
        name="train_step",
        summary="the first factor of the train zero, the others Kaiming-uniform, scaled so that a LoRA recipe holds",
        source="first_step in ndlora_plugins/starts/contractions.py",
        gives=("train_1", "train_2"),
        zero=("train_1",),
        function=_scaled_but_zero("train_1"),
        alpha=RECIPE_ALPHA,
    ),
    Start(
        name="core_zero",
        summary="the core zero, the sides Kaiming-uniform, scaled so that a LoRA recipe holds",
        source="arXiv 2405.14739; first_step in ndlora_plugins/starts/contractions.py",
        gives=("axis_in", "core", "axis_out"),
        zero=("core",),
        function=_scaled_but_zero("core"),
        alpha=RECIPE_ALPHA,
    ),
    Start(
        name="shared_core_zero",
        summary="normal sides, a core of zeros in every layer",
        source="arXiv 2402.01376, there with sides from N(0, 1)",
        gives=("side_in", "core", "side_out"),
        zero=("core",),
        function=_shared_core_zero,
    ),
    Start(
        name="shared_up_zero",
        summary="side_out zero, side_in normal, what lies between them random and orthogonal",
        source="arXiv 2212.03145, there with cores as torch.nn.Linear starts",
        gives=("side_in", "side_out"),
        zero=("side_out",),
        function=_shared_up_zero,
        alpha=RECIPE_ALPHA,
    ),
    Start(
        name="random_network",
        summary="a random network from the seed; vectors of ones, the first of zeros",
        source="arXiv 2509.03234 (abstract); first_step in ndlora_plugins/starts/contractions.py",
        gives=("scale_out1", "scale_in1", "random_core"),
        zero=("scale_out1",),
        reads=frozenset({"seed"}),
        function=_random_network,
        alpha=RECIPE_ALPHA,
    ),
    Start(
        name="mixed_bases",
        summary="random matrices from the seed; down a mixture as long as LoRA's, up zero",
        source="arXiv 2310.02556; github.com/UCDvision/NOLA",
        gives=("down_mix", "down_bases", "up_mix", "up_bases"),
        zero=("up_mix",),
        reads=frozenset({"seed"}),
        function=_mixed_bases,
        alpha=RECIPE_ALPHA,
    ),
)
