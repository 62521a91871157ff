"""The layers of each kind: linear ones, embeddings, convolutions, and bare parameters."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook

from ndlora_plugins.errors import NdLoraValueError
from ndlora_plugins.fused import cast_factors

from .layer import NdLoraLayer

__all__ = ["LAYER_KINDS", "NdLoraConvolution", "NdLoraEmbedding", "NdLoraLinear", "ParamWrapper"]


class NdLoraLinear(NdLoraLayer):
    """Adapters on `nn.Linear`, transformers' `Conv1D`, or a quantised linear layer."""

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Run as `NdLoraLayer.forward` does; a plain `nn.Linear` and its first adapter go through one function."""
        base, factors = self._modules["base_layer"], self._modules["ndlora_factors"]._modules
        if args or kwargs or self.merged_adapters or self._disable_adapters or not _is_plain_linear(base):
            return super().forward(x, *args, **kwargs)
        active = [name for name in self.active_adapters if name in factors]
        if not active or (self.training and not isinstance(self.ndlora_dropout[active[0]], nn.Identity)):
            return super().forward(x)
        # `_parameters`: see `tensors`
        weight, bias = base._parameters["weight"], base._parameters["bias"]
        first = active[0]
        tensors, scaling = self._tensors_for(first, x), self.scaling[first]
        result = self.plan[first].linear(weight, bias, *tensors, x, scaling, self.ranks(first))
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
            ranks=self.ranks(adapter),
        )

    def update(self, adapter: str, x: Tensor) -> Tensor:
        """scaling * dW x: (..., in_features) -> (..., out_features)."""
        trained, frozen = self._tensors_for(adapter, x)
        x = self._cast_to_factors(x, trained)
        update, factors = self.plan[adapter].update(trained, frozen, self.ranks(adapter))
        y = update.apply(factors, self.ndlora_dropout[adapter](x))
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
        update, factors = self.plan[adapter].update(*self.tensors(adapter), self.ranks(adapter))
        y = update.lookup(factors, x)
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
        update, factors = self.plan[adapter].update(trained, frozen, self.ranks(adapter))
        y = update.convolve(factors, x, self._convolution)
        return self._scaled(adapter, y.squeeze(0) if single else y)

    def _convolution(self, x: Tensor, weight: Tensor) -> Tensor:
        """As the base layer convolves, in as many groups as the shapes tell."""
        base = self.get_base_layer()
        assert isinstance(base, (nn.Conv1d, nn.Conv2d, nn.Conv3d)), "as `weight_form` says"
        convolve: Callable[..., Tensor] = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}[len(base.kernel_size)]
        padding = base.padding
        if base.padding_mode != "zeros":
            x, padding = F.pad(x, base._reversed_padding_repeated_twice, mode=base.padding_mode), 0
        return convolve(x, weight, None, base.stride, padding, base.dilation, x.shape[1] // weight.shape[1])


class ParamWrapper(NdLoraLayer):
    """Adapters on one parameter of a module, such as the experts' (experts, out, in).

    The module's own forward is called with W + dW in its place; dW is formed for it. PEFT nests wrappers where
    several parameters of one module are adapted, and knows them by the name of this class.
    """

    parameter_name: str

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
            trained, frozen = (cast_factors(group, weight.dtype) for group in self.tensors(adapter))
            delta = self.form.stored(self.plan[adapter].delta(trained, frozen, self.ranks(adapter)))
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
