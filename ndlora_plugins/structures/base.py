"""What an update is: a multilinear form of named factors, and what every such form can do."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import reduce
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from ndlora_plugins.fused import Product

__all__ = ["LOPSIDED_RATIO", "Factor", "Factors", "Layout", "Structure"]

Factors = Mapping[str, Tensor]

LOPSIDED_RATIO = 4.0  # from here on `Structure.lopsidedness` is worth a warning


@dataclass(frozen=True)
class Layout:
    """One adapted layer as a method sees it.

    Attributes:
        in_features, out_features: of the layer, whatever way its weight is stored.
        rank: in the method's own sense (Kronecker terms, or the rank of the product).
        options: the method's own, an instance of its `Options`.
        leading: axes of the weight before its out axis, part of `out_features`: experts.
        trailing: axes of the weight after its in axis, part of `in_features`: a convolution's kernel.
        one_hot: an input is one feature out of all, as an embedding's: what reads it has a fan-in of 1.
        largest: (in features, out features), the most that any adapted layer has; None where layers share nothing.
    """

    in_features: int
    out_features: int
    rank: int
    options: Any = None
    leading: tuple[int, ...] = ()
    trailing: tuple[int, ...] = ()
    one_hot: bool = False
    largest: tuple[int, int] | None = None

    @property
    def modes(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """The axes of `leading` and of `trailing` that are longer than 1: modes of their own."""
        before, after = (tuple(n for n in axes if n > 1) for axes in (self.leading, self.trailing))
        return before, after


@dataclass(frozen=True)
class Factor:
    """One named tensor of a structure.

    Attributes:
        name: stands in the adapter file, after the layer's name.
        shape: of the tensor.
        fan_in: what a Kaiming start divides by.
        indices: None for a floating tensor; else it holds integers from 0 up to below this, and never trains.
    """

    name: str
    shape: tuple[int, ...]
    fan_in: int = 1
    indices: int | None = None

    @property
    def numel(self) -> int:
        """Numbers in the tensor."""
        return math.prod(self.shape)


class Structure:
    """dW (out_features, in_features) as a multilinear form: linear in each factor while the others stay.

    A subclass is a frozen dataclass that gives `factors`, `apply`, `delta`, `multiply_adds`, `added` and `add`; the
    rest follows, and is overridden where there is a cheaper way. Every function is pure, takes the factors by name,
    and leaves the scaling to its caller.

    Attributes:
        layout: the layer it is for.
    """

    layout: Layout

    @property
    def factors(self) -> tuple[Factor, ...]:
        """The factors, in a fixed order."""
        raise NotImplementedError

    @property
    def rank_axes(self) -> Mapping[str, tuple[int, ...]]:
        """Factor -> its axes that the rank numbers: a smaller rank is a slice of these. Empty if there are none."""
        return {}

    @property
    def multiply_adds(self) -> int:
        """Multiply-adds of `apply` for one token."""
        raise NotImplementedError

    @property
    def mode_sizes(self) -> Mapping[str, tuple[int, ...]]:
        """The split of the features, as the options `in_modes` and `out_modes` say it; empty where they are not."""
        return {}

    @property
    def lopsidedness(self) -> float:
        """Numbers of the factors over those of an ideal split into even modes; 1.0 where there are none."""
        return 1.0

    def apply(self, factors: Factors, x: Tensor) -> Tensor:
        """dW x for activations x (..., in_features) -> (..., out_features), dW never formed."""
        raise NotImplementedError

    def product(self, factors: Factors) -> tuple[Product, tuple[Tensor, ...]] | None:
        """`apply` with gradients of its own, and the tensors to hand to it; None where `apply` is all there is."""
        return None

    def delta(self, factors: Factors) -> Tensor:
        """dW itself, (out_features, in_features): for merging, never for training."""
        raise NotImplementedError

    def low_rank(self, factors: Factors) -> tuple[Tensor, Tensor] | None:
        """dW = up @ down exactly, as (down (k, in_features), up (out_features, k)); None if no small k exists."""
        return None

    def kronecker_matrices(self, factors: Factors) -> Sequence[Tensor] | None:
        """dW = kron(W_1, ..., W_N) exactly, as the matrices W_k (out_mode, in_mode); None if it is no such product."""
        return None

    def norm(self, factors: Factors) -> Tensor:
        """||dW||_F, a scalar.

        From the Gram matrices of the low-rank form where there is one, ||up @ down||^2 = <up^T up, down down^T>:
        dW is formed only without one.
        """
        low_rank = self.low_rank(factors)
        if low_rank is None:
            return self.delta(factors).norm()
        down, up = low_rank
        # (k, out) (out, k) and (k, in) (in, k); rounding may leave the square of a zero a little below zero
        return ((up.T @ up) * (down @ down.T)).sum().clamp(min=0).sqrt()

    def lookup(self, factors: Factors, indices: Tensor) -> Tensor:
        """Columns of dW for integer indices (...) -> (..., out_features): an embedding's update.

        From the low-rank form where there is one; dW is formed only without one.
        """
        low_rank = self.low_rank(factors)
        if low_rank is None:
            return F.embedding(indices, self.delta(factors).T)
        down, up = low_rank
        return F.linear(F.embedding(indices, down.T), up)

    def convolve(
        self, factors: Factors, x: Tensor, convolution: Callable[[Tensor, Tensor], Tensor]
    ) -> Tensor:
        """The convolution of x with dW.

        Two thin convolutions from the low-rank form where there is one; dW is formed only without one, or if the
        layer has groups.

        Args:
            x: (batch, in_channels, *size).
            convolution: (x, weight (out, in, *kernel)) -> y, with the layer's stride, padding and dilation, in as
                many groups as the channels of x make of the weight's.
        """
        kernel = self.layout.trailing
        low_rank = None if self.in_groups(x) else self.low_rank(factors)
        if low_rank is None:
            return convolution(x, self.delta(factors).reshape(self.layout.out_features, -1, *kernel))
        down, up = low_rank
        # (k, in_channels, *kernel), then a matrix over the channels
        y = convolution(x, down.reshape(len(down), -1, *kernel))
        return torch.matmul(up, y.flatten(2)).view(len(y), len(up), *y.shape[2:])

    def in_groups(self, x: Tensor) -> bool:
        """Tell whether a convolution of x (batch, in_channels, *size) has groups: each sees a part of the channels."""
        return x.shape[1] * math.prod(self.layout.trailing) != self.layout.in_features

    # A smaller rank

    def cut(self, rank: int) -> Structure:
        """The structure of a smaller rank, whose factors `cut_factors` gives."""
        return replace(cast(Any, self), layout=replace(self.layout, rank=rank))

    def cut_factors(self, factors: Factors, rank: int) -> dict[str, Tensor]:
        """The factors of `cut`: the first `rank` along `rank_axes`."""
        return {
            name: reduce(lambda part, axis: part.narrow(axis, 0, rank), self.rank_axes.get(name, ()), value)
            for name, value in factors.items()
        }

    # Sums

    @property
    def rank(self) -> int:
        """The number of updates of rank 1 that are added up: the layout's rank, but for sums."""
        return self.layout.rank

    @property
    def unit(self) -> Structure | None:
        """The structure of rank 1 if `rank` of its updates add up to this one's, factor beside factor; else None."""
        return None

    def added(self, count: int) -> Structure:
        """The structure of a sum of `count` updates of this structure."""
        raise NotImplementedError

    def add(self, parts: Sequence[Factors]) -> dict[str, Tensor]:
        """The factors, in the structure `added(len(parts))`, of the sum of these updates."""
        raise NotImplementedError

    # The change since a start: dW(start + change) - dW(start) of a multilinear form is the sum over the factors k that
    # change of dW(start_1, .., start_{k-1}, change_k, now_{k+1}, .., now_N), with now = start + change. No two large
    # products are subtracted, so nothing is lost to rounding, and change = 0 gives exactly 0.

    def changed(self, names: frozenset[str]) -> Structure:
        """The structure of the update's change where these of its factors change."""
        return self if len(names) == 1 else self.added(len(names))

    def change(self, start: Factors, change: Factors) -> Mapping[str, Tensor]:
        """The factors, in the structure `changed`, of dW(start + change) - dW(start).

        Args:
            start: those of `start_factors`.
            change: of the factors that change.
        """
        names = [factor.name for factor in self.factors]
        if len(change) == 1:
            return {**start, **change}
        now = {name: start[name] + change[name] if name in change else start[name] for name in names}
        parts = (
            {name: (start if k < m else now)[name] for k, name in enumerate(names)}
            | {changed: change[changed]}
            for m, changed in enumerate(names)
            if changed in change
        )
        return self.add(list(parts))

    def change_product(self, start: Factors, change: Factors) -> tuple[Product, tuple[Tensor, ...]] | None:
        """`product` of the change."""
        return self.changed(frozenset(change)).product(self.change(start, change))

    def start_factors(self, names: frozenset[str]) -> tuple[str, ...]:
        """The factors whose start the change needs: all, but for one that changes alone."""
        return tuple(factor.name for factor in self.factors if names != {factor.name})
