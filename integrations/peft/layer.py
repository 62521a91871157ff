"""The tuner layer: holds the tensors of every adapter on one linear layer and calls the core with them."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer, check_adapters_to_merge
from peft.utils.quantization_utils import QuantizationBackend, resolve_quantization_backend
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from ndlora_plugins.errors import NdLoraValueError, NdLoraWarning

if TYPE_CHECKING:
    from ndlora_plugins.adapter import LayerAdapter

__all__ = [
    "FrozenFactors",
    "NdLoraLayer",
    "NdLoraLinear",
    "base_weight",
    "linear_features",
    "quantization_backend",
    "weight_out_in",
]


def quantization_backend(layer: nn.Module, get_apply_tensor_subclass=None) -> QuantizationBackend | None:
    """PEFT's backend for a quantised layer; None for any other.

    A torchao weight that nobody says how to make again (it was not quantised by transformers) can be trained on,
    not merged into.
    """
    backend = resolve_quantization_backend(
        layer, get_apply_tensor_subclass=get_apply_tensor_subclass or _unknown
    )
    if getattr(backend, "get_apply_tensor_subclass", None) is _unknown:
        backend.supports_merge = False
    return backend


def _unknown():
    """Stands for the function of transformers' quantiser."""


def linear_features(layer: nn.Module) -> tuple[int, int] | None:
    """(in_features, out_features) of a layer that we can adapt, quantised ones too; None for any other."""
    if isinstance(layer, Conv1D):
        shape = getattr(layer.weight, "ds_shape", layer.weight.shape)  # ds_shape: under ZeRO-3
        return shape[0], shape[1]
    if isinstance(layer, nn.Linear):
        return layer.in_features, layer.out_features
    backend = quantization_backend(layer)
    if backend is not None and backend.layer_type == "linear" and hasattr(layer, "in_features"):
        return layer.in_features, layer.out_features
    return None


def weight_out_in(layer: nn.Module, weight: Tensor) -> Tensor:
    """The base weight as (out_features, in_features), a view: transformers' Conv1D stores it transposed."""
    return weight.T if isinstance(layer, Conv1D) else weight


def base_weight(layer: nn.Module, backend: QuantizationBackend | None) -> Tensor:
    """The weight of a base layer, dequantised, as the layer stores it."""
    if backend is None:
        return layer.weight.data
    if getattr(getattr(getattr(layer, "weight", None), "quant_state", None), "packing_format_for_cpu", False):
        # bitsandbytes 4-bit: a forward in eval mode on the CPU has packed the weight in another order, which
        # dequantising does not know of; asking for the state dict brings the usual one back
        layer.state_dict()
    return backend.get_base_weight(layer)


class FrozenFactors(nn.Module):
    """Factors of one adapter that do not train.

    Those recomputed from the base weight are buffers that no state dict holds; the others are saved parameters.
    """

    def __init__(self, factors: Mapping[str, Tensor], recomputed: bool):
        super().__init__()
        for name, value in factors.items():
            if recomputed:
                self.register_buffer(name, value, persistent=False)
            else:
                self.register_parameter(name, nn.Parameter(value, requires_grad=False))

    def tensors(self) -> dict[str, Tensor]:
        """All of them, by name."""
        return {**self._parameters, **self._buffers}


class NdLoraLayer(BaseTunerLayer):
    """Adapters on one layer. `ndlora_factors[adapter][factor]` trains, `ndlora_frozen[adapter]` does not."""

    adapter_layer_names = ("ndlora_factors",)
    other_param_names = ("ndlora_frozen", "ndlora_dropout", "plan", "r", "lora_alpha", "scaling")

    def __init__(self, base_layer: nn.Module, **kwargs: Any) -> None:
        self.base_layer = base_layer
        self.ndlora_factors = nn.ModuleDict({})
        self.ndlora_frozen = nn.ModuleDict({})
        self.ndlora_dropout = nn.ModuleDict({})
        self.plan: dict[str, LayerAdapter] = {}
        self.r: dict[str, int] = {}
        self.lora_alpha: dict[str, float] = {}
        self.scaling: dict[str, float] = {}
        self._disable_adapters = False
        self.merged_adapters = []
        self.cast_input_dtype_enabled = True
        self.quantization_backend = quantization_backend(
            self.get_base_layer(), kwargs.get("get_apply_tensor_subclass")
        )
        self.in_features, self.out_features = linear_features(self.get_base_layer())

    def update_layer(
        self,
        adapter_name: str,
        plan: LayerAdapter,
        *,
        lora_alpha: float,
        lora_dropout: float,
        generator: torch.Generator | None = None,
        inference_mode: bool = False,
    ) -> None:
        """Add an adapter, or replace the one of that name."""
        trained, frozen = plan.initialize(self._read_weight(plan), generator)
        if not self._base_is_floating():  # PEFT moves adapters to the base's dtype only where that is a float
            trained = {name: value.float() for name, value in trained.items()}
            frozen = {name: value.float() for name, value in frozen.items()}
        self.plan[adapter_name] = plan
        self.r[adapter_name] = plan.layout.rank
        self.lora_alpha[adapter_name] = lora_alpha
        self.scaling[adapter_name] = plan.scaling
        self.ndlora_dropout[adapter_name] = nn.Dropout(lora_dropout) if lora_dropout > 0.0 else nn.Identity()
        self.ndlora_factors[adapter_name] = nn.ParameterDict(
            {name: nn.Parameter(value) for name, value in trained.items()}
        )
        if frozen:
            self.ndlora_frozen[adapter_name] = FrozenFactors(frozen, plan.recomputed)
        self._move_adapter_to_device_of_base_layer(adapter_name)
        self.set_adapter(self.active_adapters, inference_mode=inference_mode)

    def get_base_weight(self) -> Tensor:
        """The weight of the base layer, dequantised, as the layer stores it."""
        return base_weight(self.get_base_layer(), self.quantization_backend)

    def _base_is_floating(self) -> bool:
        dtype = self._get_base_layer_device_and_dtype(self.get_base_layer())[1]
        return dtype is not None and dtype.is_floating_point

    def _read_weight(self, plan: LayerAdapter) -> Tensor | None:
        """The base weight (out, in), dequantised, if the initialiser reads it."""
        if not plan.initializer.reads_weight:
            return None
        base = self.get_base_layer()
        weight = getattr(base, "weight", None)
        if weight is not None and hasattr(weight, "ds_id"):  # ZeRO-3 keeps a shard: gather the whole
            import deepspeed

            with deepspeed.zero.GatheredParameters([weight]):
                return weight_out_in(base, weight.data.clone())
        return weight_out_in(base, self.get_base_weight())

    def tensors(self, adapter: str) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """(trained, frozen) of one adapter, of one dtype."""
        trained = dict(self.ndlora_factors[adapter].items())
        if adapter not in self.ndlora_frozen:
            return trained, {}
        holder = self.ndlora_frozen[adapter]
        frozen = holder.tensors()
        reference = next(iter(trained.values()))
        stale = [
            name
            for name, value in frozen.items()
            if value.dtype != reference.dtype or value.device != reference.device
        ]
        if stale and self.plan[adapter].recomputed and not reference.is_meta:
            self._refresh(holder, adapter, reference)
            frozen = holder.tensors()
        elif stale:
            frozen = {name: value.to(reference.device, reference.dtype) for name, value in frozen.items()}
        return trained, frozen

    def _refresh(self, holder: FrozenFactors, adapter: str, reference: Tensor) -> None:
        """Bring recomputed factors to the trained ones' device and dtype, anew if they were made on "meta"."""
        frozen = holder.tensors()
        if any(value.is_meta for value in frozen.values()):
            if self.merged:
                raise NdLoraValueError(
                    f"The start of adapter {adapter!r} is read from the base weight, which is merged with "
                    f"{self.merged_adapters}: unmerge it first."
                )
            frozen = self.plan[adapter].initialize(self._read_weight(self.plan[adapter]))[1]
        for name, value in frozen.items():
            setattr(holder, name, value.detach().to(reference.device, reference.dtype))

    def update(self, adapter: str, x: Tensor) -> Tensor:
        """scaling * dW x of one adapter: (..., in_features) -> (..., out_features)."""
        trained, frozen = self.tensors(adapter)
        if not torch.is_autocast_enabled(x.device.type):  # under autocast the products cast, and to less
            x = self._cast_input_dtype(x, next(iter(trained.values())).dtype)
        y = self.plan[adapter].apply(trained, frozen, self.ndlora_dropout[adapter](x))
        scaling = self.scaling[adapter]
        return y if scaling == 1 else y * scaling

    def get_delta_weight(self, adapter: str) -> Tensor:
        """scaling * dW in the way the base layer stores its weight, at least float32."""
        with torch.no_grad():
            trained, frozen = self.tensors(adapter)
            dtype = torch.promote_types(next(iter(trained.values())).dtype, torch.float32)
            delta = self.plan[adapter].delta(
                {name: value.to(dtype) for name, value in trained.items()},
                {name: value.to(dtype) for name, value in frozen.items()},
            )
            return weight_out_in(self.get_base_layer(), delta * self.scaling[adapter])

    def set_scale(self, adapter: str, scale: float) -> None:
        """Set the scaling of an adapter to `scale` times its planned one."""
        if adapter in self.scaling:
            self.scaling[adapter] = scale * self.plan[adapter].scaling

    def scale_layer(self, scale: float) -> None:
        """Multiply the scaling of every active adapter."""
        for adapter in self.active_adapters:
            if adapter in self.scaling:
                self.scaling[adapter] *= scale

    def unscale_layer(self, scale: float | None = None) -> None:
        """Divide the scaling of every active adapter, or bring back the planned one."""
        for adapter in self.active_adapters:
            if adapter in self.scaling:
                self.scaling[adapter] = (
                    self.plan[adapter].scaling if scale is None else self.scaling[adapter] / scale
                )

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        """Every method here is additive."""
        return True

    def cast_frozen(self, adapter: str) -> None:
        """Bring the recomputed factors to the dtype of the trained ones, once, instead of at every forward."""
        if adapter in self.ndlora_factors:
            self.tensors(adapter)


class NdLoraLinear(nn.Module, NdLoraLayer):
    """Adapters on `nn.Linear`, transformers' `Conv1D`, or a quantised linear layer."""

    def __init__(self, base_layer: nn.Module, adapter_name: str, plan: LayerAdapter, **kwargs: Any) -> None:
        super().__init__()
        quantization = {key: kwargs.pop(key) for key in ("get_apply_tensor_subclass",) if key in kwargs}
        NdLoraLayer.__init__(self, base_layer, **quantization)
        self._active_adapter = adapter_name
        self.update_layer(adapter_name, plan, **kwargs)

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """(..., in_features) -> (..., out_features), in the base layer's dtype.

        Args:
            adapter_names: for each sample the adapter to use instead of the active ones; "__base__" for none.

        Raises:
            NdLoraValueError: `adapter_names` of another length than the batch, or while adapters are merged.
        """
        adapter_names = kwargs.pop("adapter_names", None)
        if adapter_names is not None:
            self._check_adapter_names(x, adapter_names)
        if self.disable_adapters and self.merged:
            self.unmerge()
        result = self.base_layer(x, *args, **kwargs)
        if self.disable_adapters or self.merged:
            return result
        if self.quantization_backend is not None:
            result = self.quantization_backend.maybe_clone_base_result(result)
        dtype = result.dtype
        if adapter_names is not None:
            return self._add_to_samples(result, x, adapter_names)
        for adapter in self.active_adapters:
            if adapter in self.ndlora_factors:
                result = result + self.update(adapter, x)
        return result.to(dtype)

    def _check_adapter_names(self, x: Tensor, adapter_names: list[str]) -> None:
        if len(x) != len(adapter_names):
            raise NdLoraValueError(
                f"Length of `adapter_names` should be the same as the number of inputs, but got "
                f"{len(adapter_names)} and {len(x)} respectively."
            )
        if self.merged:
            raise NdLoraValueError(
                "Cannot pass `adapter_names` when there are merged adapters, please call `unmerge_adapter` first."
            )

    def _add_to_samples(self, result: Tensor, x: Tensor, adapter_names: list[str]) -> Tensor:
        """Add to each sample, along the first axis, the update of its own adapter."""
        for adapter in dict.fromkeys(adapter_names):
            if adapter in self.ndlora_factors:
                samples = [index for index, name in enumerate(adapter_names) if name == adapter]
                samples = torch.tensor(samples, device=x.device)
                update = self.update(adapter, x[samples]).to(result.dtype)
                result = result.index_add(0, samples.to(result.device), update)
        return result

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Add the updates to the base weight.

        Args:
            safe_merge: check the new weight for NaN and infinity first, and change nothing if there is any.
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
        for name in adapter_names:
            self._add_to_base(self.get_delta_weight(name), name if safe_merge else None)
            self.merged_adapters.append(name)

    def unmerge(self) -> None:
        """Subtract every merged update again."""
        if not self.merged:
            warnings.warn("Already unmerged. Nothing to do.", NdLoraWarning, stacklevel=2)
            return
        while self.merged_adapters:
            name = self.merged_adapters[-1]
            if name in self.ndlora_factors:
                self._add_to_base(-self.get_delta_weight(name), None)
            self.merged_adapters.pop()

    def _add_to_base(self, delta: Tensor, check_for: str | None) -> None:
        weight = self.get_base_weight()
        # added in the wider dtype and rounded once
        merged = (weight.to(delta.dtype) + delta.to(weight.device)).to(weight.dtype)
        if check_for is not None and not torch.isfinite(merged).all():
            raise NdLoraValueError(
                f"NaNs detected in the merged weights. The adapter {check_for} seems to be broken: a merged weight "
                f"holds NaN or infinity. The base weight is as it was."
            )
        self.set_base_weight(merged)

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

    def extra_repr(self) -> str:
        return ", ".join(
            f"{name}: {plan.method.name} r={plan.layout.rank} anchor={plan.anchor}"
            for name, plan in self.plan.items()
        )

    def __repr__(self) -> str:
        return "ndlora." + super().__repr__()
