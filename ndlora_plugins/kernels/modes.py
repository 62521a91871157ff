"""The mode-wise product: y = sum_t kron(W_1[t], ..., W_N[t]) x without ever forming the Kronecker product.

A factor of mode k has shape (terms, out_mode_k, in_mode_k). `x` is read as a tensor with the axes
(tokens, in_mode_1, ..., in_mode_N), row-major, and each factor replaces one axis.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ndlora_plugins.fused import Gradients, Kept, Product

__all__ = [
    "ContractionPlan",
    "ModeProduct",
    "fastest_product",
    "kron_with_identity",
    "mode_product",
    "others",
    "plan_contraction",
]


@dataclass(frozen=True)
class ContractionPlan:
    """The order in which the modes are contracted, and what one token costs.

    Attributes:
        order: mode indices (from 0), the first to be contracted first.
        multiply_adds: for one token, all terms.
        largest_intermediate: numbers held for one token between two contractions.
    """

    order: tuple[int, ...]
    multiply_adds: int
    largest_intermediate: int


@cache
def plan_contraction(
    in_modes: tuple[int, ...], out_modes: tuple[int, ...], terms: int = 1
) -> ContractionPlan:
    """The cheapest order of contraction.

    Contracting mode k multiplies the running size by out_k / in_k and costs size * out_k. Exchanging two
    neighbours k, l shows that k goes first exactly if 1/in_k - 1/out_k < 1/in_l - 1/out_l, so sorting is optimal.
    """
    order = tuple(
        # ties: the last mode first, where the product is one plain matrix product
        sorted(range(len(in_modes)), key=lambda k: (1 / in_modes[k] - 1 / out_modes[k], -k))
    )
    size, cost, largest = math.prod(in_modes), 0, 0
    for position, k in enumerate(order):
        cost += terms * size * out_modes[k]
        size = size // in_modes[k] * out_modes[k]
        if position < len(order) - 1:
            largest = max(largest, terms * size)
    return ContractionPlan(order, cost, largest)


@dataclass(frozen=True)
class _Step:
    """One axis contracted: (tokens before, in_size, after) -> (tokens before, out_size, after).

    Attributes:
        mode: whose factor (terms, out_mode, in_mode) does it.
        axes: the factor's axes in the order in which they make a matrix, None for the order in which they lie.
        repeats: the step's matrix is kron(that matrix, identity of this size), so that an axis of a few numbers
            after the contracted one becomes a part of it.
    """

    mode: int
    axes: tuple[int, int, int] | None
    out_size: int
    in_size: int
    after: int
    repeats: int = 1

    def matrix(self, factor: Tensor, dtype: torch.dtype) -> Tensor:
        """(out_size, in_size)."""
        if factor.dtype != dtype:
            factor = factor.to(dtype)
        if self.axes is not None:
            factor = factor.permute(self.axes)
        matrix = factor.reshape(self.out_size // self.repeats, self.in_size // self.repeats)
        return matrix if self.repeats == 1 else kron_with_identity(matrix, after=self.repeats)

    def as_factor(self, matrix: Tensor, factor: Tensor) -> Tensor:
        """The way back from `matrix`, for gradients: in the factor's shape and dtype."""
        matrix = matrix.to(factor.dtype)
        if self.repeats > 1:
            # (out, repeats, in, repeats) -> (out, in); not `unflatten`, which vmap does not know
            out_size, in_size = self.out_size // self.repeats, self.in_size // self.repeats
            matrix = matrix.view(out_size, self.repeats, in_size, self.repeats)
            matrix = matrix.diagonal(dim1=1, dim2=3).sum(-1)
        if self.axes is None:
            return matrix.view(factor.shape)
        sizes = [factor.shape[axis] for axis in self.axes]
        return matrix.view(sizes).permute([self.axes.index(axis) for axis in range(3)])

    def apply(self, matrix: Tensor, y: Tensor) -> Tensor:
        """The matrix along the step's axis, or the transposed matrix along the same axis of a gradient."""
        rows, columns = matrix.shape
        if self.after == 1:
            return y.reshape(-1, columns) @ matrix.T
        y = y.reshape(-1, columns, self.after)
        return torch.bmm(matrix.contiguous().expand(y.shape[0], rows, columns), y)

    def add_to(self, result: Tensor, matrix: Tensor, y: Tensor, beta: int, scaling: float) -> None:
        """result = beta * result + scaling * `apply`."""
        rows, columns = matrix.shape
        if self.after == 1:
            result.view(-1, rows).addmm_(y.reshape(-1, columns), matrix.T, beta=beta, alpha=scaling)
        else:
            y = y.reshape(-1, columns, self.after)
            matrices = matrix.contiguous().expand(y.shape[0], rows, columns)
            result.view(-1, rows, self.after).baddbmm_(matrices, y, beta=beta, alpha=scaling)

    def gradient(self, grad: Tensor, y: Tensor) -> Tensor:
        """Of the matrix: the sum over the tokens of grad y^T, at least float32."""
        if self.after == 1:
            grad, y = grad.reshape(-1, self.out_size), y.reshape(-1, self.in_size)
            if grad.shape[0] <= _FEW_ROWS:
                product = grad.T @ y
                return product.to(torch.promote_types(product.dtype, torch.float32))
            # in parts: a long sum for a small result keeps one core busy
            parts = math.gcd(grad.shape[0], 4)
            grad, y = grad.view(parts, -1, self.out_size), y.view(parts, -1, self.in_size)
            return _sum_over_batch(torch.bmm(grad.transpose(1, 2), y))
        grad, y = grad.reshape(-1, self.out_size, self.after), y.reshape(-1, self.in_size, self.after)
        return _sum_over_batch(torch.bmm(grad, y.transpose(1, 2)))


_FEW_ROWS = 2048  # up to so many, one product is faster than one in parts
_FEW_AFTER = 4  # up to so many, one product of more numbers is faster than a small one for each token


def _step(mode: int, axes: tuple[int, int, int] | None, out_size: int, in_size: int, after: int) -> _Step:
    """The step as it is fastest: with few numbers after the contracted axis, these are joined to it."""
    if after > _FEW_AFTER:
        return _Step(mode, axes, out_size, in_size, after)
    return _Step(mode, axes, out_size * after, in_size * after, 1, after)


def _sum_over_batch(products: Tensor) -> Tensor:
    """(batch, rows, columns) -> (rows, columns) in at least float32."""
    batch, rows, columns = products.shape
    wide = torch.promote_types(products.dtype, torch.float32)
    if batch <= 16:
        return products.sum(0, dtype=wide)
    # as a product: several times as fast as `sum`, and its sums are float32 inside
    return (products.new_ones(1, batch) @ products.view(batch, -1)).view(rows, columns).to(wide)


_NUMBERS_AT_A_TIME = 3 << 18  # of an intermediate


@dataclass(frozen=True)
class ModeProduct(Product):
    """The mode-wise product with gradients of its own; its tensors are the factors, one a mode.

    Backward keeps the input of the first axis whose factor trains (x itself, as a rule) and computes anew what
    lies between the axes. Both directions take so many tokens at a time that what lies there stays in cache.

    Attributes:
        chains: steps one after the other; what the chains give is added. Two modes take all their terms through
            one chain, more modes have a chain a term.
        tokens_at_a_time: in either direction.
        two_matrices: two modes and one term.
    """

    in_features: int
    out_features: int
    chains: tuple[tuple[_Step, ...], ...]
    tokens_at_a_time: int
    two_matrices: bool

    def plain(self, x: Tensor, tensors: Sequence[Tensor]) -> Tensor:
        total: Any = None
        for term, chain in enumerate(self.chains):
            y = x
            for step, matrix in zip(chain, self._matrices(chain, term, tensors, x.dtype), strict=True):
                y = step.apply(matrix, y)
            y = y.reshape(*x.shape[:-1], self.out_features)
            total = y if total is None else total + y
        return total

    def forward(
        self,
        x: Tensor,
        tensors: Sequence[Tensor],
        needs: Sequence[bool],
        result: Tensor | None,
        scaling: float,
    ) -> tuple[Tensor, Kept]:
        beta = 1
        if result is None:
            result, beta = x.new_empty(x.shape[0], self.out_features), 0
        first = self._first(needs)
        kept = [x] if first == 0 else []
        for term, chain in enumerate(self.chains):
            matrices = self._matrices(chain, term, tensors, x.dtype)
            for y, into in self._parts(first, x, result):
                for k in range(len(chain) - 1):
                    y = chain[k].apply(matrices[k], y)
                    if k + 1 == first:
                        kept.append(y)
                chain[-1].add_to(into, matrices[-1], y, beta if term == 0 else 1, scaling)
        return result, tuple(kept)

    def add_few(self, tensors: Sequence[Tensor], result: Tensor, x: Tensor, scaling: float) -> None:
        if not self.two_matrices:
            return super().add_few(tensors, result, x, scaling)
        first, second = tensors
        (_, out_1, in_1), (_, out_2, in_2) = first.shape, second.shape
        # (tokens, in_1, in_2) -> (tokens, in_1, out_2) -> (tokens, out_1, out_2)
        x, result = x.reshape(-1, in_1, in_2), result.view(-1, out_1, out_2)
        if len(x) == 1:
            y = torch.bmm(x, second.mT)
        else:
            y, first = F.linear(x, second[0]), first.expand(len(x), out_1, in_1)
        result.baddbmm_(first, y, alpha=scaling)

    def backward(
        self,
        kept: Sequence[Tensor],
        tensors: Sequence[Tensor],
        grad: Tensor,
        needs: Sequence[bool],
        needs_x: bool,
        grad_x: Tensor | None,
        scaling: float,
    ) -> tuple[Tensor | None, Gradients]:
        beta = 1
        if needs_x and grad_x is None:
            grad_x, beta = grad.new_empty(grad.shape[0], self.in_features), 0
        first = self._first(needs)
        # the step whose gradient of the input is the last that is wanted
        last = 0 if needs_x or first is None else first + 1
        gradients = [[] for _ in tensors]
        for term, chain in enumerate(self.chains):
            matrices = self._matrices(chain, term, tensors, grad.dtype)
            totals = {}
            known = None if first is None else kept[min(term, len(kept) - 1)]
            for inner, into, y in self._parts(first, grad, grad_x, known):
                inputs = {first: y}  # of each step
                if first is not None:
                    for k in range(first, len(chain) - 1):
                        inputs[k + 1] = chain[k].apply(matrices[k], inputs[k])
                for k in range(len(chain) - 1, -1, -1):
                    if needs[chain[k].mode]:
                        gradient = chain[k].gradient(inner, inputs[k])
                        totals[k] = totals[k] + gradient if k in totals else gradient
                    if k == 0 and needs_x:
                        chain[0].add_to(into, matrices[0].T, inner, beta if term == 0 else 1, scaling)
                    elif k >= last:
                        inner = chain[k].apply(matrices[k].T, inner)
            for k, total in totals.items():
                factor = tensors[chain[k].mode]
                factor = factor if len(self.chains) == 1 else factor[:1]
                total = total if scaling == 1 else total * scaling
                gradients[chain[k].mode].append(chain[k].as_factor(total, factor))
        return grad_x, [
            (torch.cat(terms) if len(terms) > 1 else terms[0]) if terms else None for terms in gradients
        ]

    def _parts(self, first: int | None, tokens: Tensor, *others: Tensor | None) -> Iterable[tuple[Any, ...]]:
        """Tensors (tokens, ...), as many tokens at a time as stay in cache; all if an intermediate is kept."""
        count, tensors = tokens.shape[0], (tokens, *others)
        if first or count <= self.tokens_at_a_time:
            return (tensors,)
        parts = math.ceil(count / self.tokens_at_a_time)
        even = math.ceil(count / parts)
        return (
            tuple(None if tensor is None else tensor[start : start + even] for tensor in tensors)
            for start in range(0, count, even)
        )

    def _matrices(
        self, chain: Sequence[_Step], term: int, tensors: Sequence[Tensor], dtype: torch.dtype
    ) -> list[Tensor]:
        if len(self.chains) > 1:
            tensors = [tensor[term : term + 1] for tensor in tensors]
        return [step.matrix(tensors[step.mode], dtype) for step in chain]

    def _first(self, needs: Sequence[bool]) -> int | None:
        """The first step whose factor trains; every chain has the same order."""
        return next((k for k, step in enumerate(self.chains[0]) if needs[step.mode]), None)


@cache
def mode_product(in_modes: tuple[int, ...], out_modes: tuple[int, ...], terms: int = 1) -> ModeProduct:
    """The product in the cheapest order of contraction."""
    plan = plan_contraction(in_modes, out_modes, terms)
    order = plan.order
    if len(in_modes) == 2:
        (in_1, in_2), (out_1, out_2) = in_modes, out_modes
        # of factors (terms, out, in); the axis of one term may stay where it lies
        terms_last, terms_between = ((1, 2, 0), (1, 0, 2)) if terms > 1 else (None, None)
        if order == (1, 0):
            # (tokens in_1, in_2) -> (tokens in_1, terms out_2) = (tokens, in_1 terms, out_2) -> (tokens, out_1, out_2)
            chain = (
                _step(1, None, terms * out_2, in_2, 1),
                _step(0, terms_last, out_1, in_1 * terms, out_2),
            )
        else:
            # (tokens, in_1, in_2) -> (tokens, out_1 terms, in_2) = (tokens out_1, terms in_2) -> (tokens out_1, out_2)
            chain = (
                _step(0, terms_between, out_1 * terms, in_1, in_2),
                _step(1, terms_between, out_2, terms * in_2, 1),
            )
        chains = (chain,)
    else:
        sizes, chain = list(in_modes), []
        for k in order:
            chain.append(_step(k, None, out_modes[k], in_modes[k], math.prod(sizes[k + 1 :])))
            sizes[k] = out_modes[k]
        chains = (tuple(chain),) * terms
    tokens = max(1, _NUMBERS_AT_A_TIME // max(plan.largest_intermediate, 1))
    return ModeProduct(
        math.prod(in_modes), math.prod(out_modes), chains, tokens, len(in_modes) == 2 and terms == 1
    )


# (in_modes, out_modes, terms) -> another product, or None where it cannot do it; see `kernels.switch`
others: list[Callable[[tuple[int, ...], tuple[int, ...], int], Product | None]] = []


def fastest_product(in_modes: tuple[int, ...], out_modes: tuple[int, ...], terms: int) -> Product:
    """The first of `others` that can do it, else `mode_product`."""
    made = [make(in_modes, out_modes, terms) for make in others]
    return next((one for one in made if one is not None), mode_product(in_modes, out_modes, terms))


def kron_with_identity(matrix: Tensor, before: int = 1, after: int = 1) -> Tensor:
    """kron(identity, matrix, identity) with identities of these sizes, for (..., out, in) matrices."""
    *batch, rows, columns = matrix.shape
    product = matrix.new_zeros(*batch, before, rows, after, before, columns, after)
    # (..., before, out, after, before, in, after) -> (..., out, in, before, after), the diagonals of the identities
    diagonals = product.diagonal(dim1=-6, dim2=-3).diagonal(dim1=-4, dim2=-2)
    diagonals.copy_(matrix[..., None, None])
    return product.reshape(*batch, before * rows * after, before * columns * after)
