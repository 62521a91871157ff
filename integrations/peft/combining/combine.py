"""What `add_weighted_adapter` does: a new adapter whose update is the weighted sum of those of others in the model."""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import torch
from peft.tuners.tuners_utils import BaseTuner
from peft.utils import ModulesToSaveWrapper, TrainableTokensWrapper

from ndlora_plugins.errors import NdLoraValueError

from ..configuration.config import NdLoraConfig
from ..layers.layer import NdLoraLayer
from ..tuner.undo import undone_on_failure
from .combination import (
    Combination,
    Part,
    check_configs,
    combine_configs,
    combine_parts,
)

__all__ = ["Combination", "add_weighted"]


def add_weighted(
    model: BaseTuner,
    adapters: Sequence[str],
    weights: Sequence[float],
    adapter_name: str,
    combination: Combination,
) -> None:
    """Add `adapter_name` with dW = sum_i weights[i] scaling_i dW_i; it is neither active nor trainable.

    Rows of trained tokens are added up likewise, as differences from the base's.

    Raises:
        NdLoraValueError: before anything is changed, if the sum cannot be written as one adapter.
    """
    _check(model, adapters, weights, adapter_name)
    weighted = list(zip(adapters, weights, strict=True))
    sums = {
        name: combine_parts(name, _parts(layer, weighted), combination)
        for name, layer in model.model.named_modules()
        if isinstance(layer, NdLoraLayer) and any(adapter in layer.ndlora_factors for adapter in adapters)
    }
    config = combine_configs(adapters, _configs(model, adapters), sums)
    with undone_on_failure(model):
        model.peft_config[adapter_name] = config
        model.inject_adapter(model.model, adapter_name)
    model.set_requires_grad(adapter_name, False)
    with torch.no_grad():
        for name, found in sums.items():
            for factor, value in found.factors.items():
                model.model.get_submodule(name).ndlora_factors[adapter_name][factor].copy_(value)
        for wrapper in _wrappers(model):
            for adapter in set(adapters) & set(wrapper.modules_to_save):
                wrapper.modules_to_save[adapter_name].load_state_dict(
                    wrapper.modules_to_save[adapter].state_dict()
                )
        _sum_tokens(model, weighted, adapter_name)


def _parts(layer: NdLoraLayer, weighted: Sequence[tuple[str, float]]) -> list[Part]:
    return [
        Part(adapter, layer.plan[adapter], *layer.tensors(adapter), layer.scaling[adapter], weight)
        for adapter, weight in weighted
        if adapter in layer.ndlora_factors
    ]


def _check(model: BaseTuner, adapters: Sequence[str], weights: Sequence[float], adapter_name: str) -> None:
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
    check_configs(adapters, _configs(model, adapters))
    shared = [
        wrapper for wrapper in _wrappers(model) if len(set(adapters) & set(wrapper.modules_to_save)) > 1
    ]
    if shared:
        raise NdLoraValueError(
            f"Cannot add weighted adapters if they target the same module with modules_to_save, but found "
            f"{len(shared)} such instance(s)."
        )


def _configs(model: BaseTuner, adapters: Sequence[str]) -> list[NdLoraConfig]:
    return [cast(NdLoraConfig, model.peft_config[adapter]) for adapter in adapters]


def _wrappers(model: BaseTuner) -> list[ModulesToSaveWrapper]:
    return [module for module in model.model.modules() if isinstance(module, ModulesToSaveWrapper)]


def _sum_tokens(model: BaseTuner, weighted: Sequence[tuple[str, float]], adapter_name: str) -> None:
    for wrapper in model.model.modules():
        if not isinstance(wrapper, TrainableTokensWrapper) or wrapper.token_adapter.tied_adapter:
            continue
        layer = wrapper.token_adapter
        indices, rows = layer.token_indices.get(adapter_name, []), layer.trainable_tokens_delta
        for adapter, weight in weighted:
            if adapter in layer.token_indices:
                places = [indices.index(index) for index in layer.token_indices[adapter]]
                change = rows[adapter] - layer.trainable_tokens_original[adapter]
                rows[adapter_name][places] += weight * change
