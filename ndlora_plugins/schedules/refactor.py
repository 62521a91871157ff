"""The same dW in other factors, now and then: sides made orthonormal, or cut to their leading directions.

Sources: FedSVD, arXiv 2505.12805 (seanie12/fed-svd, misc/utils.py), without its SVD of the whole product; LoRA-Squeeze,
arXiv 2602.10993, its compressions during training.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ndlora_plugins.methods.options import check_number
from ndlora_plugins.schedules.base import Moment, Place, Ranks, Schedule, TrainedLayer, Training
from ndlora_plugins.structures import Chain
from ndlora_plugins.structures.base import Factors

__all__ = ["anneal_rank", "reorthogonalise"]


def leading_factors(structure: Chain, factors: Factors, keep: int, balanced: bool) -> dict[str, Tensor]:
    """Factors of the same dW = up core down, its leading directions first; from `keep` on they are zero.

    Balanced, both sides have the root of the singular values; else down is orthonormal and so is up beside a core.
    """
    wide = {name: value.float() for name, value in factors.items()}
    core = {"none": None, "full": wide.get("core"), "diagonal": wide.get("core")}[structure.core]
    # down = r_down^T q_down^T, up = q_up r_up: the SVD is of a matrix of the rank's size
    q_down, r_down = torch.linalg.qr(wide["down"].T)
    q_up, r_up = torch.linalg.qr(wide["up"])
    inner = r_up if core is None else r_up @ core if core.dim() == 2 else r_up * core
    left, values, right = torch.linalg.svd(inner @ r_down.T)
    count = min(keep, len(values))
    values, lost = values[:count], structure.layout.rank - count
    down, up = right[:count] @ q_down.T, q_up @ left[:, :count]
    middle = torch.ones_like(values) if balanced else values
    if balanced:
        down, up = values.sqrt()[:, None] * down, up * values.sqrt()
    elif core is None:
        up = up * values
    found = {"down": F.pad(down, (0, 0, 0, lost)), "up": F.pad(up, (0, lost))}
    if core is not None:
        middle = F.pad(middle, (0, lost))
        found["core"] = torch.diag(middle) if core.dim() == 2 else middle
    return found


def rewrite(
    layers: Sequence[TrainedLayer], keep: Callable[[TrainedLayer], int], balanced: bool
) -> Sequence[TrainedLayer]:
    """Give each layer its leading factors, in place, and return the layers."""
    for layer in layers:
        assert isinstance(layer.structure, Chain), "`misfit` lets no other in"
        factors = {**layer.frozen, **layer.trained}
        for name, value in leading_factors(layer.structure, factors, keep(layer), balanced).items():
            factors[name].copy_(value)
    return layers


def misfit(options: object, plan: Any) -> str | None:
    """The reason why a layer's factors cannot be made anew, or None."""
    structure = plan.structure
    if not isinstance(structure, Chain) or structure.indexed:
        return "its update is no product of two sides, which could be made anew"
    if plan.anchor != "none":
        return "the snapshot anchor subtracts a start, which would stay as it was: set anchor='none'"
    if plan.shared:
        return "it shares factors between layers, which cannot be made anew for each of them"
    if plan.recomputed:
        return f"{plan.frozen[0].name!r} is made again at load and not saved: set save_frozen=True"
    return None


@dataclass(frozen=True)
class Reorthogonalise:
    """Options of `reorthogonalise`.

    Attributes:
        every: so many steps.
    """

    every: int = 100

    def __post_init__(self) -> None:
        check_number("every", self.every, least=1, whole=True)


def orthonormal(options: Reorthogonalise, training: Training) -> Sequence[TrainedLayer] | None:
    """Make the sides of all layers orthonormal, every so many steps."""
    if (training.moment.step + 1) % options.every:
        return None
    return rewrite(training.layers, lambda layer: layer.structure.layout.rank, balanced=False)


reorthogonalise = Schedule(
    name="reorthogonalise",
    summary="every so many steps the same dW with orthonormal sides",
    source="FedSVD, arXiv 2505.12805",
    Options=Reorthogonalise,
    after_step=orthonormal,
    misfit=misfit,
)


@dataclass(frozen=True)
class AnnealRank:
    """Options of `anneal_rank`.

    Attributes:
        to: the rank at the end.
        first: the step after which the rank falls for the first time.
        every: so many steps later it falls again.
        keep: the share of the ranks that stays each time.
    """

    to: int = 1
    first: int = 100
    every: int = 100
    keep: float = 0.5

    def __post_init__(self) -> None:
        for name in ("to", "first", "every"):
            check_number(name, getattr(self, name), least=1, whole=True)
        check_number("keep", self.keep, most=1 - 1e-6)


def rank_at(options: AnnealRank, rank: int, step: int) -> int:
    """The number of the layer's ranks that a step sees."""
    falls = 0 if step < options.first else 1 + (step - options.first) // options.every
    return max(min(options.to, rank), math.ceil(rank * options.keep**falls))


def annealed(options: AnnealRank, moment: Moment, place: Place) -> Ranks:
    """The first ranks, as many as `rank_at` says."""
    return Ranks(rank_at(options, place.rank, moment.step))


def squeeze(options: AnnealRank, training: Training) -> Sequence[TrainedLayer]:
    """Keep the leading directions where the rank is about to fall."""

    def rank(layer: TrainedLayer, later: int) -> int:
        return rank_at(options, layer.structure.layout.rank, training.moment.step + later)

    falling = [layer for layer in training.layers if rank(layer, 1) < rank(layer, 0)]
    return rewrite(falling, lambda layer: rank(layer, 1), balanced=True)


anneal_rank = Schedule(
    name="anneal_rank",
    summary="lowers the rank in training: an SVD, and what is left out stays zero",
    source="LoRA-Squeeze, arXiv 2602.10993",
    Options=AnnealRank,
    ranks=annealed,
    after_step=squeeze,
    misfit=misfit,
)
