"""The weights that are adapted: of which layers, and how each reads as a matrix (out_features, in_features)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import cast

from peft.utils.quantization_utils import QuantizationBackend, resolve_quantization_backend
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

__all__ = ["WeightForm", "base_weight", "quantization_backend", "weight_form"]


@dataclass(frozen=True)
class WeightForm:
    """A stored weight, read as the matrix that a method updates.

    Attributes:
        kind: "linear", "embedding", "convolution" or "parameter" (a bare tensor, such as the experts' of a layer).
        shape: as the layer stores it.
        transposed: whether it is stored (in_features, out_features).
    """

    kind: str
    shape: tuple[int, ...]
    transposed: bool = False

    @property
    def in_features(self) -> int:
        """The columns of the matrix; a convolution's kernel counts to it."""
        return math.prod(self.shape) // self.out_features

    @property
    def out_features(self) -> int:
        """The rows of the matrix; experts count to it."""
        if self.transposed:
            return self.shape[1]
        return math.prod(self.shape[:-1]) if self.kind == "parameter" else self.shape[0]

    @property
    def matrix_shape(self) -> tuple[int, int]:
        """(out_features, in_features)."""
        return self.out_features, self.in_features

    @property
    def leading(self) -> tuple[int, ...]:
        """Axes that are part of `out_features`: (experts,)."""
        return self.shape[:-2] if self.kind == "parameter" else ()

    @property
    def trailing(self) -> tuple[int, ...]:
        """Axes that are part of `in_features`: the kernel."""
        return self.shape[2:] if self.kind == "convolution" else ()

    def matrix(self, stored: Tensor) -> Tensor:
        """The stored weight as (out_features, in_features): a view where its memory allows one."""
        if self.transposed:
            return stored.T
        return stored.reshape(self.out_features, self.in_features)

    def stored(self, matrix: Tensor) -> Tensor:
        """An update (out_features, in_features) in the form of the stored weight."""
        return matrix.T if self.transposed else matrix.reshape(self.shape)


def weight_form(layer: nn.Module, parameter_name: str | None = None) -> WeightForm | None:
    """The form of a layer's weight, quantised ones too, or of one of its parameters; None if we cannot adapt it.

    A parameter is a matrix (out, in), or a stack of them (experts, out, in).
    """
    if parameter_name is not None:
        shape = _shape(getattr(layer, parameter_name))
        return WeightForm("parameter", shape) if len(shape) in (2, 3) else None
    if isinstance(layer, Conv1D):
        return WeightForm("linear", _shape(layer.weight), transposed=True)
    if isinstance(layer, nn.Linear):
        return WeightForm("linear", (layer.out_features, layer.in_features))
    if isinstance(layer, nn.Embedding):
        shape = (layer.num_embeddings, layer.embedding_dim)
        # quantised ones store bytes in another shape
        return WeightForm("embedding", shape, transposed=True) if _shape(layer.weight) == shape else None
    if isinstance(layer, (nn.Conv1d, nn.Conv2d, nn.Conv3d)):
        return WeightForm("convolution", _shape(layer.weight))
    backend = quantization_backend(layer)
    if backend is not None and backend.layer_type == "linear" and hasattr(layer, "in_features"):
        quantised = cast(nn.Linear, layer)  # as every backend's: the same attributes, another class
        return WeightForm("linear", (quantised.out_features, quantised.in_features))
    return None


def _shape(weight: Tensor) -> tuple[int, ...]:
    return tuple(getattr(weight, "ds_shape", weight.shape))  # ds_shape: under ZeRO-3


def quantization_backend(layer: nn.Module, get_apply_tensor_subclass=None) -> QuantizationBackend | None:
    """PEFT's backend for a quantised layer; None for any other.

    A torchao weight that nobody says how to make again (it was not quantised by transformers) can be trained on,
    not merged into.
    """
    backend = resolve_quantization_backend(
        layer, get_apply_tensor_subclass=get_apply_tensor_subclass or _unknown
    )
    if backend is not None and getattr(backend, "get_apply_tensor_subclass", None) is _unknown:
        backend.supports_merge = False
    return backend


def _unknown():
    """Stands for the function of transformers' quantiser."""


def base_weight(layer: nn.Module, backend: QuantizationBackend | None) -> Tensor:
    """The weight of a base layer, dequantised, as the layer stores it."""
    if backend is None:
        assert isinstance(layer.weight, Tensor), f"{type(layer).__name__} has a form, so it has a weight"
        return layer.weight.data
    if getattr(getattr(getattr(layer, "weight", None), "quant_state", None), "packing_format_for_cpu", False):
        # bitsandbytes 4-bit: a forward in eval mode on the CPU has packed the weight in another order, which
        # dequantising does not know of; asking for the state dict brings the usual one back
        layer.state_dict()
    return backend.get_base_weight(layer)
