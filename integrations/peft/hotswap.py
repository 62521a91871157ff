"""Hot swap: the tensors of a loaded adapter replaced by those of another one, nothing rebuilt or compiled anew."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple, cast

import torch
from peft import PeftConfig
from peft.utils import infer_device, load_peft_weights
from torch import Tensor, nn

from ndlora_plugins.adapter import LayerAdapter
from ndlora_plugins.errors import NdLoraValueError

from .configuration.config import NdLoraConfig
from .files.format import FACTORS, FROZEN, KEY_PREFIX, tensor_key
from .layers.layer import NdLoraLayer, adapted_layers
from .names import NAME
from .tuner.fingerprint import compare_checksum, other_weights
from .tuner.targets import largest, plan_form

__all__ = ["hotswap_adapter"]


class _Swap(NamedTuple):
    """What is done on one layer."""

    layer: NdLoraLayer
    plan: LayerAdapter
    alpha: float
    copies: list[tuple[Tensor, Tensor]]


def hotswap_adapter(
    model: nn.Module,
    model_name_or_path: str,
    adapter_name: str,
    torch_device: str | None = None,
    **kwargs: Any,
) -> None:
    """Let the loaded adapter `adapter_name` become the one in `model_name_or_path`: as `peft.utils.hotswap` for LoRA.

    For adapters of one method, rank and set of layers; each layer's scaling may differ. Shared factors are swapped too,
    and frozen ones that the file holds. A compiled model is not compiled anew, unless a scaling differs.

    Args:
        model: a PEFT model, compiled or not.
        model_name_or_path: a directory, or a name on the hub.
        adapter_name: of the loaded adapter, whose name stays.
        torch_device: where the file is read to.
        **kwargs: as `PeftConfig.from_pretrained` takes them: `subfolder`, `revision`, ...

    Raises:
        NdLoraValueError: the two do not fit each other; the message says in what. Nothing is changed then.
    """
    configs = cast("dict[str, PeftConfig]", model.peft_config)
    kind = PeftConfig._get_peft_type(model_name_or_path, **_of_hub(kwargs))
    config = NdLoraConfig.from_pretrained(model_name_or_path, **kwargs) if kind == NAME else None
    loaded = configs.get(adapter_name)
    if config is None or not isinstance(loaded, NdLoraConfig):
        raise NdLoraValueError(
            f"{model_name_or_path} is of type {kind}, and the adapter {adapter_name!r} of type "
            f"{getattr(loaded, 'peft_type', 'none')}: both must be {NAME}. The model has: "
            f"{', '.join(configs)}."
        )
    state = load_peft_weights(model_name_or_path, device=torch_device or infer_device(), **kwargs)
    layers = {layer.name: layer for layer in adapted_layers(model, adapter_name)}
    _check(layers, loaded, config, adapter_name)
    paths = {name: path for path, (name, *_) in config.layers.items()} if config.layers else {}
    resolved, widest = config.resolved(), largest(layer.form for layer in layers.values())
    used: set[str] = set()
    swaps = []
    for name, layer in layers.items():
        options = config.options_for(name, resolved)
        plan = plan_form(options, name, layer.form, widest)
        _check_plan(name, layer.plan[adapter_name], plan)
        copies = _copies(layer, adapter_name, plan, state, paths.get(name, name), used)
        if plan.recomputed:
            compare_checksum(config.checksums, name, layer.tensors(adapter_name)[1], exact=False)
        swaps.append(_Swap(layer, plan, options.alpha, copies))
    rest = sorted(set(state) - used)
    if rest:
        raise NdLoraValueError(
            f"{model_name_or_path} holds {len(rest)} tensors that the loaded adapter {adapter_name!r} has not, the "
            f"first is {rest[0]!r}. Load it with load_adapter."
        )
    with torch.no_grad():
        for swap in swaps:
            for old, new in swap.copies:
                old.copy_(new)
            if swap.plan != swap.layer.plan[adapter_name]:
                swap.layer.plan[adapter_name] = swap.plan
                swap.layer.lora_alpha[adapter_name] = swap.alpha
                swap.layer.scaling[adapter_name] = swap.plan.scaling
    config.inference_mode = loaded.inference_mode
    configs[adapter_name] = config


def _of_hub(kwargs: Mapping[str, Any]) -> dict[str, Any]:
    names = ("subfolder", "revision", "cache_dir", "token", "use_auth_token")
    return {name: kwargs[name] for name in names if name in kwargs}


def _check(
    layers: Mapping[str, NdLoraLayer], loaded: NdLoraConfig, config: NdLoraConfig, adapter_name: str
) -> None:
    if any(adapter_name in layer.merged_adapters for layer in layers.values()):
        raise NdLoraValueError(f"Adapter {adapter_name!r} is merged into the base weights: unmerge it first.")
    for field in ("modules_to_save", "trainable_token_indices", "lora_dropout"):
        values = getattr(loaded, field), getattr(config, field)
        if any(values) and (field != "lora_dropout" or values[0] != values[1]):
            raise NdLoraValueError(
                f"{field}={values[1]!r}, and {values[0]!r} of the loaded adapter: only the layers' own tensors can be "
                f"swapped. Load the adapter with load_adapter."
            )
    for field in ("bias", "target_parameters", "random_seed"):
        values = getattr(loaded, field), getattr(config, field)
        frozen_from_seed = any(layer.plan[adapter_name].recomputed for layer in layers.values())
        if values[0] != values[1] and (field != "random_seed" or frozen_from_seed):
            raise NdLoraValueError(
                f"{field}={values[1]!r}, and {values[0]!r} of the loaded adapter: the two must be equal to be swapped. "
                f"Load the adapter with load_adapter."
            )
    other = other_weights(loaded.base_fingerprint or loaded.session.base_fingerprint, config.base_fingerprint)
    if other is not None:
        raise NdLoraValueError(
            f"The adapter was trained on another base model than the loaded one: the weights of layer {other!r} differ."
        )


def _check_plan(name: str, old: LayerAdapter, new: LayerAdapter) -> None:
    for what in ("method", "anchor", "save_frozen"):
        values = [getattr(plan, what) for plan in (old, new)]
        if values[0] != values[1]:
            said = [getattr(value, "name", value) for value in values]
            raise NdLoraValueError(
                f"{what}={said[1]!r} on layer {name!r}, and {said[0]!r} of the loaded adapter: adapters can be swapped "
                f"that have the same one."
            )
    if new.recomputed and old.start != new.start:
        raise NdLoraValueError(
            f"init_lora_weights={new.start.name!r} on layer {name!r}, and {old.start.name!r} of the loaded adapter: "
            f"the frozen factors would be others."
        )
    if (old.structure, old.shared) != (new.structure, new.shared):
        ranks = old.layout.rank, new.layout.rank
        why = f"r={ranks[1]}, and {ranks[0]}" if ranks[0] != ranks[1] else "other options than those"
        raise NdLoraValueError(
            f"Layer {name!r} has {why} of the loaded adapter: factors can be swapped that have the same shapes."
        )


def _copies(
    layer: NdLoraLayer,
    adapter: str,
    plan: LayerAdapter,
    state: Mapping[str, Tensor],
    path: str,
    used: set[str],
) -> list[tuple[Tensor, Tensor]]:
    """(tensor of the model, that of the file), the shared ones too."""
    shared, copies = dict(plan.shared), []
    held: dict[str, Mapping[str, Tensor]] = {FACTORS: layer.trained_parameters(adapter)}
    if not plan.recomputed and plan.frozen:
        held[FROZEN] = layer.tensors(adapter)[1]
    for group, tensors in held.items():
        for factor, old in tensors.items():
            key = tensor_key(group, factor, shared)
            key = key if factor in shared else f"{KEY_PREFIX}{path}.{key}"
            new = state.get(key)
            if new is None or new.shape != old.shape:
                found = "has none" if new is None else f"has shape {list(new.shape)}"
                raise NdLoraValueError(
                    f"{key!r} must have shape {list(old.shape)}, as the loaded adapter has, and the file {found}."
                )
            used.add(key)
            copies.append((old, new))
    return copies
