"""Two adapter directories compared: what their configurations say, and how their updates differ layer by layer."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ndlora_plugins.errors import NdLoraValueError
from ndlora_plugins.fused import cast_factors

from ..configuration.validation import fields_to_set
from ..files.adapter import AdapterReader, ReadLayer
from ..files.problems import check_sound

__all__ = ["AdapterDiff", "LayerDiff", "diff_adapters"]


@dataclass(frozen=True)
class LayerDiff:
    """One layer that both adapt.

    Attributes:
        norms: ||scaling dW||_F of both.
        change: ||B - A|| / ||A||; infinite where A is zero and B is not.
        cosine: <A, B> / (||A|| ||B||); None where one is zero.
    """

    name: str
    norms: tuple[float, float]
    change: float
    cosine: float | None


@dataclass(frozen=True)
class AdapterDiff:
    """The differences between A and B.

    Attributes:
        fields: field of the configuration -> its values in A and in B, where they differ.
        only: names of the layers that only A, and that only B adapts.
        layers: those of both, in A's order.
        beside: tensors beside the layers (heads, token rows) that differ, or that one has alone.
    """

    fields: Mapping[str, tuple[Any, Any]]
    only: tuple[tuple[str, ...], tuple[str, ...]]
    layers: tuple[LayerDiff, ...]
    beside: tuple[str, ...]

    @property
    def same(self) -> bool:
        """Tell whether they give the same answers, however they are made: up to 1e-6 of each update."""
        return not any(self.only) and not self.beside and all(layer.change <= 1e-6 for layer in self.layers)


def diff_adapters(
    first: str | Path, second: str | Path, *, base: str | None = None, trust_remote_code: bool = False
) -> AdapterDiff:
    """Compare two adapters of one base model, of whatever methods.

    Args:
        first, second: directories, or names on the hub.
        base: the base model, where a start is made again from its weights and the configurations name none.

    Raises:
        NdLoraValueError: one of them is broken, or a layer is of another shape in the other.
    """
    readers = [AdapterReader(first), AdapterReader(second)]
    bases = [
        reader.open_base(base, trust_remote_code) if reader.reads_base or base is not None else None
        for reader in readers
    ]
    for reader, files in zip(readers, bases, strict=True):
        check_sound(reader, files)
    paths = [{reader.name(path): path for path in reader.shapes} for reader in readers]
    layers = []
    with torch.no_grad():
        for name in (name for name in paths[0] if name in paths[1]):
            pair = [
                reader.read(own[name], files)
                for reader, own, files in zip(readers, paths, bases, strict=True)
            ]
            layers.append(_compare(*pair))
    others = [reader.other_tensors() for reader in readers]
    beside = [
        key
        for key in sorted(others[0].keys() | others[1].keys())
        if key not in others[0] or key not in others[1] or not torch.equal(others[0][key], others[1][key])
    ]
    return AdapterDiff(
        _fields(readers),
        (
            tuple(name for name in paths[0] if name not in paths[1]),
            tuple(name for name in paths[1] if name not in paths[0]),
        ),
        tuple(layers),
        tuple(beside),
    )


def _fields(readers: list[AdapterReader]) -> dict[str, tuple[Any, Any]]:
    values = [
        {field.name: getattr(reader.config, field.name) for field in fields_to_set(reader.config)}
        | {name: getattr(reader.config, name) for name in ("base_model_name_or_path", "task_type")}
        for reader in readers
    ]
    return {name: (value, values[1][name]) for name, value in values[0].items() if value != values[1][name]}


def _compare(first: ReadLayer, second: ReadLayer) -> LayerDiff:
    """Inner products of the two updates, neither formed where one has a low-rank form."""
    shapes = [(layer.plan.layout.out_features, layer.plan.layout.in_features) for layer in (first, second)]
    if shapes[0] != shapes[1]:
        raise NdLoraValueError(
            f"Layer {first.name!r} is {list(shapes[0])} (out x in) in the one adapter and {list(shapes[1])} in the "
            f"other: they are of different base models."
        )
    wide = [
        layer._replace(
            trained=cast_factors(layer.trained, torch.float64),
            frozen=cast_factors(layer.frozen, torch.float64),
        )
        for layer in (first, second)
    ]
    norms = [layer.plan.scaling * layer.plan.delta_norm(layer.trained, layer.frozen) for layer in wide]
    inner = wide[0].plan.scaling * wide[1].plan.scaling * _inner(*wide)
    product = norms[0] * norms[1]
    # rounding leaves about 1e-8 of the norms in a difference of squares
    squared = norms[0] ** 2 - 2 * inner + norms[1] ** 2
    distance = math.sqrt(squared) if squared > 1e-13 * (norms[0] ** 2 + norms[1] ** 2) else 0.0
    change = distance / norms[0] if norms[0] else (math.inf if distance else 0.0)
    return LayerDiff(first.name, (norms[0], norms[1]), change, inner / product if product else None)


def _inner(first: ReadLayer, second: ReadLayer) -> float:
    updates = [layer.plan.update(layer.trained, layer.frozen) for layer in (first, second)]
    for (one, factors), (other, others) in (updates, updates[::-1]):
        form = one.low_rank(factors)
        if form is not None:
            down, up = form  # <up down, dW> = sum_k up[:, k] . dW down[k]
            return float((other.apply(others, down) * up.T).sum())
    one, other = (structure.delta(factors) for structure, factors in updates)
    return float((one * other).sum())
