"""Starts of Kronecker terms: factors `mode_1` ... `mode_N`."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Generator, Tensor

from ndlora_plugins.starts.base import RECIPE_ALPHA, Seen, Start, Values, random_but_zero, random_values
from ndlora_plugins.starts.singular import largest_singular_vectors
from ndlora_plugins.structures import KroneckerSum

__all__ = ["first_step_gain", "nearest_kronecker", "starts"]

# half of a LoRA recipe's: as good on the language model, better on sentences and images, and less is forgotten; at
# twice LoRA's rate (docs/evidence.md)
_ALPHA = RECIPE_ALPHA // 2


def first_step_gain(structure: KroneckerSum) -> float:
    """The factor of Kaiming-uniform modes 2 ... N, all together, for a first step as large as LoRA's.

    Adam's first step changes every number by the learning rate, with its gradient's sign. In units of the learning
    rate and of x's root mean square, the output of LoRA (up zero, down Kaiming-uniform) then moves along its gradient
    by alpha * c * c / sqrt(3), with c = sqrt(2 / pi) the mean of |a normal number|, whatever its rank. With mode 1
    zero, Kronecker terms move it by alpha * c * in_mode_1 / sqrt(3)^(N-1), spread over out_mode_2 ... out_mode_N and
    so divided by the root of their product, whatever their number. The gain makes the two equal: the learning rate
    and the alpha of a LoRA recipe hold for any modes and terms.

    For an index, an embedding's input, LoRA starts with N(0, 1) and moves the output by alpha * c, Kronecker terms by
    alpha * c * sqrt(out_mode_1) / sqrt(3)^(N-1).
    """
    others = math.sqrt(3) ** (len(structure.in_modes) - 1)
    if structure.layout.one_hot:
        return others / math.sqrt(structure.out_modes[0])
    spread = math.sqrt(math.prod(structure.out_modes[1:]))
    return math.sqrt(2 / math.pi) / math.sqrt(3) * others * spread / structure.in_modes[0]


def _lora_step(
    structure: KroneckerSum, trains: frozenset[str], seen: Seen, generator: Generator | None
) -> Values:
    gain = first_step_gain(structure) ** (1 / (len(structure.in_modes) - 1))
    start = random_but_zero("mode_1")(structure, trains, seen, generator)
    return {name: gain * value for name, value in start.items()}


def nearest_kronecker(
    weight: Tensor, out_modes: Sequence[int], in_modes: Sequence[int], terms: int = 1
) -> list[Tensor]:
    """Modes of length 1 whose Kronecker products are, in sum and each with a weight, near to `weight`.

    For two modes it is the nearest such sum: the largest singular vectors of the weight rearranged to
    (out_mode_1 in_mode_1, out_mode_2 in_mode_2). Further modes are split off from the second in the same way.

    Args:
        weight: (out_features, in_features), any floating dtype.
        terms: at most out_mode_1 * in_mode_1 and the product of the other modes.

    Returns:
        One tensor a mode, (terms, out_mode, in_mode), float32. The same weight gives the same modes on every device,
        up to rounding: the iterations are counted and their start is fixed, so nothing depends on convergence.

    Source: Van Loan and Pitsianis, Approximation with Kronecker Products (1993).
    """
    if len(in_modes) == 1:
        matrix = weight.float()
        return [(matrix / matrix.norm()).reshape(1, *matrix.shape)]
    out_1, in_1 = out_modes[0], in_modes[0]
    out_rest, in_rest = math.prod(out_modes[1:]), math.prod(in_modes[1:])
    # (out_1 out_rest, in_1 in_rest) -> (out_1 in_1, out_rest in_rest)
    blocks = weight.float().reshape(out_1, out_rest, in_1, in_rest).transpose(1, 2)
    blocks = blocks.reshape(out_1 * in_1, out_rest * in_rest)
    left, _, right = largest_singular_vectors(blocks, terms)
    rest = [nearest_kronecker(row.view(out_rest, in_rest), out_modes[1:], in_modes[1:]) for row in right]
    return [left.view(terms, out_1, in_1), *(torch.cat(mode) for mode in zip(*rest, strict=True))]


def _kronecker(
    structure: KroneckerSum, trains: frozenset[str], seen: Seen, generator: Generator | None
) -> Values:
    gain = first_step_gain(structure) ** (1 / (len(structure.in_modes) - 1))
    modes = nearest_kronecker(seen.weight, structure.out_modes, structure.in_modes, structure.terms)
    # each term of a mode: length 1 -> that of a Kaiming-uniform one, times the gain
    return {
        factor.name: mode * (gain * math.sqrt(math.prod(factor.shape[1:]) / (3 * factor.fan_in)))
        for factor, mode in zip(structure.factors, modes, strict=True)
    }


def _most_terms(structure: KroneckerSum) -> int:
    return min(
        structure.in_modes[0] * structure.out_modes[0],
        math.prod(structure.in_modes[1:]) * math.prod(structure.out_modes[1:]),
    )


starts = (
    Start(
        name="zero_mode",
        summary="the first mode zero, the others Kaiming-uniform: the model starts as it is",
        source="LoRA's rule (arXiv 2106.09685, section 4.1) for Kronecker terms",
        gives=("mode_1", "mode_2"),
        zero=("mode_1",),
        function=random_but_zero("mode_1"),
    ),
    Start(
        name="lora_step",
        summary="zero_mode, scaled so that the learning rate and alpha of a LoRA recipe hold whatever the modes and "
        "terms",
        source="first_step_gain in ndlora_plugins/starts/modes.py; docs/quality_tables.md",
        gives=("mode_1", "mode_2"),
        zero=("mode_1",),
        function=_lora_step,
        alpha=_ALPHA,
    ),
    Start(
        name="kronecker",
        summary="the Kronecker products nearest to the base weight, scaled as lora_step: all modes train from the "
        "first step",
        source="Van Loan and Pitsianis (1993); docs/quality_tables.md",
        gives=("mode_1", "mode_2"),
        reads=frozenset({"weight"}),
        function=_kronecker,
        max_rank=_most_terms,
        alpha=RECIPE_ALPHA,
        implies="ndlinear",
    ),
    Start(
        name="ndlinear",
        summary="every mode as nn.Linear starts, as the reference code does",
        source="github.com/ensemble-core/NdLinear-LoRA",
        gives=("mode_1", "mode_2"),
        function=random_values,
        implies="ndlinear",
    ),
)
