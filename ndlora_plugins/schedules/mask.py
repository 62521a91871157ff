"""What of a layer's factors a training forward sees."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ndlora_plugins.schedules.base import Ranks
from ndlora_plugins.structures.base import Factor, Factors, Structure

__all__ = ["seen_factors"]


def seen_factors(
    structure: Structure, factors: Factors, ranks: Ranks, trained: Sequence[Factor]
) -> dict[str, Tensor]:
    """Cut some factors of the structure to the first ranks.

    Args:
        trained: those of the structure that train, of which the smallest one takes the scale.
    """
    scaled = min(trained, key=lambda factor: factor.numel).name
    seen = structure.cut_factors(factors, ranks.seen)
    for name, value in seen.items():
        axes = structure.rank_axes.get(name, ())
        if ranks.learning and axes and value.requires_grad:
            learning = torch.zeros(value.shape, dtype=torch.bool, device=value.device)
            for axis in axes:
                learning.narrow(axis, ranks.learning, ranks.seen - ranks.learning).fill_(True)
            value = torch.where(learning, value, value.detach())
        seen[name] = value * ranks.scale if name == scaled and ranks.scale != 1 else value
    return seen
