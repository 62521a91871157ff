"""What an adapter's file holds, and under which keys; and the table of its layers in adapter_config.json.

A layer's tensors are `base_model.model.<layer>.ndlora_factors.<factor>` (what trains) and `...ndlora_frozen.<factor>`;
what layers share is `base_model.ndlora_shared.<key>` and `base_model.ndlora_shared_frozen.<key>`. Everything else is
PEFT's: `modules_to_save`, trained token rows, biases.

The table `layers` maps each layer, as the file names it, to [name in the model, kind, shape]; shape is (out, in) of a
linear layer, else that of the weight as it is stored.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

from ..configuration.config import NdLoraConfig
from ..layers.shared import SHARED
from ..layers.weights import WeightForm
from ..names import PREFIX
from .json_files import check_layers, check_weight_forms

__all__ = [
    "FACTORS",
    "FROZEN",
    "KEY_PREFIX",
    "TOKEN_ROWS",
    "layer_entry",
    "layer_forms",
    "shared_key",
    "split_key",
    "tensor_key",
]

# PEFT's, of every key in an adapter file
KEY_PREFIX = "base_model.model."
# and of the trained rows of an embedding
TOKEN_ROWS = ".token_adapter.trainable_tokens_delta"
FACTORS, FROZEN = f"{PREFIX}factors", f"{PREFIX}frozen"
_SHARED = {FACTORS: f"base_model.{SHARED}.", FROZEN: f"base_model.{SHARED}_frozen."}

Shapes = Mapping[str, Mapping[str, tuple[int, ...]]]


def split_key(key: str) -> tuple[str | None, str]:
    """(layer, "ndlora_factors.down"), ("", key) of a shared tensor, or (None, key) of a tensor that is not ours."""
    if key.startswith(tuple(_SHARED.values())):
        return "", key
    for group in (FACTORS, FROZEN):
        layer, found, factor = key.rpartition(f".{group}.")
        if found and "." not in factor and layer.startswith(KEY_PREFIX):
            return layer.removeprefix(KEY_PREFIX), f"{group}.{factor}"
    return None, key


def shared_key(group: str, key: str) -> str:
    """The key under which a file holds what layers share: a group, and the key that the method gave it."""
    return f"{_SHARED[group]}{key}"


def tensor_key(group: str, factor: str, shared: Mapping[str, str]) -> str:
    """The key of a factor among its layer's tensors, or of the tensor that its layer shares.

    Args:
        shared: factor -> key, of those that are shared.
    """
    return shared_key(group, shared[factor]) if factor in shared else f"{group}.{factor}"


def layer_entry(name: str, form: WeightForm) -> list:
    """What the table `layers` has of a layer: its name in the model, kind and shape."""
    return [name, form.kind, list(form.matrix_shape if form.kind == "linear" else form.shape)]


def layer_forms(config: NdLoraConfig, shapes: Shapes) -> dict[str, tuple[str, WeightForm | None]]:
    """Layer, as the file names it -> its name in the model and the form of its weight.

    The form is None where an old file does not tell it, and of a layer that the table has not.

    Args:
        shapes: layer -> "ndlora_factors.down" and the like -> shape.

    Raises:
        NdLoraValueError: the table is broken.
    """
    if config.layers is None:
        return _forms_of_schema_1(config, shapes)
    check_layers(config.layers)
    listed: dict[str, tuple[str, WeightForm | None]] = {
        path: (name, WeightForm(kind, tuple(shape), transposed=kind == "embedding"))
        for path, (name, kind, shape) in config.layers.items()
    }
    return listed | {path: (path, None) for path in shapes if path not in listed}


def _forms_of_schema_1(config: NdLoraConfig, shapes: Shapes) -> dict[str, tuple[str, WeightForm | None]]:
    """Files of the first release list the layers that are not linear; linear ones are told by their tensors."""
    listed = config.weight_forms or {}
    check_weight_forms(listed)
    reads_base = config.resolved().reads_base
    found: dict[str, tuple[str, WeightForm | None]] = {}
    for path, tensors in shapes.items():
        entry = listed.get(path)
        if entry is not None:
            form = WeightForm(entry["kind"], tuple(entry["shape"]), transposed=entry["kind"] == "embedding")
            found[path] = entry["name"], form
            continue
        by_factor = {name.partition(".")[2]: shape for name, shape in tensors.items()}
        modes = [shape for name, shape in by_factor.items() if name.startswith("mode_") and len(shape) == 3]
        known = (config.base_fingerprint or {}).get(path)
        shape: tuple[int, ...] | None = None
        if modes:
            _, out_modes, in_modes = zip(*modes, strict=True)  # each (terms, out_mode, in_mode)
            shape = math.prod(out_modes), math.prod(in_modes)
        elif len(by_factor.get("down", ())) == len(by_factor.get("up", ())) == 2:
            shape = by_factor["up"][0], by_factor["down"][1]
        elif known is not None:
            shape = tuple(known["shape"])
        elif reads_base:
            # what is saved of an adapter that recomputes the rest does not depend on it: the smallest will do
            shape = (config.options_for(path).rank,) * 2
        found[path] = path, None if shape is None else WeightForm("linear", shape)
    return found
