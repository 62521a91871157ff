"""How far an adapter has moved each layer: ||scaling dW||_F / ||W||_F."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence

import torch

from ..peft.layers.layer import NdLoraLayer

__all__ = ["base_norm", "delta_norm", "update_norms", "whole"]


def delta_norm(layer: NdLoraLayer, adapter: str) -> float:
    """||scaling dW||_F of one adapter on one layer, dW not formed where the method has a cheaper way."""
    trained, frozen = layer.tensors(adapter)
    trained = {name: whole(value) for name, value in trained.items()}
    device = next(iter(trained.values())).device
    frozen = {name: whole(value).to(device) for name, value in frozen.items()}
    return abs(layer.scaling[adapter]) * layer.plan[adapter].delta_norm(trained, frozen)


def base_norm(layer: NdLoraLayer) -> float:
    """||W||_F of the base layer, dequantised; 0 where this process holds a part of it only (ZeRO-3)."""
    with torch.no_grad():
        weight = whole(layer.get_base_weight())
        if weight.numel() != layer.in_features * layer.out_features:
            return 0.0
        return float(torch.linalg.vector_norm(weight, dtype=torch.float32))


def update_norms(
    layers: Sequence[tuple[str, NdLoraLayer]], base_norms: Mapping[str, float]
) -> dict[str, float]:
    """Collect what is logged: for each active adapter the median over its layers, and the largest.

    Args:
        layers: (name, layer).
        base_norms: layer's name -> `base_norm`; layers whose norm is 0 are left out.
    """
    ratios: dict[str, list[float]] = {}
    for name, layer in layers:
        for adapter in layer.active_adapters:
            if adapter in layer.ndlora_factors and base_norms.get(name):
                ratios.setdefault(adapter, []).append(delta_norm(layer, adapter) / base_norms[name])
    logs = {}
    for adapter, values in ratios.items():
        logs[f"ndlora/{adapter}/update_norm"] = statistics.median(values)
        logs[f"ndlora/{adapter}/update_norm_max"] = max(values)
    return logs


def whole(tensor: torch.Tensor) -> torch.Tensor:
    """All of a tensor that is sharded over processes (FSDP2), else the tensor."""
    return getattr(tensor, "full_tensor", lambda: tensor)()
