"""Clusters of rank units: a small product that stands for the sum of many.

Source: LoRA-LEGO, arXiv 2409.16167, section 3. Its two factors of reweighting could not be read; here each cluster's
centre is scaled by least squares, so that as many clusters as units give the sum itself.
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["cluster_units"]

_ROUNDS = 50


def cluster_units(down: Tensor, up: Tensor, clusters: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """(down (k, in_features), up (out_features, k)), k <= clusters, near up @ down.

    A unit is a row of `down` with its column of `up`. The two are scaled to one norm, since (c a, b / c) is the same
    unit, and (a, b) counts as (-a, -b).

    Args:
        down: (units, in_features), float64.
        up: (out_features, units).
        clusters: as many as k-means looks for.
        seed: of its start.
    """
    sizes = down.norm(dim=1), up.norm(dim=0)
    there = (sizes[0] * sizes[1]) > 0
    if not there.any():
        return torch.zeros_like(down[:1]), torch.zeros_like(up[:, :1])
    balance = (sizes[1][there] / sizes[0][there]).sqrt()
    a, b = balance[:, None] * down[there], up[:, there].T / balance[:, None]
    units = torch.cat([a, b], dim=1)
    labels, signs = _k_means(units, min(clusters, len(units)), seed)
    # (clusters, units): the mean of a cluster's units, each with its sign
    members = torch.zeros(int(labels.max()) + 1, len(units), dtype=units.dtype, device=units.device)
    members[labels, torch.arange(len(units), device=units.device)] = 1.0
    means = members * signs / members.sum(1, keepdim=True)
    centre_a, centre_b = means @ a, means @ b
    # min_t ||sum_u b_u a_u^T - t b a^T||_F, sums over the members of each cluster
    found = (members.T * (a @ centre_a.T) * (b @ centre_b.T)).sum(0)
    length = centre_a.square().sum(1) * centre_b.square().sum(1)
    scale = torch.where(length > 0, found / length.clamp(min=1e-300), 0.0)
    return centre_a, scale * centre_b.T


def _k_means(units: Tensor, clusters: int, seed: int) -> tuple[Tensor, Tensor]:
    """(label, sign) of each unit: the centre that is nearest to it or to its negative. No cluster is empty."""
    generator = torch.Generator().manual_seed(seed)
    centres = units[_spread(units, clusters, generator)]
    labels = signs = torch.empty(0, dtype=torch.long, device=units.device)
    for _ in range(_ROUNDS):
        inner = units @ centres.T  # (units, clusters)
        distance = centres.square().sum(1) - 2 * inner.abs()
        nearest = distance.argmin(1)
        signs = torch.where(inner.gather(1, nearest[:, None])[:, 0] < 0, -1.0, 1.0).to(units.dtype)
        if torch.equal(nearest, labels):
            break
        labels = nearest
        members = torch.nn.functional.one_hot(labels, len(centres)).to(units.dtype).T
        members = members[members.sum(1) > 0]  # a centre that lost all of its units goes
        labels = members.argmax(0)
        centres = (members * signs) @ units / members.sum(1, keepdim=True)
    return labels, signs


def _spread(units: Tensor, clusters: int, generator: torch.Generator) -> list[int]:
    """k-means++: each further centre is drawn by its squared distance to those that are there."""
    gram = units @ units.T
    squares = gram.diagonal()
    chosen = [int(torch.multinomial(squares.cpu(), 1, generator=generator))]
    while len(chosen) < clusters:
        # to a centre or its negative
        distance = (squares[:, None] + squares[chosen] - 2 * gram[:, chosen].abs()).amin(1).clamp(min=0)
        distance[chosen] = 0
        if not (distance > 1e-12 * squares.max()).any():
            break
        chosen.append(int(torch.multinomial(distance.cpu(), 1, generator=generator)))
    return chosen
