"""What a method asks for beside the loss: a penalty on its factors, and a proximal step after the optimizer's."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch

from ndlora_plugins.integrations.peft.layer import NdLoraLayer
from ndlora_plugins.integrations.trl.checks import trained_factors

__all__ = ["add_penalty_gradients", "has_penalties", "shrink_factors"]

Layers = Iterable[tuple[str, NdLoraLayer]]


def has_penalties(layers: Layers) -> bool:
    """Whether an active adapter's method has a penalty or a proximal step."""
    return any(
        layer.plan[adapter].method.penalty is not None or layer.plan[adapter].method.shrink is not None
        for _, layer in layers
        for adapter in trained_factors(layer)
    )


def add_penalty_gradients(layers: Layers) -> None:
    """Add the gradient of every penalty to that of its factors, as if it had been part of the loss.

    Before the optimizer's step, and after clipping: a penalty's own gradient is not clipped.
    """
    for _, layer in layers:
        for adapter, factors in trained_factors(layer).items():
            trained = [value for value in factors.values() if value.requires_grad]
            penalty = layer.penalty(adapter)
            if penalty is None or not trained:
                continue
            gradients = torch.autograd.grad(penalty, trained, allow_unused=True)
            for parameter, gradient in zip(trained, gradients, strict=True):
                if gradient is not None:
                    parameter.grad = gradient if parameter.grad is None else parameter.grad.add_(gradient)


def shrink_factors(layers: Layers, groups: Iterable[Mapping[str, Any]]) -> None:
    """Let every method make its proximal step, of the size of the factors' learning rate.

    Args:
        groups: the optimizer's `param_groups`.
    """
    rates = {id(parameter): group["lr"] for group in groups for parameter in group["params"]}
    with torch.no_grad():
        for _, layer in layers:
            for adapter, factors in trained_factors(layer).items():
                plan = layer.plan[adapter]
                rate = next((rates[id(factor)] for factor in factors.values() if id(factor) in rates), None)
                if plan.method.shrink is None or rate is None:
                    continue
                tensors = layer.tensors(adapter)[0]
                plan.method.shrink(plan.structure, tensors, rate)
                for name, factor in factors.items():
                    if tensors[name] is not factor:  # shared, and used here on another device
                        factor.copy_(tensors[name])
