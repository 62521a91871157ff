"""Merging: an adapter's update added to the base weight of its layer, and taken away again."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
from peft.tuners.tuners_utils import BaseTunerLayer, check_adapters_to_merge
from torch import Tensor, nn

from ndlora_plugins.errors import NdLoraValueError, NdLoraWarning
from ndlora_plugins.fused import cast_factors

if TYPE_CHECKING:
    from ndlora_plugins.adapter import LayerAdapter

__all__ = ["Merging", "add_and_round", "scaled_delta"]


def add_and_round(weight: Tensor, delta: Tensor) -> Tensor:
    """weight + delta, added in the wider dtype of the two and rounded once to the weight's."""
    return (weight.to(delta.dtype) + delta.to(weight.device)).to(weight.dtype)


def scaled_delta(
    plan: LayerAdapter, trained: Mapping[str, Tensor], frozen: Mapping[str, Tensor], scaling: float
) -> Tensor:
    """scaling * dW, (out_features, in_features), without gradient, at least float32."""
    dtype = torch.promote_types(next(iter(trained.values())).dtype, torch.float32)
    with torch.no_grad():
        return scaling * plan.delta(cast_factors(trained, dtype), cast_factors(frozen, dtype))


class Merging(BaseTunerLayer):
    """The part of an NDLORA layer that merges; for `NdLoraLayer`."""

    ndlora_factors: nn.ModuleDict

    def get_delta_weight(self, adapter: str) -> Tensor:
        """The matrix that the adapter adds to the weight, as the base layer stores it."""
        raise NotImplementedError

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Add the updates to the base weight.

        Args:
            safe_merge: check the new weight for NaN and infinity first, and leave the layer as it is if there is any.
            adapter_names: which adapters, the active ones by default.

        Raises:
            NdLoraValueError: `safe_merge` found a value that is not finite, or the base cannot be requantised.
        """
        adapter_names = [
            name for name in check_adapters_to_merge(self, adapter_names) or [] if name in self.ndlora_factors
        ]
        if not adapter_names:
            return
        self._check_merge_supported()
        weight = self.get_base_weight()
        for name in adapter_names:
            weight = add_and_round(weight, self.get_delta_weight(name))
            if safe_merge and not torch.isfinite(weight).all():
                raise NdLoraValueError(
                    f"NaNs detected in the merged weights. The adapter {name} seems to be broken: a merged weight "
                    f"holds NaN or infinity. The layer's weight is as it was."
                )
        self.set_base_weight(weight)
        self.merged_adapters.extend(adapter_names)

    def unmerge(self) -> None:
        """Subtract every merged update again."""
        if not self.merged:
            warnings.warn("Already unmerged. Nothing to do.", NdLoraWarning, stacklevel=2)
            return
        while self.merged_adapters:
            name = self.merged_adapters[-1]
            if name in self.ndlora_factors:
                self.set_base_weight(add_and_round(self.get_base_weight(), -self.get_delta_weight(name)))
            self.merged_adapters.pop()

    def _check_merge_supported(self) -> None:
        backend = self.quantization_backend
        if backend is None:
            return
        if not backend.supports_merge:
            raise NdLoraValueError(
                f"A base layer quantised with {backend.backend_name} cannot be merged into. Load the base model in "
                f"16 or 32 bit, load the adapter on it, and merge there."
            )
        warnings.warn(
            f"Merging into a {backend.backend_name} layer rounds the update to the quantised grid. For full "
            f"precision load the base model in 16 or 32 bit and merge there.",
            NdLoraWarning,
            stacklevel=3,
        )
