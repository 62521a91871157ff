"""The schedules of a model's adapters: chosen and checked, and what they do in each step.

The core is imported when it is first used: registration runs at every `import peft`, so it loads little.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from peft.tuners.tuners_utils import BaseTuner
from torch import nn

from ndlora_plugins.errors import NdLoraValueError

from ..configuration.training_fields import as_schedules
from ..layers.layer import NdLoraLayer, adapted_layers
from ..layers.outputs import watch_outputs

if TYPE_CHECKING:
    from ndlora_plugins.adapter import LayerAdapter
    from ndlora_plugins.schedules.base import Chosen, Training

    from ..layers.shared import Clock

__all__ = [
    "Scheduled",
    "add_penalty_gradients",
    "after_step",
    "check_plans",
    "check_schedules",
    "penalty",
    "set_schedules",
]


class Scheduled(BaseTuner):
    """The tuner's part for schedules in a loop of one's own."""

    clock: Clock

    def set_schedules(
        self,
        schedules: Mapping[str, Mapping[str, Any] | None] | Sequence[str] | str,
        adapter: str | None = None,
    ) -> None:
        """Choose what happens in training, in place of what the adapter's configuration says.

        Args:
            schedules: name -> its options (docs/schedules.md), or names; {} for none.
            adapter: the active ones by default.

        Raises:
            NdLoraValueError: an unknown name or option, or one that cannot work with an adapter. Nothing is changed.
        """
        set_schedules(self, self.active_adapters if adapter is None else adapter, schedules)

    def penalty(self) -> torch.Tensor | None:
        """The sum of what the schedules of the active adapters add to the loss; None if they add nothing.

        Call it after the forward pass, and add it to the loss.
        """
        return penalty(self)

    def after_step(self, optimizer: torch.optim.Optimizer | None = None) -> None:
        """Let the schedules change factors. Call it after `optimizer.step()`.

        Args:
            optimizer: gives the learning rates, and forgets what it knew of factors that were made anew.
        """
        after_step(self, optimizer)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Call the model, and so its hooks, as PEFT does from 0.21 on; before, it called the model's `forward`."""
        return self.model(*args, **kwargs)

    def _unload_and_optionally_merge(self, *args: Any, **kwargs: Any) -> Any:
        unloaded = super()._unload_and_optionally_merge(*args, **kwargs)
        if self.clock.outputs is not None:
            self.clock.outputs.handle.remove()
        return unloaded


def set_schedules(model: nn.Module, adapters: str | Sequence[str], schedules: Any) -> None:
    """Do what `Scheduled.set_schedules` does, for any model with adapters."""
    from ndlora_plugins.schedules.choose import chosen_schedules

    adapters = [adapters] if isinstance(adapters, str) else adapters
    schedules = check_schedules(schedules)
    chosen = chosen_schedules(schedules)
    for adapter in adapters:
        layers = adapted_layers(model, adapter)
        if not layers:
            raise NdLoraValueError(
                f"schedules={list(schedules)}: the model has no NDLORA adapter {adapter!r}."
            )
        check_plans(chosen, [(layer.name, layer.plan[adapter]) for layer in layers])
        if chosen and not any(_trains(layer, adapter) for layer in layers):
            raise NdLoraValueError(
                f"schedules={list(schedules)}: adapter {adapter!r} does not train. Load it with is_trainable=True, or "
                f"make it active with set_adapter."
            )
    for adapter in adapters:
        install(model, adapter, chosen)
        config = getattr(model, "peft_config", {}).get(adapter)
        if config is not None:
            config.schedules = schedules


def check_schedules(schedules: Any) -> dict[str, dict[str, Any] | None]:
    """Schedules as names to options.

    Raises:
        NdLoraValueError: an unknown name or option.
    """
    from ndlora_plugins.schedules.choose import chosen_schedules

    if not isinstance(schedules, (Mapping, list, tuple, str)):
        raise NdLoraValueError(
            f"schedules={schedules!r}: give a name, a list of names, or a mapping to options."
        )
    schedules = as_schedules(schedules)
    chosen_schedules(schedules)
    return schedules


def check_plans(chosen: Iterable[Chosen], plans: Iterable[tuple[str, LayerAdapter]]) -> None:
    """Refuse schedules that cannot work, before anything is changed.

    Raises:
        NdLoraValueError: a schedule that cannot work on a layer.
    """
    plans = list(plans)
    for each in chosen:
        for name, plan in plans:
            reason = each.misfit(plan)
            if reason is not None:
                raise NdLoraValueError(
                    f"Schedule {each.schedule.name!r} cannot work with method={plan.method.name!r} on layer {name!r}: "
                    f"{reason}."
                )


def install(model: nn.Module, adapter: str, chosen: tuple[Chosen, ...]) -> None:
    """Let an adapter that is in the model have these schedules."""
    from ndlora_plugins.schedules.base import Place

    layers = adapted_layers(model, adapter)
    if not layers:
        return
    clock, highest = layers[0].clock, max(layer.r[adapter] for layer in layers)
    clock.chosen[adapter] = chosen
    clock.places[adapter] = {
        layer.name: Place(index, len(layers), layer.r[adapter], highest) for index, layer in enumerate(layers)
    }
    clock.penalty_settled &= not chosen
    if any(each.schedule.reads_outputs for each in chosen):
        watch_outputs(model, clock, partial(penalty, factors=False))


def _trains(layer: NdLoraLayer, adapter: str) -> bool:
    return any(value.requires_grad for value in layer.trained_parameters(adapter).values())


def _training(model: nn.Module, adapter: str, rates: Mapping[int, float] | None = None) -> Training | None:
    """What the schedules of an adapter see; None where it does not train."""
    from ndlora_plugins.schedules.base import TrainedLayer, Training

    layers = []
    for layer in adapted_layers(model, adapter):
        if layer.disable_adapters or adapter not in layer.active_adapters or not _trains(layer, adapter):
            continue
        trained, frozen = layer.tensors(adapter)
        parameters = layer.trained_parameters(adapter)
        rate = (
            next((rates[id(value)] for value in parameters.values() if id(value) in rates), None)
            if rates
            else None
        )
        layers.append(TrainedLayer(layer.name, layer.plan[adapter].structure, parameters, frozen, rate))
        clock = layer.clock
    return Training(tuple(layers), clock.moment(adapter)) if layers else None


def _clock(model: nn.Module) -> Any:
    return next((m.clock for m in model.modules() if isinstance(m, NdLoraLayer)), None)


def penalty(model: nn.Module, outputs: bool = True, factors: bool = True) -> torch.Tensor | None:
    """The sum of what the active adapters' schedules add to the loss.

    Args:
        outputs: with those that read what the last training forward gave.
        factors: with those that do not.
    """
    total, read, clock = None, None, _clock(model)
    if clock is None:
        return None
    clock.penalty_settled = True
    for adapter, chosen in clock.chosen.items():
        asked = [
            (each, each.schedule)
            for each in chosen
            if each.schedule.penalty is not None and (outputs if each.schedule.reads_outputs else factors)
        ]
        training = _training(model, adapter) if asked else None
        if training is None:
            continue
        for each, schedule in asked:
            if schedule.reads_outputs:
                read = read or clock.outputs.read()  # once for all: it is forgotten then
                training = replace(training, outputs=read)
            value = schedule.penalty(each.options, training)
            if value is not None:
                total = value if total is None else total + value
    return total


def add_penalty_gradients(model: nn.Module) -> None:
    """Add the gradient of the penalties on factors to that of the factors, as if they had been part of the loss.

    Before the optimizer's step, and after clipping: a penalty's own gradient is not clipped.
    """
    total = penalty(model, outputs=False)
    if total is None or not total.requires_grad:
        return
    trained = [value for value in model.parameters() if value.requires_grad]
    for parameter, gradient in zip(
        trained, torch.autograd.grad(total, trained, allow_unused=True), strict=True
    ):
        if gradient is not None:
            parameter.grad = gradient if parameter.grad is None else parameter.grad.add_(gradient)


def after_step(model: nn.Module, optimizer: Any = None) -> None:
    """Do what `Scheduled.after_step` does, for any model with adapters."""
    clock = _clock(model)
    if clock is None:
        return
    groups = () if optimizer is None else optimizer.param_groups
    rates = {id(parameter): group["lr"] for group in groups for parameter in group["params"]}
    for adapter, chosen in clock.chosen.items():
        clock.penalty_settled |= all(each.schedule.penalty is None for each in chosen)
        for each in chosen:
            if each.schedule.after_step is None:
                continue
            training = _training(model, adapter, rates)
            if training is None:
                continue
            with torch.no_grad():
                anew = each.schedule.after_step(each.options, training) or ()
            if optimizer is not None:
                for parameter in (value for layer in anew for value in layer.trained.values()):
                    optimizer.state.pop(parameter, None)
