"""What the base model looked like when an adapter was made: some weights of some layers, kept in its config.

A start that was read from the weights is recomputed at load, so another base would silently give another update.
Layers' shapes are compared for every method.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ndlora_plugins.errors import BaseModelWarning, NdLoraValueError

from ..files.json_files import check_fingerprint

__all__ = [
    "FingerprintedLayer",
    "checksum",
    "compare_checksum",
    "compare_fingerprint",
    "make_fingerprint",
    "other_weights",
]

MAX_LAYERS = 16
MAX_VALUES = 8

# relative difference that a change of storage alone may cause, by the coarser of the two kinds
_TOLERANCE = {"float64": 0.0, "float32": 1e-6, "float16": 2e-3, "bfloat16": 1e-2, "8bit": 0.1, "4bit": 0.3}


class FingerprintedLayer(NamedTuple):
    """Name, shape (out, in) and weight (out, in) of an adapted layer, or a function that dequantises it; no weight
    where it cannot be read.
    """

    name: str
    shape: tuple[int, int]
    weight: Tensor | Callable[[], Tensor] | None
    storage: str


def make_fingerprint(layers: Sequence[FingerprintedLayer]) -> dict | None:
    """Sample at most 16 layers, 8 values each, evenly spread. JSON-serialisable; None without layers."""
    if not layers:
        return None
    last = len(layers) - 1
    # from the first to the last with a step that is no whole number, which would hit one projection again and again
    picks = (
        {round(k * last / (MAX_LAYERS - 1)) for k in range(MAX_LAYERS)}
        if last >= MAX_LAYERS
        else range(last + 1)
    )
    return {layers[pick].name: _sample(layers[pick]) for pick in sorted(picks)}


def _sample(layer: FingerprintedLayer) -> dict:
    values = None
    if layer.weight is not None:
        weight = (layer.weight() if callable(layer.weight) else layer.weight).detach()
        rows, columns = weight.shape
        # evenly over the diagonal of the rectangle: every value from another row and another column
        steps = torch.arange(min(MAX_VALUES, rows, columns), dtype=torch.float64)
        picks = (steps + 0.5) / len(steps)
        row, column = (picks * rows).long(), (picks * columns).long()
        sampled = weight[row.to(weight.device), column.to(weight.device)]
        values = sampled.to("cpu", torch.float32).tolist()
    return {"shape": list(layer.shape), "storage": layer.storage, "values": values}


def compare_fingerprint(
    saved: dict, layers: Sequence[FingerprintedLayer], *, reads_weight: bool, base_name: str | None
) -> None:
    """Hold the base model against an adapter's fingerprint.

    Args:
        saved: as `make_fingerprint` made it.
        layers: the adapted layers of the model at hand.
        reads_weight: whether a start is recomputed from the weights: a difference is then an error, else a warning.
        base_name: of the model that the adapter was trained on, for the message.

    Raises:
        NdLoraValueError: a layer is missing, has another shape or, with `reads_weight`, other weights; or `saved` is
            no fingerprint.
    """
    check_fingerprint(saved)
    remedy = f"Load the adapter on the model it was trained on{f' ({base_name})' if base_name else ''}."
    present = {layer.name: layer for layer in layers}
    for name, expected in saved.items():
        layer = present.get(name)
        if layer is None:
            raise NdLoraValueError(
                f"The adapter was trained on a base model with an adapted layer {name!r}; this model has none. {remedy}"
            )
        if list(layer.shape) != list(expected["shape"]):
            raise NdLoraValueError(
                f"Layer {name!r} is {layer.shape[0]} x {layer.shape[1]} (out x in) in this base model; the adapter "
                f"was trained on {expected['shape'][0]} x {expected['shape'][1]}. {remedy}"
            )
    for name, expected in saved.items():
        found = _sample(present[name])
        if found["values"] is None or expected["values"] is None:
            continue  # the weight could not be read, here or there
        difference = _relative_difference(found["values"], expected["values"])
        kinds = (found["storage"], expected["storage"])
        if kinds[0] == kinds[1]:
            allowed = 1e-6 if hasattr(torch, kinds[0]) else 1e-2  # dequantised to one float dtype or another
        else:
            allowed = max(_TOLERANCE.get(kind, 0.3) for kind in kinds)
        differs = not difference <= allowed  # so for NaN in the model's weights
        if differs and reads_weight:
            raise NdLoraValueError(
                f"The weights of layer {name!r} differ from those that the adapter was trained on by "
                f"{difference:.2g} of their norm (stored as {kinds[0]}, then {kinds[1]}), and its start is "
                f"recomputed from them: the result would be wrong. {remedy}"
            )
        if differs:
            warnings.warn(
                f"The weights of layer {name!r} differ from those that the adapter was trained on by "
                f"{difference:.2g} of their norm: another or a changed base model? {remedy}",
                BaseModelWarning,
                stacklevel=2,
            )
            return
        if reads_weight and difference > 0.02:
            warnings.warn(
                f"The base model is stored as {kinds[0]}, the adapter was trained on {kinds[1]}; its start is "
                f"recomputed from weights that differ by {difference:.2g} of their norm.",
                BaseModelWarning,
                stacklevel=2,
            )
            reads_weight = False  # say it once


def other_weights(first: dict | None, second: dict | None) -> str | None:
    """A layer whose weight, stored in the same way, is another one in two fingerprints; None if there is none."""
    for name, entry in (second or {}).items():
        other = (first or {}).get(name)
        if (
            other is None
            or entry["storage"] != other["storage"]
            or None in (entry["values"], other["values"])
        ):
            continue
        if _relative_difference(entry["values"], other["values"]) > 1e-4:
            return name
    return None


def checksum(factors: Mapping[str, Tensor]) -> dict[str, float] | None:
    """A number for each tensor, between -1 and 1 in which its entries count with their signs; None on "meta"."""
    if any(value.is_meta for value in factors.values()):
        return None
    return {name: _checksum(value.detach().flatten().double().cpu()) for name, value in factors.items()}


def _checksum(values: Tensor) -> float:
    values = values[:: 1 + len(values) // 2**16]  # of a large one evenly spread
    weights = torch.arange(len(values), dtype=torch.float64).cos()
    return float(values @ weights / (values.norm() * weights.norm()).clamp(min=1e-300))


def compare_checksum(
    checksums: Mapping[str, Any] | None, layer: str, factors: Mapping[str, Tensor], exact: bool
) -> None:
    """Hold factors of a layer that were made again at load against those of training.

    Args:
        checksums: the configuration's, of all layers; None where the file has none: nothing is compared then.
        factors: on "meta" they are not compared either.
        exact: whether the base weights are stored as they were.

    Raises:
        NdLoraValueError: they are others, so that what was trained would mean something else.
    """
    if checksums is None:
        return
    saved = checksums.get(layer)
    for name, value in (checksum(factors) or {}).items():
        expected = saved.get(name) if isinstance(saved, dict) else None
        if not isinstance(expected, float) or abs(expected - value) > (1e-3 if exact else 0.3):
            raise NdLoraValueError(
                f"Factor {name!r} of layer {layer!r} is made again at load, and comes out as another one than in "
                f"training (checksum {value:.6g}, then {expected}): the result would be wrong. Use the base model, "
                f"the random_seed and the libraries of the training, or save with save_frozen=True there."
            )


def _relative_difference(found: Sequence[float], expected: Sequence[float]) -> float:
    if len(found) != len(expected):
        return math.inf
    norm, difference = math.hypot(*expected), math.dist(found, expected)
    return difference / norm if norm else (math.inf if difference else 0.0)
