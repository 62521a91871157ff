"""What a method is: named factors, a contraction, and what it becomes as a matrix or as plain LoRA."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ndlora_plugins.fused import Product

__all__ = ["Factor", "Layout", "Method", "in_groups"]


@dataclass(frozen=True)
class Layout:
    """One adapted layer as a method sees it.

    Attributes:
        in_features, out_features: of the layer, whatever way its weight is stored.
        rank: in the method's own sense (Kronecker terms, or the rank of the product).
        in_modes, out_modes: equally many; their products are the features.
        leading: axes of the weight before its out axis, part of `out_features`: experts.
        trailing: axes of the weight after its in axis, part of `in_features`: a convolution's kernel.
        one_hot: an input is one feature out of all, as an embedding's: what reads it has a fan-in of 1.
    """

    in_features: int
    out_features: int
    rank: int
    in_modes: tuple[int, ...]
    out_modes: tuple[int, ...]
    leading: tuple[int, ...] = ()
    trailing: tuple[int, ...] = ()
    one_hot: bool = False


@dataclass(frozen=True)
class Factor:
    """One named tensor of a method.

    Attributes:
        name: stands in the adapter file, after the layer's name.
        shape: of the tensor.
        fan_in: what a Kaiming initialisation divides by.
        trainable: whether it gets gradients; if not it is given by the initialiser and stays.
    """

    name: str
    shape: tuple[int, ...]
    fan_in: int
    trainable: bool = True


class Method:
    """A family of updates dW. Subclass it, fill in the attributes and functions, and hand an instance to the
    hook `ndlora_methods` (docs/development.md shows a whole one).

    Every function is pure: it gets the layout and the factors by name, and changes neither.
    """

    name: str
    summary: str
    source: str
    default_rank: int = 8
    default_initializer: str
    # whether `num_modes` and `modes` mean something to it
    uses_modes: bool = False

    def factors(self, layout: Layout) -> tuple[Factor, ...]:
        """The factors of a layer, in a fixed order."""
        raise NotImplementedError

    def apply(self, layout: Layout, factors: Mapping[str, Tensor], x: Tensor) -> Tensor:
        """dW x for activations x (..., in_features) -> (..., out_features), without scaling, dW never formed."""
        raise NotImplementedError

    def delta(self, layout: Layout, factors: Mapping[str, Tensor]) -> Tensor:
        """dW itself, (out_features, in_features), without scaling: for merging."""
        raise NotImplementedError

    def lookup(self, layout: Layout, factors: Mapping[str, Tensor], indices: Tensor) -> Tensor:
        """Columns of dW for integer indices (...) -> (..., out_features), without scaling: an embedding's update.

        From the low-rank form where there is one; dW is formed only without one.
        """
        low_rank = self.low_rank(layout, factors)
        if low_rank is None:
            return F.embedding(indices, self.delta(layout, factors).T)
        down, up = low_rank
        return F.linear(F.embedding(indices, down.T), up)

    def convolve(
        self,
        layout: Layout,
        factors: Mapping[str, Tensor],
        x: Tensor,
        convolution: Callable[[Tensor, Tensor], Tensor],
    ) -> Tensor:
        """The convolution of x with dW, without scaling.

        Two thin convolutions from the low-rank form where there is one; dW is formed only without one, or if the
        layer has groups.

        Args:
            x: (batch, in_channels, *size).
            convolution: (x, weight (out, in, *kernel)) -> y, with the layer's stride, padding and dilation, in as
                many groups as the channels of x make of the weight's.
        """
        low_rank = None if in_groups(layout, x) else self.low_rank(layout, factors)
        if low_rank is None:
            delta = self.delta(layout, factors)
            return convolution(x, delta.reshape(layout.out_features, -1, *layout.trailing))
        down, up = low_rank
        # (k, in_channels, *kernel), then a matrix over the channels
        y = convolution(x, down.reshape(len(down), -1, *layout.trailing))
        return torch.matmul(up, y.flatten(2)).view(len(y), len(up), *y.shape[2:])

    def low_rank(self, layout: Layout, factors: Mapping[str, Tensor]) -> tuple[Tensor, Tensor] | None:
        """dW = up @ down exactly, as (down (k, in_features), up (out_features, k)); None if no small k exists."""
        return None

    def delta_norm(self, layout: Layout, factors: Mapping[str, Tensor]) -> Tensor:
        """||dW||_F, a scalar, without scaling: for watching a training.

        From the Gram matrices of the low-rank form where there is one, ||up @ down||^2 = <up^T up, down down^T>:
        dW is formed only without one.
        """
        low_rank = self.low_rank(layout, factors)
        if low_rank is None:
            return self.delta(layout, factors).norm()
        down, up = low_rank
        # (k, out) (out, k) and (k, in) (in, k); rounding may leave the square of a zero a little below zero
        return ((up.T @ up) * (down @ down.T)).sum().clamp(min=0).sqrt()

    def start_factors(self, layout: Layout) -> tuple[str, ...]:
        """The factors whose start the telescoped form below needs."""
        return tuple(factor.name for factor in self.factors(layout))

    def anchored(
        self, layout: Layout, start: Mapping[str, Tensor], change: Mapping[str, Tensor]
    ) -> dict[str, Tensor]:
        """Factors, in this method's own structure, of dW(start + change) - dW(start), telescoped: no two large
        products are subtracted, so nothing is lost to rounding, and change = 0 gives exactly 0.
        """
        raise NotImplementedError

    def anchored_layout(self, layout: Layout) -> Layout:
        """The layout that the factors of `anchored` have: usually one of a larger rank."""
        return layout

    def product(
        self, layout: Layout, factors: Mapping[str, Tensor]
    ) -> tuple[Product, tuple[Tensor, ...]] | None:
        """`apply` with gradients of its own, and the tensors to hand to it; None where `apply` is all there is."""
        return None

    def anchored_product(
        self, layout: Layout, start: Mapping[str, Tensor], change: Mapping[str, Tensor]
    ) -> tuple[Product, tuple[Tensor, ...]] | None:
        """`product` of the factors that `anchored` gives."""
        return self.product(self.anchored_layout(layout), self.anchored(layout, start, change))

    def multiply_adds(self, layout: Layout) -> int:
        """Multiply-adds of `apply` for one token."""
        raise NotImplementedError


def in_groups(layout: Layout, x: Tensor) -> bool:
    """Whether a convolution of x (batch, in_channels, *size) has groups: each sees a part of the channels."""
    return x.shape[1] * math.prod(layout.trailing) != layout.in_features
