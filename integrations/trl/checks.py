"""Does the adapter train what it should? Checked on the model itself, before the first step and in it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import nn

from ..peft.layers.layer import NdLoraLayer
from .norms import whole

__all__ = [
    "GradientReport",
    "StartReport",
    "adapted_layers",
    "check_gradients",
    "check_start",
    "trained_factors",
]

_NAMED = 5  # how many layers a message names


@dataclass(frozen=True)
class StartReport:
    """The parts that train.

    Attributes:
        adapters: adapter name -> (method's name, adapted layers, trainable numbers); the frozen ones have 0.
        besides: trainable numbers of `modules_to_save`, trainable tokens and biases.
        problems: one sentence for each thing that is wrong; empty if all is well.
    """

    adapters: dict[str, tuple[str, int, int]]
    besides: int
    problems: tuple[str, ...]


@dataclass(frozen=True)
class GradientReport:
    """The gradients of one backward pass.

    Attributes:
        silent: whether every gradient is exactly zero, so that the step says nothing (GRPO, equal rewards).
        overflowed: whether a gradient is not finite, which under fp16 only lowers the loss scale.
        problems: as in `StartReport`; empty when `silent`.
    """

    silent: bool
    overflowed: bool
    problems: tuple[str, ...]


def adapted_layers(model: nn.Module) -> list[tuple[str, NdLoraLayer]]:
    """(name, layer) of every layer with an NDLORA adapter, named as in the base model."""
    found = ((name, module) for name, module in model.named_modules() if isinstance(module, NdLoraLayer))
    return [(name.removeprefix("module.").removeprefix("base_model.model."), layer) for name, layer in found]


def trained_factors(layer: NdLoraLayer) -> dict[str, dict[str, nn.Parameter]]:
    """Active adapter -> its factors by name, those that the method trains."""
    return {
        adapter: layer.trained_parameters(adapter)
        for adapter in layer.active_adapters
        if adapter in layer.ndlora_factors
    }


def check_start(model: nn.Module, optimizer: torch.optim.Optimizer | None = None) -> StartReport:
    """Check before the first step: which layers, how many trainable numbers, nothing else trains.

    Args:
        model: wrapped by PEFT, or with adapters added by transformers' `add_adapter`.
        optimizer: every trainable factor must be in one of its groups; not checked without it.
    """
    layers = adapted_layers(model)
    counted: dict[str, tuple[str, int, int]] = {}
    expected: dict[str, int] = {}
    partly: list[str] = []
    ours: set[int] = set()
    shared: dict[tuple[str, str], int] = {}
    for name, layer in layers:
        for adapter, factors in trained_factors(layer).items():
            plan = layer.plan[adapter]
            trainable = [parameter for parameter in factors.values() if parameter.requires_grad]
            # what layers share is met again in each of them
            new = sum(_numel(parameter) for parameter in trainable if id(parameter) not in ours)
            ours.update(id(parameter) for parameter in trainable)
            method, layer_count, numbers = counted.get(adapter, (plan.method.name, 0, 0))
            counted[adapter] = (method, layer_count + 1, numbers + new)
            expected[adapter] = expected.get(adapter, 0) + plan.num_parameters
            shared |= {(adapter, key): count for key, count in plan.shared_sizes(plan.trained).items()}
            if 0 < len(trainable) < len(factors):
                partly.append(name)
    for (adapter, _), count in shared.items():
        expected[adapter] += count
    besides, unexpected = _trained_besides(model, ours)
    problems = _start_problems(layers, counted, expected, partly)
    if unexpected:
        problems.append(
            f"{len(unexpected)} parameters train that belong to no active adapter, {_some(unexpected)}: "
            f"freeze them (requires_grad_(False)), or name their modules in modules_to_save"
        )
    if optimizer is not None:
        known = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
        missing = [
            f"{name} ({adapter}, {factor})"
            for name, layer in layers
            for adapter, factors in trained_factors(layer).items()
            for factor, parameter in factors.items()
            if parameter.requires_grad and id(parameter) not in known
        ]
        if missing:
            problems.append(
                f"{len(missing)} trainable factors are in no group of the optimizer, {_some(missing)}: make "
                f"the optimizer after the adapter was added"
            )
    return StartReport(counted, besides, tuple(problems))


def _start_problems(
    layers: Sequence[tuple[str, NdLoraLayer]],
    counted: dict[str, tuple[str, int, int]],
    expected: dict[str, int],
    partly: list[str],
) -> list[str]:
    if not layers:
        return ["the model has no NDLORA adapter: pass peft_config=NdLoraConfig(...) or use get_peft_model"]
    merged = [name for name, layer in layers if layer.merged]
    if merged:
        return [
            f"adapters are merged into {len(merged)} layers, {_some(merged)}: call unmerge_adapter() first"
        ]
    if not any(numbers for _, _, numbers in counted.values()):
        return [
            f"no factor of the active adapters {sorted(counted)} is trainable: load the adapter with "
            f"is_trainable=True, and make the one to be trained active with set_adapter"
        ]
    problems = []
    for adapter, (method, layer_count, numbers) in counted.items():
        if numbers not in (0, expected[adapter]):  # 0: another adapter trains beside this frozen one
            where = f", {_some(partly)} in part" if partly else ""
            problems.append(
                f"adapter {adapter!r} ({method}) trains {numbers:,} numbers in {layer_count} layers, but its "
                f"plan says {expected[adapter]:,}{where}: set requires_grad of all its factors alike"
            )
    return problems


def _trained_besides(model: nn.Module, ours: set[int]) -> tuple[int, list[str]]:
    """Trainable numbers that belong beside the factors, and the names of parameters that do not."""
    wrappers = tuple(
        f"{name}." for name, module in model.named_modules() if isinstance(module, AuxiliaryTrainingWrapper)
    )
    configs = getattr(model, "peft_config", None) or {}
    biases = any(getattr(config, "bias", "none") != "none" for config in configs.values())
    besides, unexpected = 0, []
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad or id(parameter) in ours:
            continue
        if name.startswith(wrappers) or (biases and name.rpartition(".")[2] == "bias"):
            besides += _numel(parameter)
        else:
            unexpected.append(name)
    return besides, unexpected


def check_gradients(layers: Iterable[tuple[str, NdLoraLayer]]) -> GradientReport:
    """Check after a backward pass: each trainable factor has a finite gradient, each layer one that is not 0.

    One zero is no fault: where `up` or `mode_1` starts at zero, its partners get a zero gradient at first.
    """
    missing, broken, largest = [], [], {}
    for name, layer in layers:
        for adapter, factors in trained_factors(layer).items():
            for factor, parameter in factors.items():
                if not parameter.requires_grad:
                    continue
                if parameter.grad is None:
                    missing.append(f"{name} ({adapter}, {factor})")
                    continue
                value = float(whole(parameter.grad).detach().abs().max())  # NaN and infinity come through
                if value != value or value == float("inf"):
                    broken.append(f"{name} ({adapter}, {factor})")
                key = (name, adapter)
                largest[key] = max(largest.get(key, 0.0), value)
    silent = not missing and not broken and not any(largest.values())
    problems = []
    if missing:
        problems.append(
            f"no gradient reached {len(missing)} trainable factors, {_some(missing)}: the forward pass does "
            f"not use these layers. Name them in exclude_modules, or pass NdLoraCallback(strict=False) if "
            f"that is meant (experts that no token was sent to)"
        )
    if broken:
        clipped = " (gradient clipping spreads one of them to all)" if len(broken) > 1 else ""
        problems.append(
            f"the gradient of {len(broken)} trainable factors is NaN or infinite, {_some(broken)}{clipped}: "
            f"lower the learning rate or the scaling, or train in bfloat16 or float32"
        )
    elif not silent:
        zero = [f"{name} ({adapter})" for (name, adapter), value in largest.items() if value == 0]
        if zero:
            problems.append(
                f"the gradient is exactly zero in every factor of {len(zero)} layers, {_some(zero)}: their "
                f"start blocks it, or the loss does not depend on them"
            )
    return GradientReport(silent, bool(broken), tuple(problems))


def _numel(parameter: nn.Parameter) -> int:
    return getattr(parameter, "ds_numel", parameter.numel())  # ds_numel: under ZeRO-3


def _some(names: Sequence[str]) -> str:
    more = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
    return f"namely {', '.join(names[:_NAMED])}{more}"
