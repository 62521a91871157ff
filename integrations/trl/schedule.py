"""From training all factors to training `core` alone: SLoRA or NLoRA becomes IntTune on the way."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import nn

from ndlora_plugins.errors import NdLoraValueError

from ..peft.layers.layer import NdLoraLayer
from ..peft.layers.shared import Clock
from .checks import trained_factors

__all__ = ["CoreOnly"]

CORE = "core"


class CoreOnly:
    """Stops every factor but `core` from a step on.

    A stopped factor's gradient is made zero as it arrives (so that clipping sees the cores' alone) and
    dropped before the optimizer's step, which then leaves the factor and its state untouched, weight decay
    included.
    `requires_grad` stays as it is: DistributedDataParallel does not allow it to change.

    Args:
        at: a step (int, from 0), or a fraction of all steps (float, 0 to 1).
    """

    def __init__(self, at: int | float):
        whole = isinstance(at, int) and not isinstance(at, bool) and at >= 0
        if not whole and not (isinstance(at, float) and 0 <= at <= 1):
            raise NdLoraValueError(
                f"core_only_at={at!r}: give a step (an integer of at least 0) or a fraction of all steps (a "
                f"float from 0 to 1)."
            )
        self.at = at
        self._step = 0
        self._stopped: list[tuple[nn.Parameter, Clock]] = []
        self._begun = False

    def begin(self, layers: Sequence[tuple[str, NdLoraLayer]], max_steps: int, sharded: bool) -> None:
        """Find what is to be stopped, and when.

        Raises:
            NdLoraValueError: a trained adapter has no core that trains, or the gradients cannot be reached.
        """
        if sharded:
            raise NdLoraValueError("core_only_at does not work under DeepSpeed or FSDP yet: leave it out.")
        self._step = self.at if isinstance(self.at, int) else math.ceil(self.at * max_steps)
        self._stopped, self._begun = [], False
        for name, layer in layers:
            for adapter, factors in trained_factors(layer).items():
                trainable = {key: value for key, value in factors.items() if value.requires_grad}
                if trainable and CORE not in trainable:
                    raise NdLoraValueError(
                        f"core_only_at={self.at}: adapter {adapter!r} on layer {name!r} has "
                        f"method={layer.plan[adapter].method.name!r}, whose factors {sorted(trainable)} have "
                        f"no core. Use a method that trains one, or leave core_only_at out."
                    )
                self._stopped += [(value, layer.clock) for key, value in trainable.items() if key != CORE]

    def advance(self, step: int) -> bool:
        """Stop if it is time, before a step is made. True exactly when that happens."""
        if self._begun or step < self._step or not self._stopped:
            return False
        self._begun = True
        for parameter, clock in self._stopped:
            clock.hooks.append(parameter.register_hook(torch.zeros_like))
        return True

    def drop_gradients(self) -> None:
        """Drop them before the optimizer's step."""
        if self._begun:
            for parameter, _ in self._stopped:
                parameter.grad = None
