"""dW as plain LoRA's two matrices: exactly where the method has that form, else the best of a chosen rank.

A Kronecker product's singular values are all products of its factors' ones, and its singular vectors the
Kronecker products of theirs (Van Loan, J. Comput. Appl. Math. 123, 2000, section 2), so one term costs the
SVDs of its small factors. Any other update is reduced by products with it alone (Halko, Martinsson, Tropp,
arXiv 0909.4061, algorithms 4.4 and 5.1). Everything is computed in float64.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ndlora_plugins.adapter import LayerAdapter
from ndlora_plugins.errors import NdLoraValueError
from ndlora_plugins.fused import cast_factors
from ndlora_plugins.structures.base import Factors

__all__ = [
    "RankTarget",
    "kronecker_low_rank",
    "low_rank_form",
    "product_low_rank",
    "randomized_low_rank",
    "relative_error",
]

Products = Callable[[Tensor], Tensor]

_OVERSAMPLING = 10
_POWER_ITERATIONS = 3
_FIRST_SKETCH = 16
_SMALL_SIDE = 256


@dataclass(frozen=True)
class RankTarget:
    """A rule for the rank of a layer. Exactly one of the three is given.

    Attributes:
        rank: this one (or the layer's smaller side).
        energy: the smallest whose squared singular values make up this share of all, in (0, 1].
        max_error: the smallest whose relative error ||dW - up down||_F / ||dW||_F is at most this, in [0, 1).
    """

    rank: int | None = None
    energy: float | None = None
    max_error: float | None = None

    def __post_init__(self):
        given = {name: value for name, value in vars(self).items() if value is not None}
        if len(given) != 1:
            raise NdLoraValueError(f"rank, energy, max_error: give one of the three, not {given or 'none'}.")
        if self.rank is not None and (not isinstance(self.rank, int) or self.rank < 1):
            raise NdLoraValueError(f"rank={self.rank!r}: choose an integer of at least 1.")
        if self.energy is not None and not 0 < self.energy <= 1:
            raise NdLoraValueError(
                f"energy={self.energy!r}: choose a share above 0 and up to 1, such as 0.99."
            )
        if self.max_error is not None and not 0 <= self.max_error < 1:
            raise NdLoraValueError(
                f"max_error={self.max_error!r}: choose a value from 0 to below 1, such as 0.05."
            )

    def rank_for(self, values: Tensor, total: float) -> int | None:
        """The rank for singular values (falling), or None if more of them are needed.

        Args:
            total: the sum of the squares of all singular values, those not in `values` too.
        """
        if self.rank is not None:
            return self.rank if self.rank <= len(values) else None
        if self.energy is not None:
            lost = 1 - self.energy
        else:
            assert self.max_error is not None, "exactly one of the three is given"
            lost = self.max_error**2
        # what rounding leaves of an exact zero
        enough = total - values.square().cumsum(0) <= (lost + 1e-14) * total
        return int(enough.int().argmax()) + 1 if enough.any() else None


def low_rank_form(
    plan: LayerAdapter,
    trained: Factors,
    frozen: Factors,
    target: RankTarget | None = None,
) -> tuple[Tensor, Tensor]:
    """(down (k, in_features), up (out_features, k)) in float64: up @ down is dW without scaling, or near it.

    Args:
        target: None for the exact form; else a smaller rank is taken where it suffices.

    Raises:
        NdLoraValueError: there is no exact form, and no target.
    """
    trained, frozen = _wide(trained), _wide(frozen)
    with torch.no_grad():
        update, factors = plan.update(trained, frozen)
        exact = update.low_rank(factors)
        if exact is not None:
            if target is None or (target.rank is not None and target.rank >= exact[0].shape[0]):
                return exact
            return product_low_rank(*exact, target)
        if target is None:
            raise NdLoraValueError(
                f"method={plan.method.name!r} has no exact form of a small rank: choose a rank, an energy or a "
                f"max_error."
            )
        matrices = update.kronecker_matrices(factors)
        if matrices is not None:
            return kronecker_low_rank(matrices, target)
        return randomized_low_rank(
            lambda x: update.apply(factors, x),
            (plan.layout.out_features, plan.layout.in_features),
            plan.delta_norm(trained, frozen) ** 2,
            target,
        )


def kronecker_low_rank(matrices: Sequence[Tensor], target: RankTarget) -> tuple[Tensor, Tensor]:
    """The best (down, up) for kron(W_1, ..., W_N), from the SVDs of the W_k (out_mode, in_mode)."""
    parts = [torch.linalg.svd(matrix, full_matrices=False) for matrix in matrices]
    values = torch.ones(1, dtype=matrices[0].dtype)
    for _, part, _ in parts:
        values = torch.outer(values, part).flatten()
    values, order = values.sort(descending=True, stable=True)
    rank = target.rank_for(values, float(values.square().sum())) or len(values)
    # which singular vector of each mode: row-major, as the values were multiplied out
    chosen = torch.unravel_index(order[:rank], [len(part) for _, part, _ in parts])
    left = right = torch.ones(1, rank, dtype=values.dtype)
    for (u, _, vh), index in zip(parts, chosen, strict=True):
        # (features so far, 1, rank) * (1, mode, rank) -> (features, rank)
        left = (left[:, None] * u[:, index]).flatten(0, 1)
        right = (right[:, None] * vh[index].T).flatten(0, 1)
    return _balanced(left, values[:rank], right.T)


def product_low_rank(down: Tensor, up: Tensor, target: RankTarget) -> tuple[Tensor, Tensor]:
    """The best (down, up) of a smaller rank for up @ down, by two QRs and the SVD of the small middle."""
    left, left_r = torch.linalg.qr(up)
    right, right_r = torch.linalg.qr(down.T)
    u, values, vh = torch.linalg.svd(left_r @ right_r.T, full_matrices=False)
    rank = target.rank_for(values, float(values.square().sum())) or len(values)
    return _balanced(left @ u[:, :rank], values[:rank], vh[:rank] @ right.T)


def randomized_low_rank(
    apply: Products, shape: tuple[int, int], total: float, target: RankTarget
) -> tuple[Tensor, Tensor]:
    """(down, up) near the best, for an update that is only known by its products. Reproducible.

    Args:
        apply: dW x, (k, in_features) -> (k, out_features), linear and differentiable, float64.
        shape: (out_features, in_features).
        total: ||dW||_F squared; the loss of every rank follows from it exactly.
    """
    smaller = min(shape)
    sketch = target.rank + _OVERSAMPLING if target.rank is not None else _FIRST_SKETCH
    while True:
        if smaller <= _SMALL_SIDE or 2 * sketch >= smaller:  # no dearer: the whole matrix, of this one layer
            left, small = None, apply(torch.eye(shape[1], dtype=torch.float64)).T
        else:
            left = _range(apply, shape, sketch)
            small = _transposed(apply, left.T, shape[1])  # (sketch, in)
        u, values, vh = torch.linalg.svd(small, full_matrices=False)
        rank = target.rank_for(values, total)
        if rank is not None or left is None:
            rank = rank or len(values)
            u = u[:, :rank] if left is None else left @ u[:, :rank]
            return _balanced(u, values[:rank], vh[:rank])
        sketch *= 2


def _range(apply: Products, shape: tuple[int, int], sketch: int) -> Tensor:
    """An orthonormal (out_features, sketch) that holds most of dW's range: subspace iteration."""
    generator = torch.Generator().manual_seed(0)
    basis = torch.randn(shape[1], sketch, dtype=torch.float64, generator=generator)
    left = torch.linalg.qr(apply(basis.T).T)[0]
    for _ in range(_POWER_ITERATIONS):
        right = torch.linalg.qr(_transposed(apply, left.T, shape[1]).T)[0]
        left = torch.linalg.qr(apply(right.T).T)[0]
    return left


def _transposed(apply: Products, y: Tensor, in_features: int) -> Tensor:
    """dW^T y, (k, out_features) -> (k, in_features): the gradient of <y, dW x>, for every method alike."""
    with torch.enable_grad():
        x = torch.zeros(y.shape[0], in_features, dtype=y.dtype, requires_grad=True)
        return torch.autograd.grad(apply(x), x, y)[0]


def _balanced(left: Tensor, values: Tensor, right: Tensor) -> tuple[Tensor, Tensor]:
    """(down, up) of equal size, so that neither loses more to a narrower dtype."""
    root = values.sqrt()
    return root[:, None] * right, left * root


def relative_error(
    plan: LayerAdapter,
    trained: Factors,
    frozen: Factors,
    down: Tensor,
    up: Tensor,
    scaling: float = 1.0,
) -> float:
    """||scaling dW - up down||_F / ||scaling dW||_F, neither formed; not resolved below about 1e-7."""
    trained, frozen, down, up = _wide(trained), _wide(frozen), down.double(), up.double()
    with torch.no_grad():
        norm = scaling * plan.delta_norm(trained, frozen)
        product = float(((up.T @ up) * (down @ down.T)).sum())
        # <dW, up down> = sum_k up[:, k] . dW down[k]
        update, factors = plan.update(trained, frozen)
        cross = scaling * float((update.apply(factors, down) * up.T).sum())
    if norm == 0:
        return math.inf if product > 0 else 0.0
    squared = (norm**2 - 2 * cross + product) / norm**2
    return math.sqrt(squared) if squared > 1e-14 else 0.0


def _wide(tensors: Factors) -> dict[str, Tensor]:
    return cast_factors({name: value.detach() for name, value in tensors.items()}, torch.float64)
