"""Safetensors files, opened and written; checks of an adapter's directory before anything is loaded from it."""

from __future__ import annotations

import os
import re

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from ndlora_plugins.errors import NdLoraValueError

from ..names import PREFIX

__all__ = ["ADAPTER_FILE", "check_adapter_file", "open_tensors", "save_tensors"]

ADAPTER_FILE = "adapter_model.safetensors"


def check_adapter_file(directory: str) -> None:
    """Raise unless `directory` holds a whole safetensors file with at least one tensor of ours, none of them empty.

    Only the file's header is read.

    Raises:
        NdLoraValueError: says what is wrong with which file.
        OSError: it may not be read.
    """
    path = os.path.join(directory, ADAPTER_FILE)
    if not os.path.isfile(path):
        pickled = os.path.join(directory, "adapter_model.bin")
        if os.path.isfile(pickled):
            raise NdLoraValueError(
                f"{pickled} is a pickle file, which can run code when it is loaded: NDLORA adapters are read from "
                f"{ADAPTER_FILE} only. Save the adapter again with safe_serialization=True."
            )
        raise NdLoraValueError(
            f"{directory} has an adapter_config.json but no {ADAPTER_FILE}: copy it there too."
        )
    with open_tensors(path) as file:
        shapes = {key: file.get_slice(key).get_shape() for key in file.keys()}
    ours = [key for key in shapes if PREFIX in key]
    if not ours:
        raise NdLoraValueError(
            f"{path} holds {len(shapes)} tensors but none of an NDLORA adapter (no name contains {PREFIX!r}). Save "
            f"the adapter again; under ZeRO-3 or FSDP gather the parameters first."
        )
    empty = [key for key in ours if 0 in shapes[key]]
    if empty:
        raise NdLoraValueError(
            f"{path}: {len(empty)} of {len(ours)} tensors are empty, the first is {empty[0]!r} with shape "
            f"{list(shapes[empty[0]])}. Save the adapter again; under ZeRO-3 or FSDP gather the parameters first."
        )


def open_tensors(path: str | os.PathLike) -> safe_open:
    """Open a safetensors file to read PyTorch tensors from it: `with open_tensors(path) as file: ...`.

    Raises:
        NdLoraValueError: it is truncated, or no safetensors file.
        OSError: it is not there, or may not be read; the error names it.
    """
    with open(path, "rb"):  # safe_open calls a file that may not be read one that is not there
        pass
    try:
        return safe_open(path, framework="pt")
    except SafetensorError as error:
        raise NdLoraValueError(
            f"{path} ({os.path.getsize(path)} bytes) is truncated or no safetensors file ({error}). Copy or save "
            f"it again."
        ) from error


def save_tensors(
    tensors: dict[str, Tensor], path: str | os.PathLike, metadata: dict[str, str] | None = None
) -> None:
    """Write a safetensors file.

    Raises:
        OSError: it cannot be written: the disk is full, say. The error names the file.
    """
    try:
        save_file(tensors, path, metadata=metadata or {"format": "pt"})
    except SafetensorError as error:  # the operating system's errors come as text
        number = re.search(r"os error (\d+)", str(error))
        if number is None:
            raise
        raise OSError(int(number[1]), os.strerror(int(number[1])), str(path)) from error
