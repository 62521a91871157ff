"""What a method is: named factors, a contraction, and what it becomes as a matrix or as plain LoRA."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

__all__ = ["Factor", "Layout", "Method"]


@dataclass(frozen=True)
class Layout:
    """One adapted layer as a method sees it.

    Attributes:
        in_features, out_features: of the layer, whatever way its weight is stored.
        rank: in the method's own sense (Kronecker terms, or the rank of the product).
        in_modes, out_modes: equally many; their products are the features.
    """

    in_features: int
    out_features: int
    rank: int
    in_modes: tuple[int, ...]
    out_modes: tuple[int, ...]


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

    def multiply_adds(self, layout: Layout) -> int:
        """Multiply-adds of `apply` for one token."""
        raise NotImplementedError
