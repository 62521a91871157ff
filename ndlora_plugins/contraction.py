"""The mode-wise product: y = sum_t kron(W_1[t], ..., W_N[t]) x without ever forming the Kronecker product.

A factor of mode k has shape (terms, out_mode_k, in_mode_k). `x` is read as a tensor with the axes
(tokens, in_mode_1, ..., in_mode_N), row-major, and each factor replaces one axis.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["ContractionPlan", "apply_modes", "kronecker", "plan_contraction"]


@dataclass(frozen=True)
class ContractionPlan:
    """In which order the modes are contracted, and what one token costs.

    Attributes:
        order: mode indices (from 0), the first to be contracted first.
        multiply_adds: for one token, all terms.
        largest_intermediate: numbers held for one token between two contractions.
    """

    in_modes: tuple[int, ...]
    out_modes: tuple[int, ...]
    terms: int
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
    return ContractionPlan(in_modes, out_modes, terms, order, cost, largest)


def apply_modes(x: Tensor, factors: Sequence[Tensor]) -> Tensor:
    """Apply a sum of Kronecker products to the last axis of `x`.

    Args:
        x: (..., in_features), any floating dtype.
        factors: one a mode, each (terms, out_mode, in_mode), of x's dtype (or under autocast).

    Returns:
        (..., out_features) with out_features the product of the out modes.
    """
    plan = plan_contraction(
        tuple(f.shape[2] for f in factors), tuple(f.shape[1] for f in factors), factors[0].shape[0]
    )
    tokens = x.reshape(-1, x.shape[-1])
    if len(factors) == 2:
        y = _apply_two_modes(tokens, factors[0], factors[1], plan)
    else:
        y = _apply_term(tokens, [f[0] for f in factors], plan)
        for term in range(1, plan.terms):
            y = y + _apply_term(tokens, [f[term] for f in factors], plan)
    return y.reshape(*x.shape[:-1], math.prod(plan.out_modes))


def _apply_two_modes(tokens: Tensor, first: Tensor, second: Tensor, plan: ContractionPlan) -> Tensor:
    """Two modes, all terms at once: the terms ride along as part of the axis that is contracted last."""
    (in_1, in_2), (out_1, out_2), terms = plan.in_modes, plan.out_modes, plan.terms
    if plan.order == (1, 0):
        # (tokens in_1, in_2) x (in_2, terms out_2) -> (tokens, in_1 terms, out_2)
        z = F.linear(tokens.reshape(-1, in_2), second.reshape(terms * out_2, in_2)).view(
            -1, in_1 * terms, out_2
        )
        # (out_1, in_1 terms) x (tokens, in_1 terms, out_2) -> (tokens, out_1, out_2)
        return torch.matmul(first.permute(1, 2, 0).reshape(out_1, in_1 * terms), z)
    # (out_1 terms, in_1) x (tokens, in_1, in_2) -> (tokens, out_1 terms, in_2)
    z = torch.matmul(first.transpose(0, 1).reshape(out_1 * terms, in_1), tokens.reshape(-1, in_1, in_2))
    # (tokens out_1, terms in_2) x (terms in_2, out_2) -> (tokens out_1, out_2)
    y = F.linear(z.reshape(-1, terms * in_2), second.transpose(0, 1).reshape(out_2, terms * in_2))
    return y.view(-1, out_1, out_2)


def _apply_term(tokens: Tensor, matrices: Sequence[Tensor], plan: ContractionPlan) -> Tensor:
    """One term, any number of modes: contract one axis after the other in the planned order."""
    sizes = list(plan.in_modes)
    y = tokens
    for k in plan.order:
        before, after = math.prod(sizes[:k]), math.prod(sizes[k + 1 :])
        if after == 1:  # (tokens before, in_k) x (in_k, out_k)
            y = F.linear(y.reshape(-1, sizes[k]), matrices[k])
        else:  # (out_k, in_k) x (tokens before, in_k, after)
            y = torch.matmul(matrices[k], y.reshape(-1, sizes[k], after))
        sizes[k] = plan.out_modes[k]
        y = y.reshape(tokens.shape[0], before, sizes[k], after)
    return y.reshape(tokens.shape[0], -1)


def kronecker(factors: Sequence[Tensor]) -> Tensor:
    """The sum of Kronecker products as a matrix (out_features, in_features). For merging, never for training.

    Source: dW = kron(W_1, ..., W_N), row-major; arXiv 2503.17353.
    """
    terms = []
    for term in range(factors[0].shape[0]):
        delta = factors[0][term]
        for factor in factors[1:]:
            delta = torch.kron(delta, factor[term].contiguous())
        terms.append(delta)
    return torch.stack(terms).sum(0) if len(terms) > 1 else terms[0]
