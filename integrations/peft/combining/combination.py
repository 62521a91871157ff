"""How the updates of several adapters on one layer become one, whatever holds them: a model or a directory.

It is exact where the factors are put side by side, so that the ranks add up: a sum of products is the product of the
concatenations. The combinations whose names end in "svd" prune the updates as PEFT does (TIES, DARE, by magnitude), add
them up and keep the leading singular vectors. "cluster" and "keep_down" make a small adapter of the low-rank forms.
Those that work on the factors are refused: a sum of factors is not the sum of their products, and factors that started
at random have nothing in common entry by entry.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import reduce
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from peft.utils import merge_utils
from torch import Tensor

from ndlora_plugins.errors import NdLoraValueError
from ndlora_plugins.fused import cast_factors
from ndlora_plugins.registry import product_method

from ..layers.merging import scaled_delta
from .cluster import cluster_units

if TYPE_CHECKING:
    from ndlora_plugins.adapter import LayerAdapter
    from ndlora_plugins.methods import Method
    from ndlora_plugins.structures import Structure

    from ..configuration.config import NdLoraConfig

__all__ = ["COMBINATIONS", "Combination", "Part", "Sum", "check_configs", "combine_configs", "combine_parts"]

_EXACT = ("cat", "linear")
# type -> PEFT's function of the updates
_PRUNED = {
    "ties_svd": merge_utils.ties,
    "dare_linear_svd": merge_utils.dare_linear,
    "dare_ties_svd": merge_utils.dare_ties,
    "magnitude_prune_svd": merge_utils.magnitude_prune,
}
_OF_FORMS = ("cluster", "keep_down")
COMBINATIONS = (*_EXACT, "svd", *_PRUNED, *_OF_FORMS)


@dataclass(frozen=True)
class Combination:
    """A way to combine updates; the options of PEFT's `add_weighted_adapter`.

    Attributes:
        type: one of `COMBINATIONS`.
        svd_rank: the rank to keep, of a type that ends in "svd" and of "cluster".
        density: the share of the entries that pruning keeps.
        majority_sign_method: of the two types with "ties".

    Raises:
        NdLoraValueError: from `__init__`, for another type, or for an option that is missing or has no effect.
    """

    type: str = "cat"
    svd_rank: int | None = None
    density: float | None = None
    majority_sign_method: str = "total"

    def __post_init__(self):
        if self.type not in COMBINATIONS:
            raise NdLoraValueError(
                f"combination_type={self.type!r}: choose 'cat' (exact, 'linear' is the same), one that combines whole "
                f"updates and keeps svd_rank of the sum: 'svd', {', '.join(map(repr, _PRUNED))}; or 'cluster' or "
                f"'keep_down'. A sum of the factors, entry by entry, would not be that of the updates."
            )
        if (self.density is None) == (self.type in _PRUNED):
            needs = (
                "needs density, the share of entries to keep" if self.density is None else "has no density"
            )
            raise NdLoraValueError(f"combination_type={self.type!r} {needs}: got density={self.density!r}.")
        if self.density is not None and not 0.0 < self.density <= 1.0:
            raise NdLoraValueError(f"density={self.density!r}: choose a value above 0, up to 1.")
        has_rank = not self.exact and self.type != "keep_down"
        if self.svd_rank is not None and (not has_rank or self.svd_rank < 1):
            raise NdLoraValueError(
                f"svd_rank={self.svd_rank!r} with combination_type={self.type!r}: leave it out, or give an integer of "
                f"at least 1 and 'cluster' or a type that ends in 'svd'."
            )
        if self.majority_sign_method not in ("total", "frequency"):
            raise NdLoraValueError(
                f"majority_sign_method={self.majority_sign_method!r}: choose 'total' or 'frequency'."
            )

    @property
    def exact(self) -> bool:
        """Tell whether the sum keeps all of the updates."""
        return self.type in _EXACT

    def __call__(self, updates: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
        """The combined update of matrices of one shape."""
        scales = torch.tensor(weights, dtype=updates[0].dtype, device=updates[0].device)
        if self.type == "svd":
            return merge_utils.task_arithmetic(list(updates), scales)
        options = [self.majority_sign_method] if "ties" in self.type else []
        return _PRUNED[self.type](updates, scales, self.density, *options)


class Part(NamedTuple):
    """One adapter's update of a layer: its plan and tensors, its scaling, and its weight in the sum."""

    adapter: str
    plan: LayerAdapter
    trained: Mapping[str, Tensor]
    frozen: Mapping[str, Tensor]
    scaling: float
    weight: float

    def scaled(self) -> tuple[Structure, Mapping[str, Tensor]]:
        """The structure and factors of weight * scaling * dW."""
        structure, factors = self.plan.update(self.trained, self.frozen)
        # linear in each factor: the scale goes into one
        first = next(factor.name for factor in structure.factors if factor.indices is None)
        return structure, {**factors, first: self.weight * self.scaling * factors[first]}


class Sum(NamedTuple):
    """The combined update of one layer: the factors of `method` with this rank, and how the features are split."""

    method: Method
    rank: int
    factors: Mapping[str, Tensor]
    mode_sizes: Mapping[str, tuple[int, ...]] = {}


def combine_parts(name: str, parts: Sequence[Part], combination: Combination) -> Sum:
    """The combination of the updates of one layer.

    Args:
        name: of the layer, for messages.

    Raises:
        NdLoraValueError: it cannot be written as one adapter.
    """
    with torch.no_grad():
        if combination.type in _OF_FORMS:
            return _of_forms(name, parts, combination)
        if not combination.exact:
            return _approximate(name, parts, combination)
        scaled = [part.scaled() for part in parts]
        found = _same_method([part.plan for part in parts], scaled) or _products(scaled)
    if found is not None:
        return found
    raise NdLoraValueError(
        f"The updates of {_named(parts)} on layer {name!r} cannot be added up in one adapter: they must all have a "
        f"low-rank form, or all be of one method that splits the layer alike. Use combination_type='svd' with "
        f"svd_rank, or merge them into the base model one after the other."
    )


def _named(parts: Sequence[Part]) -> str:
    return ", ".join(f"{part.adapter} ({part.plan.method.name})" for part in parts)


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
    if any(plan.trained != plan.structure.factors for plan in plans):
        return None
    factors = structures[0].add([factors for _, factors in updates])
    return Sum(method, sum(structure.rank for structure in structures), factors, structures[0].mode_sizes)


def _products(updates: Sequence[tuple[Structure, Mapping[str, Tensor]]]) -> Sum | None:
    """The sum of low-rank forms: sum_i B_i A_i = [B_1 B_2 ..] [A_1; A_2; ..]."""
    found = [structure.low_rank(factors) for structure, factors in updates]
    forms = [form for form in found if form is not None]
    if len(forms) < len(found):
        return None
    return _holding(torch.cat([down for down, _ in forms]), torch.cat([up for _, up in forms], dim=1))


def _of_forms(name: str, parts: Sequence[Part], combination: Combination) -> Sum:
    """As `combine_parts`, from the low-rank forms, without the updates themselves."""
    forms = []
    for part in parts:
        structure, factors = part.scaled()
        form = structure.low_rank(cast_factors(factors, torch.float64))
        if form is None:
            raise NdLoraValueError(
                f"combination_type={combination.type!r} on layer {name!r} needs the low-rank form of every update, and "
                f"that of {part.adapter} (method={part.plan.method.name!r}) has none. Use combination_type='svd' with "
                f"svd_rank."
            )
        forms.append(form)
    dtype = next(iter(parts[0].trained.values())).dtype
    if combination.type == "keep_down":
        # up = dW A^T (A A^T)^-1, the least squares of up A = dW = sum_i B_i A_i
        down = forms[0][0]
        inverse = torch.linalg.pinv(down)
        up = reduce(torch.add, [own_up @ (own_down @ inverse) for own_down, own_up in forms])
    else:
        rank = combination.svd_rank or round(sum(len(down) for down, _ in forms) / len(forms))
        down, up = cluster_units(
            torch.cat([down for down, _ in forms]), torch.cat([up for _, up in forms], dim=1), rank
        )
    return _holding(down.to(dtype), up.to(dtype))


def _holding(down: Tensor, up: Tensor) -> Sum:
    """up @ down, in the method that holds any such product."""
    method, structure = product_method(down.shape[1], up.shape[0], rank=len(down))
    return Sum(method, len(down), structure.hold(down, up))


def _approximate(name: str, parts: Sequence[Part], combination: Combination) -> Sum:
    """As `combine_parts`, by the leading singular vectors of the combined update, which is formed."""
    split = [part.adapter for part in parts if part.plan.structure.mode_sizes]
    if split and combination.svd_rank is None:
        raise NdLoraValueError(
            f"combination_type={combination.type!r} on layer {name!r}: the update of {split[0]!r} is made of modes, "
            f"and its r says nothing about the rank to keep. Give svd_rank."
        )
    updates = [scaled_delta(part.plan, part.trained, part.frozen, part.scaling) for part in parts]
    update = combination(updates, [part.weight for part in parts])
    up, values, down = torch.linalg.svd(update, full_matrices=False)
    rank = min(combination.svd_rank or max(part.plan.layout.rank for part in parts), len(values))
    return _holding(values[:rank, None] * down[:rank], up[:, :rank])


def check_configs(adapters: Sequence[str], configs: Sequence[NdLoraConfig]) -> None:
    """Refuse adapters that train what cannot be added up.

    Raises:
        NdLoraValueError: bare parameters, or the base model's own biases.
    """
    for adapter, config in zip(adapters, configs, strict=True):
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


def combine_configs(
    adapters: Sequence[str], configs: Sequence[NdLoraConfig], sums: Mapping[str, Sum]
) -> NdLoraConfig:
    """The configuration of the combined adapter: of layer's name -> what `combine_parts` gave.

    Raises:
        NdLoraValueError: the layers would need more than one method, or tokens are given in two ways.
    """
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
    return replace(
        configs[0],
        method=method,
        init_lora_weights=True,
        anchor="none",
        r=largest,
        lora_alpha=largest,
        rank_pattern=smaller,
        alpha_pattern=dict(smaller),
        use_rslora=False,
        **_options(method, configs, sums),
        target_modules="|".join(re.escape(name) for name in sums),
        exclude_modules=None,
        layers_to_transform=None,
        layers_pattern=None,
        modules_to_save=sorted(saved) or None,
        trainable_token_indices=union_of_tokens(configs),
        base_fingerprint=None,
        weight_forms=None,
        layers=None,
        checksums=None,
        save_frozen=False,
        schedules={},  # they were of the trainings that made the parts
        gradient_batches=None,
    )


def union_of_tokens(configs: Sequence[NdLoraConfig]) -> list[int] | dict[str, list[int]] | None:
    """The tokens whose rows any of the adapters trains, in the way that they give them.

    Raises:
        NdLoraValueError: one gives a list and another a dict.
    """
    given: list[Any] = [config.trainable_token_indices for config in configs]
    given = [indices for indices in given if indices]
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
    return {"options": None, "modes": modes or None, "num_modes": None, "crossed_modes": None}
