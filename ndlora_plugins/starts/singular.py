"""Singular vectors that are the same on every machine."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["largest_singular_vectors"]


def largest_singular_vectors(
    matrix: Tensor, count: int, iterations: int = 4
) -> tuple[Tensor, Tensor, Tensor]:
    """The largest of a matrix, by subspace iteration from a fixed start: equal up to rounding on every device.

    Args:
        matrix: (rows, columns), floating.
        count: at most the smaller side.

    Returns:
        left (count, rows), the singular values (count,), falling, and right (count, columns). Each right vector's sum
        is not negative, so that signs do not depend on the library.

    Source: Halko, Martinsson, Tropp, arXiv 0909.4061, algorithms 4.4 and 5.1.
    """
    start = torch.randn(matrix.shape[1], count, generator=torch.Generator().manual_seed(0))
    right = torch.linalg.qr(start.to(matrix)).Q
    for _ in range(iterations):
        right = torch.linalg.qr(matrix.T @ (matrix @ right)).Q
    # within the subspace: the singular vectors, the largest first
    left, values, turn = torch.linalg.svd(matrix @ right, full_matrices=False)
    right = turn @ right.T
    signs = torch.where(right.sum(dim=1) < 0, -1.0, 1.0).to(matrix)
    return (left * signs).T.contiguous(), values, right * signs[:, None]
