"""A LoRA as llama.cpp reads it: one GGUF file.

Source: llama.cpp's convert_lora_to_gguf.py (names, metadata) and convert_hf_to_gguf.py (which rows it permutes).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor
from transformers import PretrainedConfig

from ndlora_plugins.errors import MissingExtraError, NdLoraValueError

from ..files.base import BaseFiles
from ..files.format import KEY_PREFIX
from .stock import StockAdapter

__all__ = ["ARCHITECTURES", "GGUF_FILE", "write_gguf"]

GGUF_FILE = "adapter_model.gguf"


class Architecture(NamedTuple):
    """The names by which llama.cpp knows a `model_type` of transformers.

    Attributes:
        name: its `general.architecture`, as a member of `gguf.MODEL_ARCH` in lower case.
        permuted: last names of layers whose rows llama.cpp keeps head by head in another order.
    """

    name: str
    permuted: tuple[str, ...] = ()


_ROTATED = ("q_proj", "k_proj")
# model_type -> architecture; each converter was read for what it does to the weights
ARCHITECTURES = {
    "llama": Architecture("llama", _ROTATED),
    "mistral": Architecture("llama", _ROTATED),
    "smollm3": Architecture("smollm3", _ROTATED),
    "granite": Architecture("granite", _ROTATED),
    "qwen2": Architecture("qwen2"),
    "qwen3": Architecture("qwen3"),
    "gemma": Architecture("gemma"),
    "gemma2": Architecture("gemma2"),
    "gemma3_text": Architecture("gemma3"),
    "phi3": Architecture("phi3"),
}


def write_gguf(stock: StockAdapter, base: BaseFiles, path: Path) -> None:
    """Write a LoRA as a GGUF adapter. Scalings are folded in: one alpha, which is the largest rank.

    Args:
        stock: of linear layers only; float16 stays, other dtypes become float32.
        base: its configuration tells the architecture and the heads.

    Raises:
        MissingExtraError: the package gguf is not installed.
        NdLoraValueError: an architecture or a layer that llama.cpp's table does not know, or the adapter holds more
            than LoRA's matrices. Before anything is written.
    """
    try:
        import gguf
    except ImportError as error:
        raise MissingExtraError(
            'to="gguf" writes with the package gguf, which is not installed: pip install "ndlora-plugins[gguf]"'
        ) from error
    config = cast(Any, base.model).config.get_text_config()
    architecture = ARCHITECTURES.get(config.model_type)
    if architecture is None:
        raise NdLoraValueError(
            f"model_type={config.model_type!r} of {base.directory} is not in the table of architectures for llama.cpp: "
            f"{', '.join(ARCHITECTURES)}. Export to='lora' and convert it with llama.cpp's "
            f"convert_lora_to_gguf.py, or export to='merged'."
        )
    kind = next(key for key, value in gguf.MODEL_ARCH_NAMES.items() if value == architecture.name)
    names = gguf.get_tensor_name_map(kind, config.num_hidden_layers)
    written: dict[str, Tensor] = {}
    for key, value in stock.tensors.items():
        layer, _, matrix = key.removeprefix(KEY_PREFIX).removesuffix(".weight").rpartition(".")
        if matrix not in ("lora_A", "lora_B") or value.dim() != 2:
            raise NdLoraValueError(
                f"The adapter holds {key!r}, and a GGUF adapter holds two matrices for a linear layer only. Export "
                f"to='merged' and convert the model."
            )
        full = base.full_name(layer)
        name = None if len(base.same_tensor(f"{full}.weight")) > 1 else names.get_name(full)
        if name is None:
            raise NdLoraValueError(
                f"Layer {layer!r} has no name of its own in llama.cpp's {architecture.name}: export to='merged' and "
                f"convert the model."
            )
        if matrix == "lora_B" and layer.rpartition(".")[2] in architecture.permuted:
            value = _permuted(value, config, layer)
        written[f"{name}.weight.{matrix.replace('_A', '_a').replace('_B', '_b')}"] = value
    largest = max(len(value) for name, value in written.items() if name.endswith("_a"))
    writer = gguf.GGUFWriter(path, architecture.name)
    writer.add_type(gguf.GGUFType.ADAPTER)
    writer.add_string(gguf.Keys.Adapter.TYPE, "lora")
    writer.add_float32(gguf.Keys.Adapter.LORA_ALPHA, float(largest))
    for name, value in written.items():
        if name.endswith("_b"):  # llama.cpp multiplies by alpha / rank of each layer; here every scaling is 1
            value = value * (value.shape[1] / largest)
        value = value if value.dtype == torch.float16 else value.float()
        writer.add_tensor(name, value.contiguous().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _permuted(up: Tensor, config: PretrainedConfig, layer: str) -> Tensor:
    """Rows of a rotated projection in llama.cpp's order: a head's two halves interleaved."""
    queries = config.num_attention_heads
    heads = queries if layer.endswith("q_proj") else getattr(config, "num_key_value_heads", None) or queries
    return up.reshape(heads, 2, len(up) // heads // 2, -1).transpose(1, 2).reshape(up.shape)
