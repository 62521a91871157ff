"""A structure whose factors are made of other tensors: slices of shared ones, products of small ones."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from torch import Tensor

from ndlora_plugins.fused import Product
from ndlora_plugins.structures.base import Factor, Factors, Layout, Structure

__all__ = ["Composed"]


@dataclass(frozen=True)
class Composed(Structure):
    """The update of `inner`, whose factors are composed of this structure's own, once for all tokens of a forward.

    Attributes:
        inner: the structure that meets the tokens.
        own: the factors of this structure.
        compose: own factors, by name -> those of `inner`; linear in each.
        remake: layout -> the same form; for a smaller rank.
        ranks: what `rank_axes` gives.
    """

    layout: Layout
    inner: Structure
    own: tuple[Factor, ...]
    compose: Callable[[Factors], Mapping[str, Tensor]] = field(compare=False)
    remake: Callable[[Layout], Structure] = field(compare=False)
    ranks: Mapping[str, tuple[int, ...]] = field(default_factory=dict, compare=False)

    @property
    def factors(self) -> tuple[Factor, ...]:
        return self.own

    @property
    def rank_axes(self) -> Mapping[str, tuple[int, ...]]:
        return self.ranks

    @property
    def multiply_adds(self) -> int:
        return self.inner.multiply_adds

    @property
    def mode_sizes(self) -> Mapping[str, tuple[int, ...]]:
        return self.inner.mode_sizes

    def apply(self, factors: Factors, x: Tensor) -> Tensor:
        return self.inner.apply(self.compose(factors), x)

    def product(self, factors: Factors) -> tuple[Product, tuple[Tensor, ...]] | None:
        return self.inner.product(self.compose(factors))

    def delta(self, factors: Factors) -> Tensor:
        return self.inner.delta(self.compose(factors))

    def low_rank(self, factors: Factors) -> tuple[Tensor, Tensor] | None:
        return self.inner.low_rank(self.compose(factors))

    def kronecker_matrices(self, factors: Factors) -> Sequence[Tensor] | None:
        return self.inner.kronecker_matrices(self.compose(factors))

    def norm(self, factors: Factors) -> Tensor:
        return self.inner.norm(self.compose(factors))

    def lookup(self, factors: Factors, indices: Tensor) -> Tensor:
        return self.inner.lookup(self.compose(factors), indices)

    def convolve(
        self, factors: Factors, x: Tensor, convolution: Callable[[Tensor, Tensor], Tensor]
    ) -> Tensor:
        return self.inner.convolve(self.compose(factors), x, convolution)

    def cut(self, rank: int) -> Structure:
        return self.remake(replace(self.layout, rank=rank))

    def added(self, count: int) -> Structure:
        return self.inner.added(count)

    def add(self, parts: Sequence[Factors]) -> dict[str, Tensor]:
        return self.inner.add([self.compose(part) for part in parts])
