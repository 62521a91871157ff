"""dW = sum_t kron(W_1[t], ..., W_N[t]): a small matrix for each mode of the layer's features."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, reduce

import torch
import torch.nn.functional as F
from torch import Tensor

from ndlora_plugins.fused import Product
from ndlora_plugins.kernels.modes import fastest_product, kron_with_identity, mode_product, plan_contraction
from ndlora_plugins.structures.base import Factor, Factors, Layout, Structure

__all__ = ["KroneckerSum", "kronecker", "kronecker_terms"]


@dataclass(frozen=True)
class KroneckerSum(Structure):
    """Factors `mode_1` ... `mode_N`, each (terms, out_mode, in_mode).

    Source: arXiv 2503.17353; https://github.com/ensemble-core/NdLinear (`ndlinear.py`) has N modes and one term.

    Attributes:
        in_modes, out_modes: equally many; their products are the layout's features, row-major.
        copies: the terms are so many times the layout's rank.
    """

    layout: Layout
    in_modes: tuple[int, ...]
    out_modes: tuple[int, ...]
    copies: int = 1

    @property
    def terms(self) -> int:
        """Kronecker products that are added up."""
        return self.copies * self.layout.rank

    @cached_property
    def factors(self) -> tuple[Factor, ...]:
        return tuple(
            Factor(f"mode_{k}", (self.terms, out, in_), fan_in=1 if self.layout.one_hot else in_)
            for k, (out, in_) in enumerate(zip(self.out_modes, self.in_modes, strict=True), start=1)
        )

    @property
    def rank_axes(self) -> dict[str, tuple[int, ...]]:
        return {factor.name: (0,) for factor in self.factors}

    @property
    def multiply_adds(self) -> int:
        return plan_contraction(self.in_modes, self.out_modes, self.terms).multiply_adds

    @property
    def mode_sizes(self) -> dict[str, tuple[int, ...]]:
        return {"in_modes": self.in_modes, "out_modes": self.out_modes}

    @property
    def rank(self) -> int:
        return self.terms

    @property
    def unit(self) -> KroneckerSum:
        return replace(self, layout=replace(self.layout, rank=1, options=None), copies=1)

    @property
    def lopsidedness(self) -> float:
        # modes that are axes of the weight, experts and kernel, are left out
        ins, outs = self.in_modes, self.out_modes
        before, after = self.layout.modes
        first, last = len(before), len(ins) - len(after)
        if outs[:first] == before and ins[last:] == after:
            ins, outs = ins[first:last], outs[first:last]
        numbers = sum(i * o for i, o in zip(ins, outs, strict=True))
        return numbers / (len(ins) * (math.prod(ins) * math.prod(outs)) ** (1 / len(ins)))

    def apply(self, factors: Factors, x: Tensor) -> Tensor:
        return mode_product(self.in_modes, self.out_modes, self.terms).plain(x, self._modes(factors))

    def product(self, factors: Factors) -> tuple[Product, tuple[Tensor, ...]]:
        product = fastest_product(self.in_modes, self.out_modes, self.terms)
        return product, tuple(self._modes(factors))

    def delta(self, factors: Factors) -> Tensor:
        return kronecker(self._modes(factors))

    def low_rank(self, factors: Factors) -> tuple[Tensor, Tensor] | None:
        # kron(A, B) = kron(A, I) kron(I, B) = kron(I, B) kron(A, I); small for modes that cross
        ins, outs = self.in_modes, self.out_modes
        inner, split, second_first = min(
            (math.prod((*left[:k], *right[k:])), k, second_first)
            for k in range(1, len(ins))
            for left, right, second_first in ((ins, outs, True), (outs, ins, False))
        )
        features = self.layout.in_features, self.layout.out_features
        if self.terms * inner * sum(features) > math.prod(features):
            return None
        modes = self._modes(factors)
        first, second = kronecker_terms(modes[:split]), kronecker_terms(modes[split:])
        if second_first:
            down = kron_with_identity(second, before=first.shape[2])
            up = kron_with_identity(first, after=second.shape[1])
        else:
            down = kron_with_identity(first, after=second.shape[2])
            up = kron_with_identity(second, before=first.shape[1])
        # the terms, one below the other and side by side
        return down.flatten(0, 1), up.transpose(0, 1).flatten(1)

    def kronecker_matrices(self, factors: Factors) -> list[Tensor] | None:
        return [mode[0] for mode in self._modes(factors)] if self.terms == 1 else None

    def norm(self, factors: Factors) -> Tensor:
        # <kron(A_1, .., A_N), kron(B_1, .., B_N)> = prod_k <A_k, B_k>, for every pair of terms
        flats = [mode.flatten(1) for mode in self._modes(factors)]  # (terms, out_mode in_mode)
        return reduce(torch.mul, [flat @ flat.T for flat in flats]).sum().clamp(min=0).sqrt()

    def lookup(self, factors: Factors, indices: Tensor) -> Tensor:
        # a column of a Kronecker product is the Kronecker product of columns
        positions = torch.unravel_index(indices.reshape(-1), self.in_modes)
        columns = (
            F.embedding(index, mode.flatten(0, 1).T).view(-1, *mode.shape[:2])
            for mode, index in zip(self._modes(factors), positions, strict=True)
        )
        # (tokens, terms, out so far, 1) * (tokens, terms, 1, out_mode)
        rows = reduce(lambda rows, more: (rows.unsqueeze(3) * more.unsqueeze(2)).flatten(2), columns)
        return rows.sum(1).reshape(*indices.shape, self.layout.out_features)

    def convolve(
        self, factors: Factors, x: Tensor, convolution: Callable[[Tensor, Tensor], Tensor]
    ) -> Tensor:
        modes = self._modes(factors)
        kernel = self.layout.modes[1]
        channels = len(modes) - len(kernel)
        if self.in_groups(x) or [mode.shape[1:] for mode in modes[channels:]] != [(1, k) for k in kernel]:
            return super().convolve(factors, x, convolution)
        # each term: one small kernel for all channels, then the channels mode by mode
        weights = kronecker_terms(modes[channels:]) if kernel else x.new_ones(self.terms)
        planes = x.flatten(0, 1).unsqueeze(1)
        planes = convolution(planes, weights.reshape(self.terms, 1, *self.layout.trailing))
        planes = planes.view(*x.shape[:2], *planes.shape[1:])  # (batch, channels, terms, *size)
        product = mode_product(self.in_modes[:channels], self.out_modes[:channels])
        updates = (
            product.plain(planes[:, :, k].movedim(1, -1), [mode[k : k + 1] for mode in modes[:channels]])
            for k in range(self.terms)
        )
        return reduce(torch.add, updates).movedim(-1, 1)

    def added(self, count: int) -> KroneckerSum:
        return replace(self, copies=count * self.copies)

    def add(self, parts: Sequence[Factors]) -> dict[str, Tensor]:
        return {factor.name: torch.cat([part[factor.name] for part in parts]) for factor in self.factors}

    def _modes(self, factors: Factors) -> list[Tensor]:
        return [factors[factor.name] for factor in self.factors]


def kronecker(factors: Sequence[Tensor]) -> Tensor:
    """The sum of Kronecker products as a matrix (out_features, in_features). For merging, never for training.

    Source: dW = kron(W_1, ..., W_N), row-major; arXiv 2503.17353.
    """
    if len(factors) == 1:
        return factors[0].sum(0)
    first, last = kronecker_terms(factors[:-1]), factors[-1]
    # the terms are summed in one product: (out in, terms) (terms, out_mode in_mode)
    product = (first.flatten(1).T @ last.flatten(1)).view(*first.shape[1:], *last.shape[1:])
    return product.transpose(1, 2).flatten(2).flatten(0, 1)


def kronecker_terms(factors: Sequence[Tensor]) -> Tensor:
    """Each term as a matrix: (terms, out_features, in_features)."""
    product = factors[0]
    for factor in factors[1:]:
        # (terms, out, 1, in, 1) * (terms, 1, out_mode, 1, in_mode)
        product = (product[:, :, None, :, None] * factor[:, None, :, None, :]).flatten(3).flatten(1, 2)
    return product
