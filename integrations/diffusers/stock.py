"""Adapters of several components as one file of plain LoRA, as diffusers' `load_lora_weights` reads it."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from peft import PeftConfig
from safetensors.torch import load_file

from ndlora_plugins.errors import NdLoraValueError

from ..peft.exports.export import ExportReport, export_adapter
from ..peft.files.directories import new_directory
from ..peft.files.format import KEY_PREFIX
from ..peft.files.tensors import ADAPTER_FILE, save_tensors

__all__ = ["LORA_FILE", "export_lora"]

# as diffusers' `save_lora_weights` names them
LORA_FILE, _METADATA_KEY = "pytorch_lora_weights.safetensors", "lora_adapter_metadata"


def export_lora(
    adapters: Mapping[str, str | Path], output: str | Path, **options: Any
) -> dict[str, ExportReport]:
    """Write NDLORA adapters as the LoRA file of a pipeline: `pipe.load_lora_weights(output)` needs no ndlora_plugins.

    Args:
        adapters: component, as the pipeline names it ("unet", "transformer", "text_encoder"), to the adapter's
            directory.
        output: a directory that does not exist yet, or an empty one; it appears when it is whole.
        options: of `export_adapter`: `rank`, `energy` or `max_error`, `dtype`. `base` is a mapping like `adapters`.

    Returns:
        For each component how exact its layers are.

    Raises:
        NdLoraValueError: it cannot be done.
        OSError: a file cannot be read or written. Nothing is left behind in either case.
    """
    if not adapters:
        raise NdLoraValueError("export_lora was given no adapter: {'unet': 'my-adapter'}, say.")
    bases = options.pop("base", None) or {}
    tensors, metadata, reports = {}, {}, {}
    with new_directory(output) as files, tempfile.TemporaryDirectory() as scratch:
        for component, adapter in adapters.items():
            directory = Path(scratch, component)
            reports[component] = export_adapter(
                adapter, directory, "lora", base=bases.get(component), **options
            )
            config = PeftConfig.from_pretrained(str(directory)).to_dict()
            tensors |= {
                f"{component}.{key.removeprefix(KEY_PREFIX)}": value
                for key, value in load_file(directory / ADAPTER_FILE).items()
            }
            metadata |= {f"{component}.{key}": _plain(value) for key, value in config.items()}
        text = json.dumps(metadata, indent=2, sort_keys=True)
        save_tensors(tensors, files / LORA_FILE, {"format": "pt", _METADATA_KEY: text})
    return reports


def _plain(value: Any) -> Any:
    return sorted(value) if isinstance(value, set) else value
