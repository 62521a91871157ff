"""What `add_weighted_adapter` does: a new adapter whose update is the weighted sum of those of others.

It is exact where the factors are put side by side, so that the ranks add up: a sum of products is the product of the
concatenations. The combinations whose names end in "svd" prune the updates as PEFT does (TIES, DARE, by magnitude), add
them up and keep the leading singular vectors. Those that work on the factors are refused: a sum of factors is not the
sum of their products, and factors that started at random have nothing in common entry by entry.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from peft.tuners.tuners_utils import BaseTuner
from peft.utils import ModulesToSaveWrapper, TrainableTokensWrapper, merge_utils
from torch import Tensor

from ndlora_plugins.errors import NdLoraValueError
from ndlora_plugins.integrations.peft.layer import NdLoraLayer
from ndlora_plugins.registry import product_method

if TYPE_CHECKING:
    from ndlora_plugins.adapter import LayerAdapter
    from ndlora_plugins.integrations.peft.config import NdLoraConfig
    from ndlora_plugins.methods import Method
    from ndlora_plugins.structures import Structure

__all__ = ["Combination", "add_weighted"]

_EXACT = ("cat", "linear")
# type -> PEFT's function of the updates
_PRUNED = {
    "ties_svd": merge_utils.ties,
    "dare_linear_svd": merge_utils.dare_linear,
    "dare_ties_svd": merge_utils.dare_ties,
    "magnitude_prune_svd": merge_utils.magnitude_prune,
}


@dataclass(frozen=True)
class Combination:
    """How updates are combined; the options of PEFT's `add_weighted_adapter`.

    Raises:
        NdLoraValueError: from `__init__`, for another type, or for an option that is missing or has no effect.
    """

    type: str = "cat"
    svd_rank: int | None = None
    density: float | None = None
    majority_sign_method: str = "total"

    def __post_init__(self):
        if self.type not in (*_EXACT, "svd", *_PRUNED):
            raise NdLoraValueError(
                f"combination_type={self.type!r}: choose 'cat' (exact, 'linear' is the same) or one that combines "
                f"whole updates and keeps svd_rank of the sum: 'svd', {', '.join(map(repr, _PRUNED))}. A sum of the "
                f"factors, entry by entry, would not be that of the updates."
            )
        if (self.density is None) == (self.type in _PRUNED):
            needs = (
                "needs density, the share of entries to keep" if self.density is None else "has no density"
            )
            raise NdLoraValueError(f"combination_type={self.type!r} {needs}: got density={self.density!r}.")
        if self.density is not None and not 0.0 < self.density <= 1.0:
            raise NdLoraValueError(f"density={self.density!r}: choose a value above 0, up to 1.")
        if self.svd_rank is not None and (self.exact or self.svd_rank < 1):
            raise NdLoraValueError(
                f"svd_rank={self.svd_rank!r} with combination_type={self.type!r}: leave it out, or give an integer of "
                f"at least 1 and a type that ends in 'svd'."
            )
        if self.majority_sign_method not in ("total", "frequency"):
            raise NdLoraValueError(
                f"majority_sign_method={self.majority_sign_method!r}: choose 'total' or 'frequency'."
            )

    @property
    def exact(self) -> bool:
        """Whether the sum keeps all of the updates."""
        return self.type in _EXACT

    def __call__(self, updates: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
        """The combined update of matrices of one shape."""
        weights = torch.tensor(weights, dtype=updates[0].dtype, device=updates[0].device)
        if self.type == "svd":
            return merge_utils.task_arithmetic(updates, weights)
        options = [self.majority_sign_method] if "ties" in self.type else []
        return _PRUNED[self.type](updates, weights, self.density, *options)


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
    configs = [model.peft_config[adapter] for adapter in adapters]
    token_indices = _union_of_tokens(configs)
    sums = {
        name: _sum(name, layer, weighted, combination)
        for name, layer in model.model.named_modules()
        if isinstance(layer, NdLoraLayer) and any(adapter in layer.ndlora_factors for adapter in adapters)
    }
    methods = {found.method.name for found in sums.values()}
    if len(methods) > 1:
        raise NdLoraValueError(
            f"The sum of {list(adapters)} would take the methods {sorted(methods)}: one is needed."
        )
    method = methods.pop()
    ranks = {f"^{re.escape(name)}": found.rank for name, found in sums.items()}
    largest = max(ranks.values())
    smaller = {key: rank for key, rank in ranks.items() if rank != largest}
    saved = {module for config in configs for module in config.modules_to_save or ()}
    model.peft_config[adapter_name] = replace(
        configs[0],
        method=method,
        init_lora_weights=True,
        anchor="none",
        r=largest,
        lora_alpha=largest,
        rank_pattern=smaller,
        alpha_pattern=smaller,
        use_rslora=False,
        **_options(method, configs, sums),
        target_modules="|".join(re.escape(name) for name in sums),
        exclude_modules=None,
        layers_to_transform=None,
        layers_pattern=None,
        modules_to_save=sorted(saved) or None,
        trainable_token_indices=token_indices,
        base_fingerprint=None,
        weight_forms=None,
        checksums=None,
        save_frozen=False,
    )
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
        config = model.peft_config[adapter]
        if config.target_parameters:
            raise NdLoraValueError(
                f"add_weighted_adapter does not support targeting nn.Parameter: adapter {adapter!r} has "
                f"target_parameters={sorted(config.target_parameters)}."
            )
        if config.bias != "none":
            raise NdLoraValueError(
                f"Adapter {adapter!r} has bias={config.bias!r}: it trains the base model's own biases, which cannot be "
                f"added to another's."
            )
    shared = [
        wrapper for wrapper in _wrappers(model) if len(set(adapters) & set(wrapper.modules_to_save)) > 1
    ]
    if shared:
        raise NdLoraValueError(
            f"Cannot add weighted adapters if they target the same module with modules_to_save, but found "
            f"{len(shared)} such instance(s)."
        )


def _wrappers(model: BaseTuner) -> list[ModulesToSaveWrapper]:
    return [module for module in model.model.modules() if isinstance(module, ModulesToSaveWrapper)]


def _union_of_tokens(configs: Sequence[NdLoraConfig]) -> list[int] | dict[str, list[int]] | None:
    given = [config.trainable_token_indices for config in configs if config.trainable_token_indices]
    if not given:
        return None
    if all(isinstance(indices, list) for indices in given):
        return sorted(set().union(*given))
    if not all(isinstance(indices, dict) for indices in given):
        raise NdLoraValueError(
            "trainable_token_indices is a list in one adapter and a dict in another: adapters whose tokens are to be "
            "added up must give them in the same way."
        )
    layers = dict.fromkeys(layer for indices in given for layer in indices)
    return {layer: sorted(set().union(*(indices.get(layer, ()) for indices in given))) for layer in layers}


def _options(method: str, configs: Sequence[NdLoraConfig], sums: Mapping[str, Sum]) -> dict[str, Any]:
    """The fields with the method's own options: the adapters' where it is theirs and they say the same, else how each
    layer's features are split into modes.
    """
    said = [(config.method, str(config.modes), config.resolved().options) for config in configs]
    if method == configs[0].method and all(each == said[0] for each in said):
        return {}
    modes = {
        f"^{re.escape(name)}": dict(found.mode_sizes) for name, found in sums.items() if found.mode_sizes
    }
    return {"options": None, "modes": modes or None, "num_modes": 2, "crossed_modes": None}


def _sum_tokens(model: BaseTuner, weighted: Sequence[tuple[str, float]], adapter_name: str) -> None:
    for wrapper in model.model.modules():
        if not isinstance(wrapper, TrainableTokensWrapper) or wrapper.token_adapter.tied_adapter:
            continue
        layer = wrapper.token_adapter
        indices, rows = layer.token_indices.get(adapter_name), layer.trainable_tokens_delta
        for adapter, weight in weighted:
            if adapter in layer.token_indices:
                places = [indices.index(index) for index in layer.token_indices[adapter]]
                change = rows[adapter] - layer.trainable_tokens_original[adapter]
                rows[adapter_name][places] += weight * change


class Sum(NamedTuple):
    """The combined update of one layer: the factors of `method` with this rank, and how the features are split."""

    method: Method
    rank: int
    factors: Mapping[str, Tensor]
    mode_sizes: Mapping[str, tuple[int, ...]] = {}


def _sum(name: str, layer: NdLoraLayer, weighted: list[tuple[str, float]], combination: Combination) -> Sum:
    """The sum on one layer."""
    weighted = [(adapter, weight) for adapter, weight in weighted if adapter in layer.ndlora_factors]
    if not combination.exact:
        return _approximate(name, layer, weighted, combination)
    plans = [layer.plan[adapter] for adapter, _ in weighted]
    with torch.no_grad():
        updates = [
            plan.factors(*layer.tensors(adapter)) for plan, (adapter, _) in zip(plans, weighted, strict=True)
        ]
        scaled = []
        for (structure, factors), (adapter, weight) in zip(updates, weighted, strict=True):
            # linear in each factor: the scale goes into one
            first = next(factor.name for factor in structure.factors if factor.indices is None)
            scaled.append((structure, {**factors, first: weight * layer.scaling[adapter] * factors[first]}))
        found = _same_method(plans, scaled) or _products(scaled)
    if found is not None:
        return found
    named = ", ".join(
        f"{adapter} ({plan.method.name})" for (adapter, _), plan in zip(weighted, plans, strict=True)
    )
    raise NdLoraValueError(
        f"The updates of {named} on layer {name!r} cannot be added up in one adapter: they must all have a low-rank "
        f"form, or all be of one method that splits the layer alike. Use combination_type='svd' with svd_rank, or "
        f"merge them into the base model one after the other."
    )


def _same_method(
    plans: Sequence[LayerAdapter], updates: Sequence[tuple[Structure, Mapping[str, Tensor]]]
) -> Sum | None:
    """The sum in the adapters' own method, if it is one, trains all its factors, each layer's its own, and holds sums
    in a larger rank.
    """
    method, structures = plans[0].method, [structure for structure, _ in updates]
    units = {structure.unit for structure in structures}
    if len(units) > 1 or None in units or any(plan.method != method or plan.shared for plan in plans):
        return None
    if method.trained_names(plans[0].layout.options) is not None:
        return None
    factors = structures[0].add([factors for _, factors in updates])
    return Sum(method, sum(structure.rank for structure in structures), factors, structures[0].mode_sizes)


def _products(updates: Sequence[tuple[Structure, Mapping[str, Tensor]]]) -> Sum | None:
    """The sum of low-rank forms: sum_i B_i A_i = [B_1 B_2 ..] [A_1; A_2; ..]."""
    forms = [structure.low_rank(factors) for structure, factors in updates]
    if any(form is None for form in forms):
        return None
    return _holding(torch.cat([down for down, _ in forms]), torch.cat([up for _, up in forms], dim=1))


def _holding(down: Tensor, up: Tensor) -> Sum:
    """up @ down, in the method that holds any such product."""
    method, structure = product_method(down.shape[1], up.shape[0], rank=len(down))
    return Sum(method, len(down), structure.hold(down, up))


def _approximate(
    name: str, layer: NdLoraLayer, weighted: list[tuple[str, float]], combination: Combination
) -> Sum:
    """As `_sum`, by the leading singular vectors of the combined update, which is formed."""
    plans = [layer.plan[adapter] for adapter, _ in weighted]
    split = [adapter for adapter, _ in weighted if layer.plan[adapter].structure.mode_sizes]
    if split and combination.svd_rank is None:
        raise NdLoraValueError(
            f"combination_type={combination.type!r} on layer {name!r}: the update of {split[0]!r} is made of modes, "
            f"and its r says nothing about the rank to keep. Give svd_rank."
        )
    updates = [layer.form.matrix(layer.get_delta_weight(adapter)) for adapter, _ in weighted]
    update = combination(updates, [weight for _, weight in weighted])
    up, values, down = torch.linalg.svd(update, full_matrices=False)
    rank = min(combination.svd_rank or max(plan.layout.rank for plan in plans), len(values))
    return _holding(values[:rank, None] * down[:rank], up[:, :rank])
