"""Every function of diffusers that one of ours stands before: its LoRA functions would lose an NDLORA adapter.

`ndlora_autoload` calls `activate` when `diffusers.loaders.peft` has been imported.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from ndlora_plugins.errors import NdLoraValueError

from ..patches import stand_before
from ..peft.names import NAME, PREFIX

__all__ = ["activate"]

_SAVE = "ndlora_plugins.integrations.diffusers.save_adapter(component, directory) saves it whole"
_LOAD = "ndlora_plugins.integrations.diffusers.load_adapter(component, directory) loads it"


def activate() -> None:
    """Stand before the functions of diffusers that save and load LoRA. Idempotent."""
    from diffusers.loaders.lora_base import LoraBaseMixin
    from diffusers.loaders.peft import PeftAdapterMixin

    # diffusers/loaders/peft.py:393 and 84, lora_base.py:1032; tried on diffusers 0.42.1
    stand_before(PeftAdapterMixin, "save_lora_adapter", _after(_check_saved_component))
    stand_before(PeftAdapterMixin, "load_lora_adapter", _after(_check_loaded))
    stand_before(LoraBaseMixin, "write_lora_layers", _after(_check_written))


def _after(check: Callable[..., None]) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """A function of diffusers -> the same after a check of its arguments."""

    def make(function: Callable[..., Any]) -> Callable[..., Any]:
        def checked(*args: Any, **kwargs: Any) -> Any:
            check(*args, **kwargs)
            return function(*args, **kwargs)

        return checked

    return make


def _check_saved_component(
    component: Any, save_directory: Any = None, adapter_name: str = "default", *_, **__
) -> None:
    config = getattr(component, "peft_config", {}).get(adapter_name or "default")
    if config is not None and config.peft_type == NAME:
        raise NdLoraValueError(
            f"save_lora_adapter writes no configuration that could be read again, and adapter {adapter_name!r} is "
            f"NDLORA, not LoRA: {_SAVE}."
        )


def _check_written(state_dict: Mapping[str, Any], *_, **__) -> None:
    _refuse_tensors(state_dict, f"save_lora_weights writes LoRA only: {_SAVE}")


def _check_loaded(component: Any, weights: Any = None, *_, **kwargs: Any) -> None:
    weights = kwargs.get("pretrained_model_name_or_path_or_dict", weights)
    if isinstance(weights, Mapping):
        _refuse_tensors(weights, f"load_lora_adapter and load_lora_weights read LoRA only: {_LOAD}")
        return
    path = Path(os.fspath(weights), "adapter_config.json")
    if path.is_file() and json.loads(path.read_text()).get("peft_type") == NAME:
        raise NdLoraValueError(
            f"{weights} holds an NDLORA adapter, and load_lora_adapter reads LoRA only: {_LOAD}."
        )


def _refuse_tensors(tensors: Mapping[str, Any], remedy: str) -> None:
    ours = next((name for name in tensors if f".{PREFIX}" in name), None)
    if ours is not None:
        raise NdLoraValueError(f"{ours!r} is a tensor of an NDLORA adapter. {remedy}.")
