"""`trainable_token_indices` held against the model: PEFT would fail halfway, or in the first forward."""

from __future__ import annotations

from collections.abc import Collection

import torch
from torch import nn

from ndlora_plugins.errors import NdLoraValueError

from ..configuration.config import NdLoraConfig

__all__ = ["check_rows"]


def check_rows(config: NdLoraConfig, model: nn.Module, adapted: Collection[str]) -> None:
    """Every named layer has such rows, and no adapter of its own.

    Args:
        adapted: names of the layers that get an adapter.

    Raises:
        NdLoraValueError: names the layer.
    """
    rows = config.trainable_token_indices or {}
    if isinstance(rows, list):
        embedding = getattr(model, "get_input_embeddings", lambda: None)()
        names = [name for name, module in model.named_modules() if module is embedding]
        rows = {name: rows for name in names[:1]}  # PEFT says so where there is none
    for ending, indices in rows.items():
        for name, module in model.named_modules():
            if name.endswith(ending):
                _check_layer(name, module, indices, name in adapted)


def _check_layer(name: str, module: nn.Module, indices: list[int], is_adapted: bool) -> None:
    given = f"trainable_token_indices={indices} for layer {name!r}"
    if is_adapted:
        raise NdLoraValueError(
            f"{given}: it gets an adapter too. Take it out of target_modules, name it in exclude_modules, or train "
            f"no rows of it."
        )
    if not isinstance(module, nn.Embedding | nn.Linear) and not hasattr(module, "token_adapter"):
        raise NdLoraValueError(
            f"{given}: it is a {type(module).__name__}, which has no rows of tokens. Name an embedding."
        )
    if getattr(module, "bias", None) is not None:
        raise NdLoraValueError(
            f"{given}: PEFT leaves out the layer's bias where rows of it train. Name it in modules_to_save instead."
        )
    assert isinstance(module.weight, torch.Tensor), f"{type(module).__name__} has rows"
    count = len(module.weight)
    if max(indices) >= count:
        raise NdLoraValueError(f"{given}: it has {count} rows. Choose indices from 0 to {count - 1}.")
