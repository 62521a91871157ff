"""Penalties and proximal steps that bring gates, or whole groups of factors, to zero; and one that stays near the base.

Sources: SoRA, arXiv 2311.11696 (TsinghuaC3I/SoRA, src/sparse_optimizer.py); GS-LoRA, arXiv 2403.11530
(bjzhb666/GS-LoRA, engine_cl.py); S2-LoRA, arXiv 2309.11756; BA-LoRA, arXiv 2408.04556 (cyp-jlu-ai/BA-LoRA).
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ndlora_plugins.errors import NdLoraValueError
from ndlora_plugins.methods.options import check_choice, check_number
from ndlora_plugins.schedules.base import Schedule, TrainedLayer, Training
from ndlora_plugins.structures.base import Structure

__all__ = ["group_lasso", "keep_close", "sparse_ranks", "squares", "trains_ranks"]

# (factor, the axis along which each rank is a group, or None for all of it)
Group = list[tuple[Tensor, int | None]]


@dataclass(frozen=True)
class SparseRanks:
    """Options of `sparse_ranks`.

    Attributes:
        threshold: what each gate comes nearer to zero after a step, whatever the learning rate is.
        penalty: strength of the mean of the gates' absolute values, as a part of the loss.
        begin: the first step.
    """

    threshold: float = 1e-3
    penalty: float = 1e-3
    begin: int = 0

    def __post_init__(self) -> None:
        check_number("threshold", self.threshold)
        check_number("penalty", self.penalty)
        check_number("begin", self.begin, whole=True)


def gates(structure: Structure, names: Iterable[str]) -> list[str]:
    """The factors of these that are one number for each rank."""
    sizes = {factor.name: factor.shape for factor in structure.factors if factor.indices is None}
    return [name for name in names if structure.rank_axes.get(name) == (0,) and len(sizes[name]) == 1]


def gate_values(layer: TrainedLayer) -> Iterator[tuple[Tensor, Tensor | float, Tensor]]:
    """(parameter, start, gate) of each gate: with the snapshot anchor a parameter is the change since a start."""
    for name in gates(layer.structure, layer.trained):
        start = layer.frozen.get(name, 0.0)
        yield layer.trained[name], start, layer.trained[name] + start


def gate_penalty(options: SparseRanks, training: Training) -> Tensor | None:
    """The mean of the gates' absolute values, times `penalty`."""
    values = [gate for layer in training.layers for _, _, gate in gate_values(layer)]
    if not options.penalty or training.moment.step < options.begin:
        return None
    return options.penalty * torch.cat(values).abs().mean()


def soft_threshold(options: SparseRanks, training: Training) -> None:
    """Bring each gate nearer to zero by `threshold`, in place."""
    for layer in training.layers if training.moment.step >= options.begin else ():
        for value, start, gate in gate_values(layer):
            value.copy_(gate.sign() * (gate.abs() - options.threshold).clamp(min=0) - start)


def without_gates(options: SparseRanks, plan: Any) -> str | None:
    """The reason why a layer has no gates, or None."""
    found = gates(plan.structure, [factor.name for factor in plan.trained])
    if found and not set(found) & set(dict(plan.shared)):
        return None
    return "it trains no gate of its own for each rank; group_lasso with groups='rank' needs none"


sparse_ranks = Schedule(
    name="sparse_ranks",
    summary="brings the gates of ranks to zero, by a penalty and a soft threshold after each step",
    source="arXiv 2311.11696; with threshold=0 S2-LoRA, arXiv 2309.11756",
    Options=SparseRanks,
    penalty=gate_penalty,
    after_step=soft_threshold,
    misfit=without_gates,
)


@dataclass(frozen=True)
class GroupLasso:
    """Options of `group_lasso`.

    Attributes:
        strength: of the sum of the groups' norms, as a part of the loss.
        groups: "block" (all factors of one block of the model), "layer", "matrix" (each factor) or "rank" (of a layer).
        proximal: shrink the groups after each step by strength times the learning rate, which makes exact zeros,
            in place of the penalty.
        begin: the first step.
    """

    strength: float = 1e-4
    groups: str = "block"
    proximal: bool = False
    begin: int = 0

    def __post_init__(self) -> None:
        check_number("strength", self.strength)
        check_choice("groups", self.groups, ("block", "layer", "matrix", "rank"))
        check_choice("proximal", self.proximal, (True, False))
        check_number("begin", self.begin, whole=True)


def grouped(options: GroupLasso, layers: Iterable[TrainedLayer]) -> list[Group]:
    """The groups that `groups` asks for."""
    found: dict[Any, dict[Any, tuple[Tensor, int | None]]] = {}
    for layer in layers:
        number = re.search(r"(?:^|\.)(\d+)(?:\.|$)", layer.name)
        block = layer.name[: number.end(1)] if number else layer.name
        for name, value in layer.trained.items():
            key = {"block": block, "layer": layer.name, "matrix": (layer.name, name), "rank": layer.name}
            axes = layer.structure.rank_axes.get(name, ()) if options.groups == "rank" else (None,)
            for axis in axes:
                found.setdefault(key[options.groups], {})[id(value), axis] = (value, axis)
    return [list(members.values()) for members in found.values()]


def squares(value: Tensor, axis: int | None) -> Tensor:
    """The sum of the squares of a factor's numbers, for each rank along an axis, or of all."""
    if axis is None:
        return value.square().sum()
    return value.square().movedim(axis, 0).reshape(value.shape[axis], -1).sum(1)


def squared_norms(group: Group) -> Tensor:
    """The squared norm of a group, or of each of its ranks."""
    return torch.stack([squares(value, axis) for value, axis in group]).sum(0)


def lasso(options: GroupLasso, training: Training) -> Tensor | None:
    """The sum of the groups' norms, times `strength`."""
    if options.proximal or training.moment.step < options.begin:
        return None
    # the root has no gradient at zero
    groups = grouped(options, training.layers)
    return (
        options.strength
        * torch.stack([(squared_norms(group) + 1e-12).sqrt().sum() for group in groups]).sum()
    )


def shrink(options: GroupLasso, training: Training) -> None:
    """Shorten each group by `strength` times the learning rate, in place."""
    if not options.proximal or training.moment.step < options.begin:
        return
    rates = {layer.rate for layer in training.layers if layer.rate is not None}
    if not rates:
        raise NdLoraValueError(
            "group_lasso with proximal=True needs the learning rate: after_step(optimizer)."
        )
    for group in grouped(options, training.layers):
        kept = (1 - max(rates) * options.strength / squared_norms(group).sqrt().clamp(min=1e-30)).clamp(min=0)
        for value, axis in group:
            value.mul_(kept if axis is None else kept.view(-1, *[1] * (value.dim() - 1 - axis)))


def trains_ranks(plan: Any) -> bool:
    """Tell whether a factor that trains on a layer has a rank axis."""
    return any(plan.structure.rank_axes.get(factor.name) for factor in plan.trained)


def shared_groups(options: GroupLasso, plan: Any) -> str | None:
    """The reason why a layer's factors make no such groups, or None."""
    if options.groups == "rank" and not trains_ranks(plan):
        return "what it trains has no rank axis: use other groups"
    if options.proximal and plan.shared:
        return (
            "it shares factors between layers, which would shrink once for each of them: set proximal=False"
        )
    return None


group_lasso = Schedule(
    name="group_lasso",
    summary="a penalty, or a proximal step, on the norms of blocks, layers, factors or ranks",
    source="GS-LoRA, arXiv 2403.11530",
    Options=GroupLasso,
    penalty=lasso,
    after_step=shrink,
    misfit=shared_groups,
)


@dataclass(frozen=True)
class KeepClose:
    """Options of `keep_close`.

    Attributes:
        strength: of the mean of KL(base || model) over the positions that the loss counts.
    """

    strength: float = 0.05  # the paper's 1e-4 is of a sum over the positions, 512 of them

    def __post_init__(self) -> None:
        check_number("strength", self.strength)


def divergence(options: KeepClose, training: Training) -> Tensor:
    """KL(base || model), the mean over the positions that the loss counts, times `strength`."""
    assert training.outputs is not None, "a schedule that reads outputs is given them"
    logits, base, counted, divisor = training.outputs
    model, base = F.log_softmax(logits.float(), -1), F.log_softmax(base.float(), -1)
    each = F.kl_div(model, base, reduction="none", log_target=True).sum(-1)
    return options.strength * (each * counted).sum() / divisor


keep_close = Schedule(
    name="keep_close",
    summary="keeps the answers near those of the base model",
    source="BA-LoRA, arXiv 2408.04556, its first term",
    Options=KeepClose,
    penalty=divergence,
    reads_outputs=True,
)
