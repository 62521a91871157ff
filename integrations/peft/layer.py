"""The tuner layers: each holds the tensors of every adapter on one layer and calls the core with them."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from peft.tuners.tuners_utils import BaseTunerLayer, check_adapters_to_merge
from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook

from ndlora_plugins.errors import NdLoraValueError, NdLoraWarning
from ndlora_plugins.integrations.peft.weights import base_weight, quantization_backend, weight_form

if TYPE_CHECKING:
    from ndlora_plugins.adapter import LayerAdapter

__all__ = [
    "LAYER_KINDS",
    "FrozenFactors",
    "NdLoraConvolution",
    "NdLoraEmbedding",
    "NdLoraLayer",
    "NdLoraLinear",
    "ParamWrapper",
]


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


class NdLoraLayer(nn.Module, BaseTunerLayer):
    """Adapters on one layer. `ndlora_factors[adapter][factor]` trains, `ndlora_frozen[adapter]` does not.

    Args:
        base_layer: the layer, or another adapter's of PEFT around it.
        adapter_name, plan: as `update_layer` takes them, with its keywords.
        parameter_name: the bare parameter that is adapted, instead of the layer's weight.
        get_apply_tensor_subclass: as PEFT's `get_quantization_kwargs` gives it.
    """

    # what models read of a layer of this kind
    shown_of_base: tuple[str, ...] = ()
    adapter_layer_names = ("ndlora_factors",)
    other_param_names = ("ndlora_frozen", "ndlora_dropout", "plan", "r", "lora_alpha", "scaling")

    def __init__(
        self,
        base_layer: nn.Module,
        adapter_name: str,
        plan: LayerAdapter,
        *,
        parameter_name: str | None = None,
        get_apply_tensor_subclass=None,
        **kwargs: Any,
    ) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.parameter_name = parameter_name
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
        self.quantization_backend = quantization_backend(self.get_base_layer(), get_apply_tensor_subclass)
        self.form = weight_form(self.get_base_layer(), parameter_name)
        self.in_features, self.out_features = self.form.in_features, self.form.out_features
        for name in self.shown_of_base:
            setattr(self, name, getattr(self.get_base_layer(), name))
        self._active_adapter = adapter_name
        self.update_layer(adapter_name, plan, **kwargs)

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
        weight = getattr(self.get_base_layer(), self.parameter_name or "weight", None)
        if weight is not None and hasattr(weight, "ds_id"):  # ZeRO-3 keeps a shard: gather the whole
            import deepspeed

            with deepspeed.zero.GatheredParameters([weight]):
                return self.form.matrix(weight.data.clone())
        return self.form.matrix(self.get_base_weight())

    def tensors(self, adapter: str) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """(trained, frozen) of one adapter, of one dtype."""
        # `_modules` and `_parameters`: attributes of a module and ParameterDict.items() cost microseconds
        trained = self._modules["ndlora_factors"]._modules[adapter]._parameters
        holder = self._modules["ndlora_frozen"]._modules.get(adapter)
        if holder is None:
            return trained, {}
        frozen = holder.tensors()
        reference = next(iter(trained.values()))
        dtype, device = reference.dtype, reference.device
        if all(value.dtype == dtype and value.device == device for value in frozen.values()):
            return trained, frozen
        if self.plan[adapter].recomputed and not reference.is_meta:
            self._refresh(holder, adapter, reference)
            return trained, holder.tensors()
        return trained, {name: value.to(device, dtype) for name, value in frozen.items()}

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
        """What one adapter adds to the layer's output for the input x."""
        raise NotImplementedError

    def get_delta_weight(self, adapter: str) -> Tensor:
        """scaling * dW in the way the base layer stores its weight, at least float32."""
        with torch.no_grad():
            trained, frozen = self.tensors(adapter)
            dtype = torch.promote_types(next(iter(trained.values())).dtype, torch.float32)
            delta = self.plan[adapter].delta(_cast(trained, dtype), _cast(frozen, dtype))
            return self.form.stored(delta * self.scaling[adapter])

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
        """Every method here is additive; PEFT converts linear layers."""
        return self.form.kind == "linear"

    def cast_frozen(self, adapter: str) -> None:
        """Bring the recomputed factors to the dtype of the trained ones, once, instead of at every forward."""
        if adapter in self.ndlora_factors:
            self.tensors(adapter)

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """What the base layer gives for x plus the updates, in the base layer's dtype.

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
                result = self._add_update(result, adapter, x)
        return result.to(dtype)

    def _add_update(self, result: Tensor, adapter: str, x: Tensor) -> Tensor:
        return result + self.update(adapter, x)

    def _tensors_for(self, adapter: str, x: Tensor) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """`tensors`, in the dtype of x while PEFT's `disable_input_dtype_casting` keeps x as it is."""
        trained, frozen = self.tensors(adapter)
        if self.cast_input_dtype_enabled:
            return trained, frozen
        return _cast(trained, x.dtype), _cast(frozen, x.dtype)

    def _cast_to_factors(self, x: Tensor, trained: Mapping[str, Tensor]) -> Tensor:
        if torch.is_autocast_enabled(x.device.type):  # the products cast, and to less
            return x
        return x.to(next(iter(trained.values())).dtype)

    def _scaled(self, adapter: str, y: Tensor) -> Tensor:
        scaling = self.scaling[adapter]
        return y if scaling == 1 else y * scaling

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


def _cast(tensors: Mapping[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    return {name: value.to(dtype) for name, value in tensors.items()}


class NdLoraLinear(NdLoraLayer):
    """Adapters on `nn.Linear`, transformers' `Conv1D`, or a quantised linear layer."""

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """As `NdLoraLayer.forward`; a plain `nn.Linear` and its first adapter go through one function."""
        base, factors = self._modules["base_layer"], self._modules["ndlora_factors"]._modules
        if args or kwargs or self.merged_adapters or self._disable_adapters or not _is_plain_linear(base):
            return super().forward(x, *args, **kwargs)
        active = [name for name in self.active_adapters if name in factors]
        if not active or (self.training and not isinstance(self.ndlora_dropout[active[0]], nn.Identity)):
            return super().forward(x)
        # `_parameters`: see `tensors`
        weight, bias = base._parameters["weight"], base._parameters["bias"]
        first = active[0]
        result = self.plan[first].linear(weight, bias, *self._tensors_for(first, x), x, self.scaling[first])
        for adapter in active[1:]:
            result = self._add_update(result, adapter, x)
        return result

    def _add_update(self, result: Tensor, adapter: str, x: Tensor) -> Tensor:
        # the output of a plain linear layer is fresh, and its backward does not need it
        return self.plan[adapter].add_update(
            result,
            *self._tensors_for(adapter, x),
            self.ndlora_dropout[adapter](x),
            self.scaling[adapter],
            in_place=_is_plain_linear(self.base_layer),
        )

    def update(self, adapter: str, x: Tensor) -> Tensor:
        """scaling * dW x: (..., in_features) -> (..., out_features)."""
        trained, frozen = self._tensors_for(adapter, x)
        x = self._cast_to_factors(x, trained)
        y = self.plan[adapter].apply(trained, frozen, self.ndlora_dropout[adapter](x))
        return self._scaled(adapter, y)


def _is_plain_linear(layer: nn.Module) -> bool:
    """Whether calling the layer is F.linear and nothing else: no subclass, no hook, no other forward or weight."""
    return type(layer) is nn.Linear and not (
        layer._parameters.get("weight") is None
        or layer._forward_pre_hooks
        or layer._forward_hooks
        or layer._backward_pre_hooks
        or layer._backward_hooks
        or "forward" in layer.__dict__
        or _has_any_global_hook()
    )


class NdLoraEmbedding(NdLoraLayer):
    """Adapters on `nn.Embedding`, whose weight is (num_embeddings, embedding_dim): in and out features."""

    shown_of_base = ("num_embeddings", "embedding_dim", "padding_idx")

    def update(self, adapter: str, x: Tensor) -> Tensor:
        """scaling * the columns of dW for the indices x: (...) -> (..., embedding_dim)."""
        y = self.plan[adapter].lookup(*self.tensors(adapter), x)
        scale = self._get_embed_scale()  # of models that scale their embeddings
        y = y if scale is None else y * scale.to(y.dtype)
        return self._scaled(adapter, y)


class NdLoraConvolution(NdLoraLayer):
    """Adapters on `nn.Conv1d`, `nn.Conv2d` or `nn.Conv3d`, with groups too."""

    shown_of_base = ("in_channels", "out_channels", "kernel_size", "stride", "padding", "dilation", "groups")

    def update(self, adapter: str, x: Tensor) -> Tensor:
        """scaling * the convolution with dW: ([batch,] in_channels, *size) -> ([batch,] out_channels, *size)."""
        trained, frozen = self._tensors_for(adapter, x)
        x = self._cast_to_factors(x, trained)
        single = x.dim() == len(self.form.trailing) + 1
        x = self.ndlora_dropout[adapter](x.unsqueeze(0) if single else x)
        y = self.plan[adapter].convolve(trained, frozen, x, self._convolution)
        return self._scaled(adapter, y.squeeze(0) if single else y)

    def _convolution(self, x: Tensor, weight: Tensor) -> Tensor:
        """As the base layer convolves, in as many groups as the shapes tell."""
        base = self.get_base_layer()
        convolve = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}[len(base.kernel_size)]
        padding = base.padding
        if base.padding_mode != "zeros":
            x, padding = F.pad(x, base._reversed_padding_repeated_twice, mode=base.padding_mode), 0
        return convolve(x, weight, None, base.stride, padding, base.dilation, x.shape[1] // weight.shape[1])


class ParamWrapper(NdLoraLayer):
    """Adapters on one parameter of a module, such as the experts' (experts, out, in).

    The module's own forward is called with W + dW in its place; dW is formed for it. PEFT nests wrappers where
    several parameters of one module are adapted, and knows them by the name of this class.
    """

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The module's forward, on the updated parameter."""
        if kwargs.pop("adapter_names", None) is not None:
            raise NdLoraValueError(
                f"Cannot pass `adapter_names`: target_parameters={self.parameter_name!r} is adapted, and a parameter "
                f"is one for the whole batch."
            )
        if self.disable_adapters and self.merged:
            self.unmerge()
        adapters = [adapter for adapter in self.active_adapters if adapter in self.ndlora_factors]
        if self.disable_adapters or self.merged or not adapters:
            return self.base_layer(*args, **kwargs)
        name, weight = self._parameter()
        for adapter in adapters:
            trained, frozen = (_cast(group, weight.dtype) for group in self.tensors(adapter))
            delta = self.form.stored(self.plan[adapter].delta(trained, frozen))
            weight = torch.add(weight, delta, alpha=self.scaling[adapter])
        return torch.func.functional_call(self.base_layer, {name: weight}, args, kwargs)

    def _parameter(self) -> tuple[str, Tensor]:
        """Its name seen from `base_layer`, which may be a further wrapper, and the parameter."""
        name, module = self.parameter_name, self.base_layer
        while isinstance(module, ParamWrapper):
            name, module = f"base_layer.{name}", module.base_layer
        return name, getattr(module, self.parameter_name)

    def get_base_weight(self) -> Tensor:
        """The parameter."""
        return self._parameter()[1].data

    def set_base_weight(self, weight_data: Tensor) -> None:
        """Give the parameter other values."""
        self._parameter()[1].data = weight_data

    def _get_base_layer_device_and_dtype(self, base_layer):
        weight = self._parameter()[1]
        return weight.device, weight.dtype

    def unload_and_optionally_merge_module(
        self, merge: bool, safe_merge: bool, adapter_names: list[str] | None
    ) -> nn.Module:
        """PEFT calls this on the outermost wrapper: the module without any."""
        module = self
        while isinstance(module, ParamWrapper):
            if merge:
                module.merge(safe_merge=safe_merge, adapter_names=adapter_names)
            module = module.base_layer
        return module

    def extra_repr(self) -> str:
        return f"parameter_name={self.parameter_name!r}, {super().extra_repr()}"


# by `WeightForm.kind`
LAYER_KINDS: dict[str, type[NdLoraLayer]] = {
    "linear": NdLoraLinear,
    "embedding": NdLoraEmbedding,
    "convolution": NdLoraConvolution,
    "parameter": ParamWrapper,
}
