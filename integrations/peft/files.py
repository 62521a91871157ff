"""Checks of an adapter's directory before anything is loaded from it."""

from __future__ import annotations

import os

from safetensors import SafetensorError, safe_open

from ndlora_plugins.errors import NdLoraValueError
from ndlora_plugins.integrations.peft.registration import PREFIX

__all__ = ["ADAPTER_FILE", "check_adapter_file"]

ADAPTER_FILE = "adapter_model.safetensors"


def check_adapter_file(directory: str) -> None:
    """Raise unless `directory` holds a whole safetensors file with at least one tensor of ours, none of them empty.

    Only the file's header is read.

    Raises:
        NdLoraValueError: says what is wrong with which file.
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
    try:
        with safe_open(path, framework="pt") as file:
            shapes = {key: file.get_slice(key).get_shape() for key in file.keys()}
    except (SafetensorError, OSError) as error:
        raise NdLoraValueError(
            f"{path} ({os.path.getsize(path)} bytes) is truncated or no safetensors file ({error}). Copy or save "
            f"the adapter again."
        ) from error
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
