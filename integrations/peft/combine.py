"""What `add_weighted_adapter` does: a new adapter whose update is the weighted sum of those of others, exactly.

The factors are put side by side, so the ranks add up: a sum of products is the product of the concatenations.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from peft.utils import ModulesToSaveWrapper
from torch import Tensor

from ndlora_plugins.errors import NdLoraValueError
from ndlora_plugins.integrations.peft.layer import NdLoraLayer

if TYPE_CHECKING:
    from ndlora_plugins.integrations.peft.model import NdLoraModel

__all__ = ["add_weighted"]


def add_weighted(
    model: NdLoraModel, adapters: Sequence[str], weights: Sequence[float], adapter_name: str
) -> None:
    """Add `adapter_name` with dW = sum_i weights[i] scaling_i dW_i; it is neither active nor trainable.

    Raises:
        NdLoraValueError: before anything is changed, if the sum cannot be written as one adapter.
    """
    _check(model, adapters, weights, adapter_name)
    sums = {
        name: _sum(name, layer, list(zip(adapters, weights, strict=True)))
        for name, layer in model.model.named_modules()
        if isinstance(layer, NdLoraLayer) and any(adapter in layer.ndlora_factors for adapter in adapters)
    }
    methods = {method for method, _, _ in sums.values()}
    if len(methods) > 1:
        raise NdLoraValueError(
            f"The sum of {list(adapters)} would take the methods {sorted(methods)}: one is needed."
        )
    ranks = {f"^{re.escape(name)}": rank for name, (_, rank, _) in sums.items()}
    largest = max(ranks.values())
    configs = [model.peft_config[adapter] for adapter in adapters]
    smaller = {key: rank for key, rank in ranks.items() if rank != largest}
    saved = {module for config in configs for module in config.modules_to_save or ()}
    model.peft_config[adapter_name] = replace(
        configs[0],
        method=methods.pop(),
        init_lora_weights=True,
        anchor="none",
        r=largest,
        lora_alpha=largest,
        rank_pattern=smaller,
        alpha_pattern=smaller,
        use_rslora=False,
        target_modules="|".join(re.escape(name) for name in sums),
        exclude_modules=None,
        layers_to_transform=None,
        layers_pattern=None,
        modules_to_save=sorted(saved) or None,
        base_fingerprint=None,
        weight_forms=None,
    )
    model.inject_adapter(model.model, adapter_name)
    model.set_requires_grad(adapter_name, False)
    with torch.no_grad():
        for name, (_, _, factors) in sums.items():
            for factor, value in factors.items():
                model.model.get_submodule(name).ndlora_factors[adapter_name][factor].copy_(value)
        for wrapper in _wrappers(model):
            for adapter in set(adapters) & set(wrapper.modules_to_save):
                wrapper.modules_to_save[adapter_name].load_state_dict(
                    wrapper.modules_to_save[adapter].state_dict()
                )


def _check(model: NdLoraModel, adapters: Sequence[str], weights: Sequence[float], adapter_name: str) -> None:
    if adapter_name in model.peft_config:
        raise NdLoraValueError(f"There is an adapter {adapter_name!r} already: choose another name.")
    if not adapters or len(adapters) != len(weights):
        raise NdLoraValueError(
            f"{len(adapters)} adapters and {len(weights)} weights: give one weight for each adapter."
        )
    for adapter in adapters:
        if adapter not in model.peft_config:
            raise NdLoraValueError(
                f"Adapter {adapter} does not exist. There are: {', '.join(model.peft_config)}."
            )
        config = model.peft_config[adapter]
        if config.target_parameters:
            raise NdLoraValueError(
                f"add_weighted_adapter does not support targeting nn.Parameter: adapter {adapter!r} has "
                f"target_parameters={sorted(config.target_parameters)}."
            )
        if config.trainable_token_indices or config.bias != "none":
            raise NdLoraValueError(
                f"Adapter {adapter!r} trains more than its update (trainable_token_indices or bias), which cannot "
                f"be added to another's."
            )
    shared = [
        wrapper for wrapper in _wrappers(model) if len(set(adapters) & set(wrapper.modules_to_save)) > 1
    ]
    if shared:
        raise NdLoraValueError(
            f"Cannot add weighted adapters if they target the same module with modules_to_save, but found "
            f"{len(shared)} such instance(s)."
        )


def _wrappers(model: NdLoraModel) -> list[ModulesToSaveWrapper]:
    return [module for module in model.model.modules() if isinstance(module, ModulesToSaveWrapper)]


def _sum(
    name: str, layer: NdLoraLayer, weighted: list[tuple[str, float]]
) -> tuple[str, int, Mapping[str, Tensor]]:
    """(method, rank, factors) of the sum on one layer."""
    weighted = [(adapter, weight) for adapter, weight in weighted if adapter in layer.ndlora_factors]
    plans = [layer.plan[adapter] for adapter, _ in weighted]
    tensors = [layer.tensors(adapter) for adapter, _ in weighted]
    scales = [weight * layer.scaling[adapter] for adapter, weight in weighted]
    with torch.no_grad():
        products = [plan.low_rank(*pair) for plan, pair in zip(plans, tensors, strict=True)]
        if all(product is not None for product in products):
            # sum_i s_i B_i A_i = [B_1 B_2 ..] I [s_1 A_1; s_2 A_2; ..]
            down = torch.cat([scale * down for scale, (down, _) in zip(scales, products, strict=True)])
            up = torch.cat([up for _, up in products], dim=1)
            core = torch.eye(len(down), dtype=down.dtype, device=down.device)
            return "slora", len(down), {"down": down, "core": core, "up": up}
        modes = {(plan.method.name, plan.layout.in_modes, plan.layout.out_modes) for plan in plans}
        if len(modes) == 1 and plans[0].method.name == "ndlinear":
            # the terms of all, the scale in the first mode of each
            parts = [
                plan.method.anchored(plan.layout, frozen, trained) if plan.anchor == "snapshot" else trained
                for plan, (trained, frozen) in zip(plans, tensors, strict=True)
            ]
            parts = [
                {**part, "mode_1": scale * part["mode_1"]} for scale, part in zip(scales, parts, strict=True)
            ]
            factors = {factor: torch.cat([part[factor] for part in parts]) for factor in parts[0]}
            return "ndlinear", len(factors["mode_1"]), factors
    found = ", ".join(
        f"{adapter} ({plan.method.name})" for (adapter, _), plan in zip(weighted, plans, strict=True)
    )
    raise NdLoraValueError(
        f"The updates of {found} on layer {name!r} cannot be added up in one adapter: they must all have a low-rank "
        f"form, or all be ndlinear with the same modes. Merge them into the base model one after the other instead."
    )
