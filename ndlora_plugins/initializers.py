"""Where factors start. An initialiser gives every factor its value, from nothing, a generator, or the weight."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Generator, Tensor

from ndlora_plugins.methods.base import Factor, Layout, Method

__all__ = [
    "Initializer",
    "builtin_initializers",
    "first_step_gain",
    "kaiming_uniform",
    "nearest_kronecker",
    "pivot_columns",
]

Values = dict[str, Tensor]


@dataclass(frozen=True)
class Initializer:
    """A named start.

    Attributes:
        name: what `init_lora_weights` is set to.
        summary: one line for `ndlora methods`.
        source: paper, or reference file.
        methods: names of the methods it can start, all if empty; the first follows from the name alone.
        reads_weight: whether it needs the base weight.
        saves_start: whether frozen factors that come from the weight are saved. If not, they are recomputed at load.
        starts_at_zero: whether dW is zero at the start, so that no anchor is needed.
        refuses: method -> why this start cannot work for it, for the error message.
        function: (method, layout, weight, generator) -> a value for every factor, float32 (or the weight's
            dtype). `weight` is (out_features, in_features), or None unless `reads_weight`.
        max_rank: the largest rank that a layout allows, or None for any.
        default_alpha: the alpha that it is made for; None for the rank.
    """

    name: str
    summary: str
    source: str
    methods: tuple[str, ...]
    reads_weight: bool
    starts_at_zero: bool
    function: Callable[[Method, Layout, Tensor | None, Generator | None], Values]
    refuses: Mapping[str, str] = field(default_factory=dict, hash=False)
    saves_start: bool = False
    max_rank: Callable[[Layout], int] | None = None
    default_alpha: float | None = None


def kaiming_uniform(factor: Factor, generator: Generator | None = None) -> Tensor:
    """U(+-1/sqrt(fan_in)): torch's `kaiming_uniform_(a=sqrt(5))`, the start of every `nn.Linear`."""
    bound = 1 / math.sqrt(factor.fan_in)
    return torch.empty(factor.shape, dtype=torch.float32).uniform_(-bound, bound, generator=generator)


def _random(method: Method, layout: Layout, weight: Tensor | None, generator: Generator | None) -> Values:
    return {factor.name: kaiming_uniform(factor, generator) for factor in method.factors(layout)}


def _random_but_zero(zero: str):
    def start(method: Method, layout: Layout, weight: Tensor | None, generator: Generator | None) -> Values:
        values = _random(method, layout, weight, generator)
        return {name: torch.zeros_like(value) if name == zero else value for name, value in values.items()}

    return start


# what LoRA recipes have with r=8, and the starts below in place of alpha = rank
_RECIPE_ALPHA = 16


def first_step_gain(layout: Layout) -> float:
    """What Kaiming-uniform modes 2 ... N are multiplied by, all together, for a first step as large as LoRA's.

    Adam's first step changes every number by the learning rate, with its gradient's sign. In units of the learning
    rate and of x's root mean square, the output of LoRA (up zero, down Kaiming-uniform) then moves along its gradient
    by alpha * c * c / sqrt(3), with c = sqrt(2 / pi) the mean of |a normal number|, whatever its rank. With mode 1
    zero, Kronecker terms move it by alpha * c * in_mode_1 / sqrt(3)^(N-1), spread over out_mode_2 ... out_mode_N and
    so divided by the root of their product, whatever their number. The gain makes the two equal: the learning rate
    and the alpha of a LoRA recipe hold for any modes and terms.

    For an index, an embedding's input, LoRA starts with N(0, 1) and moves the output by alpha * c, Kronecker terms by
    alpha * c * sqrt(out_mode_1) / sqrt(3)^(N-1).
    """
    others = math.sqrt(3) ** (len(layout.in_modes) - 1)
    if layout.one_hot:
        return others / math.sqrt(layout.out_modes[0])
    spread = math.sqrt(math.prod(layout.out_modes[1:]))
    return math.sqrt(2 / math.pi) / math.sqrt(3) * others * spread / layout.in_modes[0]


def _lora_step(method: Method, layout: Layout, weight: Tensor | None, generator: Generator | None) -> Values:
    gain = first_step_gain(layout) ** (1 / (len(layout.in_modes) - 1))
    start = _random_but_zero("mode_1")(method, layout, weight, generator)
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
    left, right = _largest_singular_vectors(blocks, terms)
    rest = [nearest_kronecker(row.view(out_rest, in_rest), out_modes[1:], in_modes[1:]) for row in right]
    return [left.view(terms, out_1, in_1), *(torch.cat(mode) for mode in zip(*rest, strict=True))]


def _largest_singular_vectors(matrix: Tensor, count: int, iterations: int = 4) -> tuple[Tensor, Tensor]:
    """(count, rows) and (count, columns) of a (rows, columns) matrix, by subspace iteration from a fixed start."""
    start = torch.randn(matrix.shape[1], count, generator=torch.Generator().manual_seed(0))
    right = torch.linalg.qr(start.to(matrix.device)).Q
    for _ in range(iterations):
        right = torch.linalg.qr(matrix.T @ (matrix @ right)).Q
    # within the subspace: the singular vectors, the largest first, with signs that do not depend on the library
    left, values, turn = torch.linalg.svd(matrix @ right, full_matrices=False)
    right = turn @ right.T
    signs = torch.where(right.sum(dim=1) < 0, -1.0, 1.0).to(matrix)
    return (left * signs).T.contiguous(), right * signs[:, None]


def _kronecker(method: Method, layout: Layout, weight: Tensor | None, generator: Generator | None) -> Values:
    gain = first_step_gain(layout) ** (1 / (len(layout.in_modes) - 1))
    modes = nearest_kronecker(weight, layout.out_modes, layout.in_modes, layout.rank)
    factors = method.factors(layout)
    # each term of a mode: length 1 -> that of a Kaiming-uniform one, times the gain
    return {
        factor.name: mode * (gain * math.sqrt(math.prod(factor.shape[1:]) / (3 * factor.fan_in)))
        for factor, mode in zip(factors, modes, strict=True)
    }


def _kronecker_terms(layout: Layout) -> int:
    return min(
        layout.in_modes[0] * layout.out_modes[0],
        math.prod(layout.in_modes[1:]) * math.prod(layout.out_modes[1:]),
    )


def _smaller_side(layout: Layout) -> int:
    return min(layout.in_features, layout.out_features)


def _n_lora(method: Method, layout: Layout, weight: Tensor | None, generator: Generator | None) -> Values:
    rank = layout.rank
    return {
        "down": weight[:rank].clone(),
        "core": weight[:rank, :rank].clone(),
        "up": weight[:, :rank].clone(),
    }


def _n_lora_step(
    method: Method, layout: Layout, weight: Tensor | None, generator: Generator | None
) -> Values:
    return _scaled_slices(method, layout, _n_lora(method, layout, weight.float(), generator))


def _n_lora_pivots(
    method: Method, layout: Layout, weight: Tensor | None, generator: Generator | None
) -> Values:
    weight = weight.float()
    rows, columns = pivot_columns(weight.T, layout.rank), pivot_columns(weight, layout.rank)
    down = weight[rows]
    return _scaled_slices(method, layout, {"down": down, "core": down[:, columns], "up": weight[:, columns]})


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


def _scaled_slices(method: Method, layout: Layout, slices: Values) -> Values:
    """Slices scaled as if they were LoRA's: down as Kaiming-uniform, core so that it keeps lengths.

    The derivation is that of `first_step_gain`. Where the core alone trains, its rank * rank numbers step at once and
    the output moves by alpha * rank / out_features times the columns' length.
    """
    rank = layout.rank
    core_alone = [factor.name for factor in method.factors(layout) if factor.trainable] == ["core"]
    lengths = {
        "down": math.sqrt(rank / 3),
        "core": math.sqrt(rank),
        "up": layout.out_features / math.sqrt(rank) if core_alone else math.sqrt(rank / 3),
    }
    return {name: value * (lengths[name] / value.norm().clamp(min=1e-30)) for name, value in slices.items()}


builtin_initializers = (
    Initializer(
        "zero_mode",
        "the first mode zero, the others Kaiming-uniform: the model starts as it is",
        "LoRA's rule (arXiv 2106.09685, section 4.1) for Kronecker terms",
        ("ndlinear",),
        reads_weight=False,
        starts_at_zero=True,
        function=_random_but_zero("mode_1"),
    ),
    Initializer(
        "lora_step",
        "zero_mode, scaled so that the learning rate and alpha of a LoRA recipe hold whatever the modes and terms",
        "first_step_gain in ndlora_plugins/initializers.py; docs/quality.md",
        ("ndlinear",),
        reads_weight=False,
        starts_at_zero=True,
        function=_lora_step,
        default_alpha=_RECIPE_ALPHA,
    ),
    Initializer(
        "kronecker",
        "the Kronecker products nearest to the base weight, scaled as lora_step: all modes train from the first step",
        "Van Loan and Pitsianis (1993); docs/quality.md",
        ("ndlinear",),
        reads_weight=True,
        starts_at_zero=False,
        function=_kronecker,
        max_rank=_kronecker_terms,
        default_alpha=_RECIPE_ALPHA,
    ),
    Initializer(
        "ndlinear",
        "every mode as nn.Linear starts, as the reference code does",
        "github.com/ensemble-core/NdLinear-LoRA",
        ("ndlinear",),
        reads_weight=False,
        starts_at_zero=False,
        function=_random,
    ),
    Initializer(
        "s_lora",
        "down and core Kaiming-uniform, up zero: the model starts as it is",
        "arXiv 2502.14482; github.com/TracyGuo2001/NLoRA",
        ("slora", "nlora"),
        reads_weight=False,
        starts_at_zero=True,
        function=_random_but_zero("up"),
        refuses={
            "inttune": "it starts `up` at zero and IntTune keeps `up` frozen, so the core would never get a gradient"
        },
    ),
    Initializer(
        "n_lora",
        "the first r rows, columns and their corner of the base weight, no SVD",
        "arXiv 2502.14482; github.com/TracyGuo2001/NLoRA",
        ("nlora", "slora", "inttune"),
        reads_weight=True,
        starts_at_zero=False,
        function=_n_lora,
        max_rank=_smaller_side,
    ),
    Initializer(
        "n_lora_step",
        "n_lora's slices, scaled so that the learning rate and alpha of a LoRA recipe hold",
        "arXiv 2502.14482; _n_lora_step in ndlora_plugins/initializers.py; docs/quality.md",
        ("nlora", "inttune"),
        reads_weight=True,
        starts_at_zero=False,
        function=_n_lora_step,
        max_rank=_smaller_side,
        default_alpha=_RECIPE_ALPHA,
    ),
    Initializer(
        "n_lora_pivots",
        "n_lora_step, but with the rows and columns that QR with column pivoting takes, which are saved",
        "Businger and Golub (1965); docs/quality.md",
        ("nlora",),
        reads_weight=True,
        starts_at_zero=False,
        function=_n_lora_pivots,
        saves_start=True,
        max_rank=_smaller_side,
        default_alpha=_RECIPE_ALPHA,
    ),
    Initializer(
        "random",
        "every factor Kaiming-uniform and no anchor: for tests (init_lora_weights=False)",
        "torch.nn.Linear",
        (),
        reads_weight=False,
        starts_at_zero=False,
        function=_random,
    ),
)
