"""What the layers of a model have in common: the tensors that they share, and the training step they are in."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ndlora_plugins.errors import NdLoraValueError

if TYPE_CHECKING:
    from torch.utils.hooks import RemovableHandle

    from ndlora_plugins.adapter import LayerAdapter
    from ndlora_plugins.schedules.base import Chosen, Moment, Place, Ranks

__all__ = ["SHARED", "Bank", "Clock", "FrozenFactors", "index_problem"]

SHARED = "ndlora_shared"  # how the keys of shared tensors begin, behind the model's

Tensors = Mapping[str, Tensor]


def index_problem(name: str, value: Tensor, limit: int) -> str | None:
    """The fault in stored indices of features, if anything is."""
    if value.is_meta or (value.dtype == torch.int64 and bool(((value >= 0) & (value < limit)).all())):
        return None
    return f"{name!r} chooses features: it must be of dtype int64, from 0 to below {limit}."


class FrozenFactors(nn.Module):
    """Factors of one adapter that do not train.

    Those made again from the base weight or a seed are buffers that no state dict holds; the others are saved
    parameters.
    """

    _parameters: dict[str, Any]  # torch's types allow for values that were set to None
    _buffers: dict[str, Any]

    def __init__(self, factors: Tensors, recomputed: bool, limits: Mapping[str, int] | None = None):
        """Hold them; `limits` says of how many features those that are indices choose."""
        super().__init__()
        self.limits = limits or {}
        for name, value in factors.items():
            self.add(name, value, recomputed)

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *rest: Any) -> None:
        for name, limit in self.limits.items():
            if prefix + name in state_dict:
                problem = index_problem(prefix + name, state_dict[prefix + name], limit)
                if problem:
                    raise NdLoraValueError(problem)
        super()._load_from_state_dict(state_dict, prefix, *rest)

    def add(self, name: str, value: Tensor, recomputed: bool) -> None:
        """Hold one more."""
        if recomputed:
            self.register_buffer(name, value, persistent=False)
        else:
            self.register_parameter(name, nn.Parameter(value, requires_grad=False))

    def tensors(self) -> dict[str, Tensor]:
        """All of them, by name."""
        return {**self._parameters, **self._buffers}


class Bank:
    """The tensors that several layers share, of every adapter. The tuner holds them, the layers refer to them.

    Attributes:
        factors: adapter -> key -> what trains.
        frozen: adapter -> key -> what does not.
    """

    def __init__(self) -> None:
        # Any: torch does not say what a ModuleDict holds
        self.factors: Any = nn.ModuleDict()
        self.frozen: Any = nn.ModuleDict()

    def start_values(self, adapter: str, plan: LayerAdapter) -> dict[str, Tensor]:
        """Factor -> its start, of those that another layer has brought already."""
        # with the anchor the start is what is frozen, without it what trains is the start
        held = self._held(self.factors, adapter) | self._held(self.frozen, adapter)
        return {
            factor: held[key].detach() for factor, key in plan.shared if key in held and not held[key].is_meta
        }

    def keep(
        self, adapter: str, plan: LayerAdapter, trained: Tensors, frozen: Tensors
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Take in what is shared and new; return what is the layer's own."""
        keys = dict(plan.shared)
        for name in (name for name in trained if name in keys):  # in one order in all processes
            if adapter not in self.factors:
                self.factors[adapter] = nn.ParameterDict()
            if keys[name] not in self.factors[adapter]:
                self.factors[adapter][keys[name]] = nn.Parameter(trained[name])
        for name in (name for name in frozen if name in keys):
            if adapter not in self.frozen:
                self.frozen[adapter] = FrozenFactors({}, plan.recomputed)
            if keys[name] not in self.frozen[adapter].tensors():
                self.frozen[adapter].add(keys[name], frozen[name], plan.recomputed)
        own = [
            {name: value for name, value in group.items() if name not in keys} for group in (trained, frozen)
        ]
        return own[0], own[1]

    def parameters(self, adapter: str, plan: LayerAdapter) -> dict[str, nn.Parameter]:
        """Factor -> the parameter, of those that a layer shares and that train."""
        held = self._held(self.factors, adapter)
        return {name: held[key] for name, key in plan.shared if key in held}

    def join(
        self,
        adapter: str,
        plan: LayerAdapter,
        trained: Tensors,
        frozen: Tensors,
        base_device: Callable[[], torch.device | None],
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """A layer's own tensors and the shared ones, by factor, on the layer's device and in its dtype.

        Args:
            base_device: asked for the device, None for any, where the layer has no tensor of its own.
        """
        own = next(
            (value for value in (*trained.values(), *frozen.values()) if value.is_floating_point()), None
        )
        device, dtype = (base_device(), None) if own is None else (own.device, own.dtype)
        joined = []
        for holder, tensors in ((self.factors, trained), (self.frozen, frozen)):
            held = self._held(holder, adapter)
            shared = {name: held[key] for name, key in plan.shared if key in held}
            shared = {
                name: value
                if value.is_meta
                else value.to(device, dtype if value.is_floating_point() else None)
                for name, value in shared.items()
            }
            joined.append({**tensors, **shared})
        return joined[0], joined[1]

    def delete(self, adapter: str) -> None:
        """Forget an adapter's tensors."""
        for holder in (self.factors, self.frozen):
            if adapter in holder:
                del holder[adapter]

    def widen(self, adapter: str) -> None:
        """An adapter's tensors of 16 bit become float32, as PEFT does with those of the layers."""
        for holder in (self.factors, self.frozen):
            for value in self._held(holder, adapter).values():
                if value.dtype in (torch.float16, torch.bfloat16):
                    value.data = value.data.float()

    @staticmethod
    def _held(holder: Any, adapter: str) -> dict[str, Any]:
        return {**holder[adapter]._parameters, **holder[adapter]._buffers} if adapter in holder else {}


class Clock:
    """The training step that a model is in, the same for all of its layers until the next forward.

    Args:
        warn_of_penalties: is called with the model where nobody does what its schedules ask for.

    Attributes:
        step: of the optimiser.
        driven: whether a trainer's callback sets the step; else every training forward is a step of its own.
        seeds: adapter -> its `random_seed`.
        penalty_settled: whether the loss gets the schedules' penalties, or it was told that it does not.
        chosen: adapter -> its schedules.
        places: adapter -> layer's name -> its place.
        outputs: what the last forward gave, where a schedule reads it.
        measuring: whether gradients are being measured, for adapters that have no values yet.
        hooks: what a trainer's callback put on the factors, gone when it lets go.
    """

    def __init__(self, warn_of_penalties: Callable[[nn.Module], None]) -> None:
        self._warn_of_penalties = warn_of_penalties
        self.step, self.driven, self.penalty_settled = 0, False, False
        self.seeds: dict[str, int] = {}
        self.chosen: dict[str, tuple[Chosen, ...]] = {}
        self.places: dict[str, dict[str, Place]] = {}
        self.outputs: Any = None
        self.measuring = False
        self.hooks: list[RemovableHandle] = []

    def release(self) -> None:
        """No trainer drives it any more: one that has ended, or that was interrupted."""
        self.driven = False
        while self.hooks:
            self.hooks.pop().remove()

    @property
    def watched(self) -> bool:
        """Tell whether an adapter has a schedule; else nothing is counted, and torch.compile does not compile anew
        for every number.
        """
        return any(self.chosen.values())

    def forget(self, adapter: str) -> None:
        """An adapter is no longer in the model."""
        for of_adapters in (self.seeds, self.chosen, self.places):
            of_adapters.pop(adapter, None)

    def moment(self, adapter: str) -> Moment:
        """The step, as an adapter's schedules see it."""
        from ndlora_plugins.schedules.base import Moment

        return Moment(self.step, self.seeds.get(adapter, 0))

    def ranks(self, adapter: str, layer: str) -> Ranks | None:
        """The ranks of a layer that a training forward sees; None for all of them."""
        for each in self.chosen.get(adapter, ()):
            if each.schedule.ranks is not None:
                place = self.places[adapter][layer]
                found = each.ranks(self.moment(adapter), place)
                return None if found == (place.rank, 0, 1.0) else found
        return None

    def begin_forward(self, model: nn.Module, args: tuple = ()) -> None:
        """A forward of the whole model begins; made to be a forward pre-hook of it too."""
        if self.driven or self.measuring or not self.watched or not model.training:
            return
        self.step += 1
        if self.step > 1 and not self.penalty_settled:  # the first step has had its loss
            self.penalty_settled = True
            self._warn_of_penalties(model)
