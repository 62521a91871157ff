"""Starts of chains: factors `down`, `core` and `up`."""

from __future__ import annotations

import math
from dataclasses import replace

import torch
from torch import Generator, Tensor

from ndlora_plugins.starts.base import RECIPE_ALPHA, Seen, Start, Values, down_gain, random_but_zero
from ndlora_plugins.structures import Chain

__all__ = ["pivot_columns", "scaled_slices", "smaller_side", "starts"]


def _n_lora(structure: Chain, trains: frozenset[str], seen: Seen, generator: Generator | None) -> Values:
    rank, weight = structure.layout.rank, seen.weight
    return {
        "down": weight[:rank].clone(),
        "core": _fit_core(structure, weight[:rank, :rank]),
        "up": weight[:, :rank].clone(),
    }


def _fit_core(structure: Chain, core: Tensor) -> Tensor:
    return core.diagonal().clone() if structure.core == "diagonal" else core.clone()


def _n_lora_step(structure: Chain, trains: frozenset[str], seen: Seen, generator: Generator | None) -> Values:
    slices = _n_lora(structure, trains, Seen(seen.weight.float()), generator)
    # saved adapters make these again at load, and those of embeddings have them as long as those of linear layers
    linear = replace(structure, layout=replace(structure.layout, one_hot=False))
    return scaled_slices(linear, trains, slices)


def _n_lora_pivots(
    structure: Chain, trains: frozenset[str], seen: Seen, generator: Generator | None
) -> Values:
    weight, rank = seen.weight.float(), structure.layout.rank
    rows, columns = pivot_columns(weight.T, rank), pivot_columns(weight, rank)
    down = weight[rows]
    slices = {"down": down, "core": _fit_core(structure, down[:, columns]), "up": weight[:, columns]}
    return scaled_slices(structure, trains, slices)


def pivot_columns(matrix: Tensor, count: int) -> Tensor:
    """The columns that QR with column pivoting takes first: each time the longest of what those before it leave.

    One product of a row with the matrix for each. Columns that are equally long up to rounding may be taken in another
    order on another device.

    Args:
        matrix: (rows, columns), float32 or float64.
        count: at most the smaller side.

    Returns:
        (count,), integers.

    Source: Businger and Golub, Linear least squares solutions by Householder transformations (1965).
    """
    squares = matrix.square().sum(0)
    basis = matrix.new_zeros(count, matrix.shape[0])  # orthonormal rows
    chosen = torch.empty(count, dtype=torch.long, device=matrix.device)
    for k in range(count):
        chosen[k] = squares.argmax()
        column = matrix[:, chosen[k]]
        for _ in range(2):  # the second time takes away what rounding left
            column = column - basis.T @ (basis @ column)
        basis[k] = column / column.norm().clamp(min=1e-30)
        squares = squares - (basis[k] @ matrix).square()
        squares[chosen[k]] = -math.inf
    return chosen


def scaled_slices(structure: Chain, trains: frozenset[str], slices: Values) -> Values:
    """Slices scaled as if they were LoRA's: down as Kaiming-uniform, core so that it keeps lengths.

    The derivation is that of `first_step_gain`. Where the core alone trains, its rank * rank numbers step at once and
    the output moves by alpha * rank / out_features times the columns' length; the rank numbers of a diagonal core move
    it by a rank-th of that. A core of zeros stays.
    """
    layout = structure.layout
    rank, outs = layout.rank, layout.out_features
    lengths = {"down": math.sqrt(rank / 3), "core": math.sqrt(rank), "up": math.sqrt(rank / 3)}
    if layout.one_hot:
        lengths["down"] *= math.sqrt(layout.in_features) * down_gain(layout)
    if trains == {"core"}:
        lengths["up"] = outs / math.sqrt(rank) * (rank if structure.core == "diagonal" else 1)
    return {name: value * (lengths[name] / value.norm().clamp(min=1e-30)) for name, value in slices.items()}


def smaller_side(structure: Chain) -> int:
    """The largest rank that a matrix of the layer can have."""
    return min(structure.layout.in_features, structure.layout.out_features)


starts = (
    Start(
        name="s_lora",
        summary="down and core Kaiming-uniform, up zero: the model starts as it is",
        source="arXiv 2502.14482; github.com/TracyGuo2001/NLoRA",
        gives=("down", "core", "up"),
        zero=("up",),
        function=random_but_zero("up"),
        implies="slora",
    ),
    Start(
        name="n_lora",
        summary="the first r rows, columns and their corner of the base weight, no SVD",
        source="arXiv 2502.14482; github.com/TracyGuo2001/NLoRA",
        gives=("down", "core", "up"),
        reads=frozenset({"weight"}),
        function=_n_lora,
        max_rank=smaller_side,
        implies="nlora",
    ),
    Start(
        name="n_lora_step",
        summary="n_lora's slices, scaled so that the learning rate and alpha of a LoRA recipe hold; not on embeddings",
        source="arXiv 2502.14482; scaled_slices in ndlora_plugins/starts/chain.py; docs/quality_tables.md",
        gives=("down", "core", "up"),
        reads=frozenset({"weight"}),
        function=_n_lora_step,
        max_rank=smaller_side,
        alpha=RECIPE_ALPHA,
        implies="nlora",
    ),
    Start(
        name="n_lora_pivots",
        summary="n_lora_step, but with the rows and columns that QR with column pivoting takes, which are saved",
        source="Businger and Golub (1965); docs/quality_tables.md",
        gives=("down", "core", "up"),
        reads=frozenset({"weight"}),
        recomputable=False,
        function=_n_lora_pivots,
        max_rank=smaller_side,
        alpha=RECIPE_ALPHA,
        implies="nlora",
    ),
)
