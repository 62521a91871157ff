"""A structure whose factors are made of other tensors: slices of shared ones, products of small ones."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from torch import Tensor

from ndlora_plugins.structures.base import Factor, Factors, Layout, Structure

__all__ = ["Composed"]


def _view(name: str) -> Any:
    """A function of a structure's factors: that of `inner`, of what they compose."""
    return lambda self, factors, *rest: getattr(self.inner, name)(self.compose(factors), *rest)


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

    apply, product, delta, low_rank = map(_view, ("apply", "product", "delta", "low_rank"))
    kronecker_matrices, norm, lookup, convolve = map(
        _view, ("kronecker_matrices", "norm", "lookup", "convolve")
    )

    def cut(self, rank: int) -> Structure:
        return self.remake(replace(self.layout, rank=rank))

    def added(self, count: int) -> Structure:
        return self.inner.added(count)

    def add(self, parts: Sequence[Factors]) -> dict[str, Tensor]:
        return self.inner.add([self.compose(part) for part in parts])
