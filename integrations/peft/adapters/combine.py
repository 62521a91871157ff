"""Adapter directories combined into one, by the function that `add_weighted_adapter` has."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from ndlora_plugins.errors import NdLoraValueError

from ..combining.combination import (
    Combination,
    Part,
    Sum,
    check_configs,
    combine_configs,
    combine_parts,
)
from ..configuration.config import NdLoraConfig
from ..files.adapter import AdapterReader
from ..files.base import BaseFiles
from ..files.directories import check_new, new_directory
from ..files.format import KEY_PREFIX, TOKEN_ROWS
from ..files.problems import check_sound
from ..files.write import NewLayer, write_adapter
from ..layers.weights import WeightForm
from ..tuner.fingerprint import other_weights
from ..tuner.targets import largest, plan_form

__all__ = ["CombineReport", "combine_adapters"]


@dataclass(frozen=True)
class CombineReport:
    """The adapter that `combine_adapters` wrote.

    Attributes:
        layers: layer's name -> the rank of the combined update.
        numbers: in the file, without what is trained beside the layers.
    """

    directory: Path
    method: str
    layers: Mapping[str, int]
    numbers: int


def combine_adapters(
    adapters: Sequence[str | Path],
    output: str | Path,
    weights: Sequence[float] | None = None,
    combination: Combination | None = None,
    *,
    base: str | None = None,
    trust_remote_code: bool = False,
) -> CombineReport:
    """Write an adapter whose update is the weighted sum of those of others: sum_i weights[i] scaling_i dW_i.

    The base model is read only where a start is made again from its weights, or rows of tokens are trained.

    Args:
        adapters: directories, or names on the hub.
        output: a directory that does not exist yet, or an empty one; it appears when it is whole.
        weights: one for each adapter; 1 for all by default.
        combination: how; the exact sum by default.
        base: directory or hub name of the base model, if not where the adapters' configurations say.

    Raises:
        NdLoraValueError: they cannot be combined. Nothing is written then.
        OSError: a file cannot be read or written.
    """
    names = [str(adapter) for adapter in adapters]
    weights = [1.0] * len(names) if weights is None else list(weights)
    if not names or len(weights) != len(names):
        raise NdLoraValueError(
            f"{len(names)} adapters and {len(weights)} weights: give one weight for each adapter."
        )
    if not all(math.isfinite(weight) for weight in weights):
        raise NdLoraValueError(f"weights={weights}: each must be a finite number.")
    check_new(output)
    readers = [AdapterReader(name) for name in names]
    configs = [reader.config for reader in readers]
    check_configs(names, configs)
    bases = [_open_base(reader, base, trust_remote_code) for reader in readers]
    for reader, files in zip(readers, bases, strict=True):
        check_sound(reader, files)
    _check_one_base(names, readers)
    forms: dict[str, WeightForm] = {}
    parts: dict[str, list[Part]] = {}
    for name, reader, files, weight in zip(names, readers, bases, weights, strict=True):
        for path in reader.shapes:
            layer = reader.read(path, files)
            form = reader.form(path) or reader.known_form(path, files)
            if forms.setdefault(layer.name, form).matrix_shape != form.matrix_shape:
                raise NdLoraValueError(
                    f"Layer {layer.name!r} is {list(form.matrix_shape)} (out x in) in {name} and "
                    f"{list(forms[layer.name].matrix_shape)} in another: they are of different base models."
                )
            part = Part(name, layer.plan, layer.trained, layer.frozen, layer.plan.scaling, weight)
            parts.setdefault(layer.name, []).append(part)
    combination = combination or Combination()
    sums = {name: combine_parts(name, found, combination) for name, found in parts.items()}
    config = combine_configs(names, configs, sums)
    config = replace(config, base_fingerprint=_fingerprint(configs, sums))
    layers = _new_layers(config, sums, forms, parts)
    others = _others(names, readers, bases, weights, config)
    with new_directory(output) as directory:
        numbers = write_adapter(directory, config, layers, others)
    return CombineReport(
        Path(output),
        config.resolved().method.name,
        {name: found.rank for name, found in sums.items()},
        numbers,
    )


def _open_base(reader: AdapterReader, base: str | None, trust_remote_code: bool) -> BaseFiles | None:
    rows = any(key.endswith(TOKEN_ROWS) for key in reader.others)
    if base is None and not rows and not reader.reads_base:
        return None
    return reader.open_base(base, trust_remote_code)


def _check_one_base(names: Sequence[str], readers: Sequence[AdapterReader]) -> None:
    for k, name in enumerate(names):
        for other, reader in zip(names[:k], readers, strict=False):
            layer = other_weights(reader.config.base_fingerprint, readers[k].config.base_fingerprint)
            if layer is not None:
                raise NdLoraValueError(
                    f"{name} and {other} were trained on different base models: the weights of layer {layer!r} differ. "
                    f"Adapters of one base model can be combined."
                )


def _fingerprint(configs: Sequence[NdLoraConfig], sums: Mapping[str, Sum]) -> dict | None:
    found = {}
    for config in configs:
        found |= {name: entry for name, entry in (config.base_fingerprint or {}).items() if name in sums}
    return found or None


def _new_layers(
    config: NdLoraConfig,
    sums: Mapping[str, Sum],
    forms: Mapping[str, WeightForm],
    parts: Mapping[str, Sequence[Part]],
) -> list[NewLayer]:
    resolved, widest = config.resolved(), largest(forms.values())
    layers = []
    for name, found in sums.items():
        plan = plan_form(config.options_for(name, resolved), name, forms[name], widest)
        dtype = next(iter(parts[name][0].trained.values())).dtype
        factors = {factor: value.to(dtype) for factor, value in found.factors.items()}
        layers.append(NewLayer(name, name, forms[name], plan, factors, {}))
    return layers


def _others(
    names: Sequence[str],
    readers: Sequence[AdapterReader],
    bases: Sequence[BaseFiles | None],
    weights: Sequence[float],
    config: NdLoraConfig,
) -> dict[str, Tensor]:
    """What is trained in full is carried; rows of tokens are added up as differences from the base's."""
    carried: dict[str, Tensor] = {}
    owner: dict[str, str] = {}
    changes: dict[str, dict[int, Tensor]] = {}
    embeddings: dict[str, Tensor] = {}
    for name, reader, files, weight in zip(names, readers, bases, weights, strict=True):
        for key, value in reader.other_tensors().items():
            if not key.endswith(TOKEN_ROWS):
                if key in owner:
                    raise NdLoraValueError(
                        f"{name} and {owner[key]} both hold {key!r}, which is trained in full: two such tensors cannot "
                        f"be combined."
                    )
                owner[key], carried[key] = name, value
                continue
            module = key.removeprefix(KEY_PREFIX).removesuffix(TOKEN_ROWS)
            if files is not None and key not in embeddings:  # it is not None: there are rows
                embeddings[key] = files.weight(module).T  # (tokens, features)
            rows = changes.setdefault(key, {})
            for index, row in zip(reader.token_indices(key), value, strict=True):
                original = embeddings[key][index].to(row.dtype)
                rows[index] = rows.get(index, original) + weight * (row - original)
    for key, rows in changes.items():
        carried[key] = torch.stack([rows[index] for index in sorted(rows)])
    return carried
