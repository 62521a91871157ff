"""An adapter directory written without a model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

from torch import Tensor

from ndlora_plugins.adapter import LayerAdapter

from ..configuration.config import SCHEMA_VERSION, NdLoraConfig
from ..layers.weights import WeightForm
from ..tuner.fingerprint import checksum
from .format import FACTORS, FROZEN, KEY_PREFIX, layer_entry, tensor_key
from .tensors import ADAPTER_FILE, save_tensors

__all__ = ["NewLayer", "write_adapter"]


class NewLayer(NamedTuple):
    """One layer of an adapter that is written: its path in the file, its name in the model, and what it holds.

    Attributes:
        frozen: all frozen factors, those that are made again at load too: their checksums are saved.
    """

    path: str
    name: str
    form: WeightForm
    plan: LayerAdapter
    trained: Mapping[str, Tensor]
    frozen: Mapping[str, Tensor]


def write_adapter(
    directory: Path, config: NdLoraConfig, layers: Sequence[NewLayer], others: Mapping[str, Tensor]
) -> int:
    """Write what PEFT's `save_pretrained` would write, with our part of the model card.

    Args:
        directory: is there, and empty.
        config: of the adapter; the table of its layers is filled in here.
        layers: in the model's order.
        others: tensors beside the layers' own, by their names in the file.

    Returns:
        Numbers in the file, without `others`.

    Raises:
        OSError: it cannot be written.
    """
    tensors: dict[str, Tensor] = {}
    checksums = {}
    for layer in layers:
        shared = dict(layer.plan.shared)
        groups = {FACTORS: layer.trained}
        if not layer.plan.recomputed:
            groups[FROZEN] = layer.frozen
        elif layer.frozen:
            checksums[layer.name] = checksum(layer.frozen)
        for group, factors in groups.items():
            for factor, value in factors.items():
                key = tensor_key(group, factor, shared)
                tensors[key if factor in shared else f"{KEY_PREFIX}{layer.path}.{key}"] = value
    # clones: a file holds no views, and no tensor twice
    tensors = {key: value.detach().clone().contiguous() for key, value in tensors.items()}
    save_tensors({**others, **tensors}, directory / ADAPTER_FILE)
    replace(
        config,
        layers={layer.path: layer_entry(layer.name, layer.form) for layer in layers},
        checksums=checksums or None,
        weight_forms=None,
        schema_version=SCHEMA_VERSION,
        inference_mode=True,
    ).save_pretrained(str(directory))
    return sum(value.numel() for value in tensors.values())
