"""The JSON of adapters and of base models, held to its form before anything is made of it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from ndlora_plugins.errors import NdLoraValueError
from ndlora_plugins.methods.modes import MAX_FEATURES

from ..configuration.validation import shorten

__all__ = ["check_fingerprint", "check_layers", "check_weight_forms", "read_object", "read_shards"]

_LARGEST = torch.finfo(torch.float32).max
# kind of a weight -> how many axes it can have
_OTHER_AXES = {"embedding": (2,), "convolution": (3, 4, 5), "parameter": (2, 3)}
_AXES = {"linear": (2,), **_OTHER_AXES}


def read_object(path: Path) -> dict:
    """The JSON object in a file.

    Raises:
        NdLoraValueError: it holds no JSON, or something else than an object.
    """
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:  # not UTF-8 is a ValueError too
        raise NdLoraValueError(
            f"{path} is truncated or no JSON file ({shorten(str(error))}). Copy or save it again."
        ) from error
    if not isinstance(found, dict):
        raise NdLoraValueError(f"{path} must hold a JSON object, but holds {shorten(found)}.")
    return found


def read_shards(index: Path) -> dict[str, str]:
    """The weight map of a base model's index: tensor name -> name of a file inside the index's directory.

    The file may be a link, as in the hub's cache; the directories on the way to it may not.

    Raises:
        NdLoraValueError: it has no weight map, or names a file that is not there or lies outside.
    """
    shards = read_object(index).get("weight_map")
    if not isinstance(shards, dict) or not shards:
        raise NdLoraValueError(f"{index} has no weight_map: it must say in which file each tensor is.")
    for name in dict.fromkeys(map(_file_name, shards.values())):
        if not _is_inside(index.parent, name):
            raise NdLoraValueError(
                f"{index} names the file {shorten(name)}: it must be a .safetensors file in {index.parent}, or in a "
                f"directory inside it that is no link. Nothing was written. Take the model from its source again."
            )
        if not (index.parent / name).exists():
            raise NdLoraValueError(f"{index} names the file {name!r}, which is not there: copy it there too.")
    return shards


def _file_name(value: object) -> str:
    return value if isinstance(value, str) else repr(value)


def _is_inside(directory: Path, name: str) -> bool:
    path = Path(name)
    return (
        name.isprintable()
        and path.suffix == ".safetensors"
        and not path.is_absolute()
        and ".." not in path.parts
        and (directory / path).parent.resolve() == directory.resolve() / path.parent
    )


def check_fingerprint(saved: dict) -> None:
    """Raise unless `saved` has the form that `make_fingerprint` gives it: a broken one may equal any base model.

    Raises:
        NdLoraValueError: names the entry.
    """
    for name, entry in _entries(saved, "base_fingerprint"):
        values = entry.get("values", ())
        if not (
            _is_shape(entry.get("shape"), (2,))
            and isinstance(entry.get("storage"), str)
            and (values is None or isinstance(values, list) and values and all(map(_is_float32, values)))
        ):
            raise NdLoraValueError(
                f"base_fingerprint of the adapter's configuration is broken: the entry of layer {shorten(name)} must "
                f"have a shape of two sizes, a storage and finite values, but is {shorten(entry)}. Save the adapter "
                f"again."
            )


def check_weight_forms(saved: dict) -> None:
    """Raise unless `saved` has the form in which `NdLoraConfig` saves the layers that are not linear.

    Raises:
        NdLoraValueError: names the entry.
    """
    for path, entry in _entries(saved, "weight_forms"):
        kind = entry.get("kind")
        if not (
            isinstance(entry.get("name"), str)
            and isinstance(kind, str)
            and _is_shape(entry.get("shape"), _OTHER_AXES.get(kind, ()))
        ):
            raise NdLoraValueError(
                f"weight_forms of the adapter's configuration is broken: the entry of {shorten(path)} must have a "
                f"name, a kind out of {list(_OTHER_AXES)} and a shape that fits it, but is {shorten(entry)}. Save the "
                f"adapter again."
            )


def check_layers(saved: dict) -> None:
    """Raise unless `saved` has the form in which `NdLoraConfig` saves its layers: see `format`.

    Raises:
        NdLoraValueError: names the entry.
    """
    for path, entry in saved.items():
        if not (
            isinstance(entry, (list, tuple))
            and len(entry) == 3
            and isinstance(entry[0], str)
            and isinstance(entry[1], str)
            and _is_shape(entry[2], _AXES.get(entry[1], ()))
        ):
            raise NdLoraValueError(
                f"layers of the adapter's configuration is broken: the entry of {shorten(path)} must be a name, a kind "
                f"out of {list(_AXES)} and a shape that fits it, but is {shorten(entry)}. Save the adapter again."
            )


def _entries(saved: object, field: str) -> list[tuple[str, dict]]:
    if not isinstance(saved, dict) or not all(isinstance(entry, dict) for entry in saved.values()):
        raise NdLoraValueError(
            f"{field} of the adapter's configuration must say something of each layer by its name, but is "
            f"{shorten(saved)}. Save the adapter again."
        )
    return list(saved.items())


def _is_shape(value: object, axes: tuple[int, ...]) -> bool:
    """Whether `value` is a list of sizes that a layer can have, one for each axis."""
    return (
        isinstance(value, list)
        and len(value) in axes
        and all(type(size) is int and 1 <= size <= MAX_FEATURES for size in value)
    )


def _is_float32(value: Any) -> bool:
    return type(value) in (int, float) and abs(value) <= _LARGEST  # NaN is not
