"""The tuner layers: each holds the tensors of every adapter on one layer and calls the core with them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn

from ndlora_plugins.errors import NdLoraValueError
from ndlora_plugins.fused import cast_factors

from .merging import Merging, scaled_delta
from .shared import Bank, Clock, FrozenFactors
from .weights import base_weight

if TYPE_CHECKING:
    from ndlora_plugins.adapter import LayerAdapter
    from ndlora_plugins.schedules.base import Ranks

    from ..tuner.targets import Planned

__all__ = ["NdLoraLayer", "adapted_layers"]


class NdLoraLayer(nn.Module, Merging):
    """Adapters on one layer. `ndlora_factors[adapter][factor]` trains, `ndlora_frozen[adapter]` does not.

    Args:
        base_layer: the layer, or another adapter's of PEFT around it.
        adapter_name, planned: as `update_layer` takes them, with its keywords.
        bank: what the layers of the model share.
        clock: the training steps of the model.
    """

    _modules: dict[str, Any]  # torch's type allows for modules that were set to None
    # what models read of a layer of this kind
    shown_of_base: tuple[str, ...] = ()
    # where PEFT looks for the tensors of an adapter, to freeze, move and delete them
    adapter_layer_names = ("ndlora_factors", "ndlora_shared")
    other_param_names = (
        "ndlora_frozen", "ndlora_shared_frozen", "ndlora_dropout", "plan", "r", "lora_alpha", "scaling",
    )  # fmt: skip

    def __init__(
        self,
        base_layer: nn.Module,
        adapter_name: str,
        planned: Planned,
        *,
        bank: Bank,
        clock: Clock,
        **kwargs: Any,
    ) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.parameter_name = planned.target.parameter_name
        self.ndlora_factors = nn.ModuleDict({})
        self.ndlora_frozen = nn.ModuleDict({})
        self.ndlora_dropout = nn.ModuleDict({})
        self.plan: dict[str, LayerAdapter] = {}
        self.r: dict[str, int] = {}
        self.lora_alpha: dict[str, float] = {}
        self.scaling: dict[str, float] = {}
        self.bank, self.clock = bank, clock
        self._disable_adapters = False
        self.merged_adapters = []
        self.cast_input_dtype_enabled = True
        self.name, self.form, self.quantization_backend = planned.target.name, planned.form, planned.backend
        self.in_features, self.out_features = self.form.in_features, self.form.out_features
        for name in self.shown_of_base:
            setattr(self, name, getattr(self.get_base_layer(), name))
        self._active_adapter = adapter_name
        self.update_layer(adapter_name, planned, **kwargs)

    def update_layer(
        self,
        adapter_name: str,
        planned: Planned,
        *,
        lora_dropout: float,
        gradient: Tensor | None = None,
        generator: torch.Generator | None = None,
        inference_mode: bool = False,
    ) -> None:
        """Add an adapter, or replace the one of that name.

        Args:
            gradient: (out_features, in_features), of the weight, for starts that read one.
        """
        plan = planned.plan
        if "gradient" in plan.start.reads and gradient is None:
            trained, frozen = plan.zeros()  # all of them will be loaded
        else:
            trained, frozen = self._initialize(adapter_name, plan, gradient, generator)
        if not self._base_is_floating():  # PEFT moves adapters to the base's dtype only where that is a float
            trained, frozen = cast_factors(trained, torch.float32), cast_factors(frozen, torch.float32)
        trained, frozen = self.bank.keep(adapter_name, plan, trained, frozen)
        self.plan[adapter_name] = plan
        self.r[adapter_name] = plan.layout.rank
        self.lora_alpha[adapter_name] = planned.alpha
        self.scaling[adapter_name] = plan.scaling
        self.ndlora_dropout[adapter_name] = nn.Dropout(lora_dropout) if lora_dropout > 0.0 else nn.Identity()
        self.ndlora_factors[adapter_name] = nn.ParameterDict(
            {name: nn.Parameter(value) for name, value in trained.items()}
        )
        if frozen:
            limits = {factor.name: factor.indices for factor in plan.frozen if factor.indices is not None}
            self.ndlora_frozen[adapter_name] = FrozenFactors(frozen, plan.recomputed, limits)
        self._move_adapter_to_device_of_base_layer(adapter_name)
        self.set_adapter(self.active_adapters, inference_mode=inference_mode)

    @property
    def ndlora_shared(self) -> nn.ModuleDict:
        """The tensors that layers of the model share and that train: adapter -> key -> parameter."""
        return self.bank.factors

    @property
    def ndlora_shared_frozen(self) -> nn.ModuleDict:
        """The tensors that layers of the model share and that do not train."""
        return self.bank.frozen

    def get_base_weight(self) -> Tensor:
        """The weight of the base layer, dequantised, as the layer stores it."""
        return base_weight(self.get_base_layer(), self.quantization_backend)

    def _get_base_layer_device_and_dtype(self, base_layer: nn.Module) -> tuple[Any, torch.dtype | None]:
        """As PEFT's; where a weight only lies in 8-bit floats (diffusers' layerwise casting), factors are float32."""
        device, dtype = super()._get_base_layer_device_and_dtype(base_layer)
        lies_narrow = dtype is not None and dtype.is_floating_point and dtype.itemsize < 2
        return device, torch.float32 if lies_narrow else dtype

    def _base_device(self) -> torch.device | None:
        """Where the base weight lies; None where nobody knows, or it is not there: offloaded, say."""
        device = self._get_base_layer_device_and_dtype(self.get_base_layer())[0]
        return None if device is None or device.type == "meta" else device

    def _base_is_floating(self) -> bool:
        dtype = self._get_base_layer_device_and_dtype(self.get_base_layer())[1]
        return dtype is not None and dtype.is_floating_point

    def _read_weight(self, plan: LayerAdapter) -> Tensor | None:
        """The base weight (out, in), dequantised, if the start reads it."""
        if "weight" not in plan.start.reads:
            return None
        weight = getattr(self.get_base_layer(), self.parameter_name or "weight", None)
        if weight is not None and hasattr(weight, "ds_id"):  # ZeRO-3 keeps a shard: gather the whole
            import deepspeed  # pyright: ignore[reportMissingImports]  is there where ZeRO-3 is

            with deepspeed.zero.GatheredParameters([weight]):
                return self.form.matrix(weight.data.clone())
        return self.form.matrix(self.get_base_weight())

    def tensors(self, adapter: str) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """(trained, frozen) of one adapter, shared ones too, of one dtype.

        Frozen factors that lie elsewhere or in another dtype than the trained ones are brought there first, and those
        that were made on "meta" are read from the base weight.
        """
        # `_modules` and `_parameters`: attributes of a module and ParameterDict.items() cost microseconds
        trained = self._modules["ndlora_factors"]._modules[adapter]._parameters
        holder = self._modules["ndlora_frozen"]._modules.get(adapter)
        frozen = {} if holder is None else holder.tensors()
        if self.plan[adapter].shared:
            trained, frozen = self.bank.join(adapter, self.plan[adapter], trained, frozen, self._base_device)
        if not frozen:
            return trained, frozen
        reference = next(iter(trained.values()))
        dtype, device = reference.dtype, reference.device
        if all(
            value.device == device and (value.dtype == dtype or not value.is_floating_point())
            for value in frozen.values()
        ):
            return trained, frozen
        if self.plan[adapter].recomputed and not reference.is_meta:
            return trained, self._refresh(adapter, frozen, reference)
        return trained, {name: value.to(device) for name, value in cast_factors(frozen, dtype).items()}

    def _refresh(self, adapter: str, frozen: dict[str, Tensor], reference: Tensor) -> dict[str, Tensor]:
        """Bring recomputed factors to the trained ones' device and dtype, anew if they were made on "meta"."""
        if any(value.is_meta for value in frozen.values()):
            if self.merged:
                raise NdLoraValueError(
                    f"The start of adapter {adapter!r} is read from the base weight, which is merged with "
                    f"{self.merged_adapters}: unmerge it first."
                )
            frozen = self._initialize(adapter, self.plan[adapter])[1]
        frozen = {
            name: value.detach().to(reference.device)
            for name, value in cast_factors(frozen, reference.dtype).items()
        }
        keys = dict(self.plan[adapter].shared)
        for name, value in frozen.items():
            holder = self.bank.frozen if name in keys else self.ndlora_frozen
            setattr(holder[adapter], keys.get(name, name), value)
        return frozen

    def _initialize(
        self,
        adapter: str,
        plan: LayerAdapter,
        gradient: Tensor | None = None,
        generator: torch.Generator | None = None,
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        from ndlora_plugins.starts.base import Seen

        shared = self.bank.start_values(adapter, plan)
        seen = Seen(self._read_weight(plan), gradient, shared, self.clock.seeds.get(adapter, 0), self.name)
        return plan.initialize(seen, generator)

    def ranks(self, adapter: str) -> Ranks | None:
        """The ranks that a training forward sees, where a schedule hides a part; else None."""
        return self.clock.ranks(adapter, self.name) if self.training and self.clock.chosen else None

    def trained_parameters(self, adapter: str) -> dict[str, nn.Parameter]:
        """The factors of one adapter that the method trains, by name, shared ones too."""
        own = cast("dict[str, nn.Parameter]", self.ndlora_factors[adapter]._parameters)
        return {**own, **self.bank.parameters(adapter, self.plan[adapter])}

    def update(self, adapter: str, x: Tensor) -> Tensor:
        """The update that one adapter adds to the layer's output for the input x."""
        raise NotImplementedError

    def get_delta_weight(self, adapter: str) -> Tensor:
        """scaling * dW in the way the base layer stores its weight, at least float32."""
        delta = scaled_delta(self.plan[adapter], *self.tensors(adapter), self.scaling[adapter])
        return self.form.stored(delta)

    def set_scale(self, adapter: str, scale: float) -> None:
        """Set the scaling of an adapter to `scale` times its planned one."""
        if adapter in self.scaling:
            self.scaling[adapter] = scale * self.plan[adapter].scaling

    def delete_adapter(self, adapter_name: str) -> None:
        """Delete as PEFT does; the adapter's schedules go too."""
        super().delete_adapter(adapter_name)
        self.clock.forget(adapter_name)

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
        """Add the updates to what the base layer gives for x, in the base layer's dtype.

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
        return cast_factors(trained, x.dtype), cast_factors(frozen, x.dtype)

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

    def extra_repr(self) -> str:
        return ", ".join(
            f"{name}: {plan.method.name} r={plan.layout.rank} anchor={plan.anchor}"
            for name, plan in self.plan.items()
        )

    def __repr__(self) -> str:
        return "ndlora." + super().__repr__()


def adapted_layers(model: nn.Module, adapter: str) -> list[NdLoraLayer]:
    """The layers of an adapter, in the model's order."""
    return [m for m in model.modules() if isinstance(m, NdLoraLayer) and adapter in m.ndlora_factors]
