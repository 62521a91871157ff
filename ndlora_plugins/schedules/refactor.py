"""The same dW in other factors, now and then: sides made orthonormal, or cut to their leading directions.

Sources: FedSVD, arXiv 2505.12805 (seanie12/fed-svd, misc/utils.py), without its SVD of the whole product; LoRA-Squeeze,
arXiv 2602.10993, its compressions during training.
"""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from ndlora_plugins.schedules.base import Ranks, Schedule, check_number
from ndlora_plugins.structures import Chain

__all__ = ["anneal_rank", "reorthogonalise"]


def leading_factors(structure, factors, keep, balanced):
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


def rewrite(layers, keep, balanced):
    for layer in layers:
        factors = {**layer.frozen, **layer.trained}
        for name, value in leading_factors(layer.structure, factors, keep(layer), balanced).items():
            factors[name].copy_(value)
    return layers


def misfit(options, plan):
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
    """
    Attributes:
        every: so many steps.
    """

    every: int = 100

    def __post_init__(self):
        check_number("every", self.every, 1, whole=True)


def orthonormal(options, training):
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
    """
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

    def __post_init__(self):
        for name in ("to", "first", "every"):
            check_number(name, getattr(self, name), 1, whole=True)
        check_number("keep", self.keep)
        check_number("1 - keep", 1 - self.keep, 1e-6)


def rank_at(options, rank, step):
    falls = 0 if step < options.first else 1 + (step - options.first) // options.every
    return max(min(options.to, rank), math.ceil(rank * options.keep**falls))


def annealed(options, moment, place):
    return Ranks(rank_at(options, place.rank, moment.step))


def squeeze(options, training):
    def rank(layer, later):
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
