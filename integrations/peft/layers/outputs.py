"""What the last training forward gave, and what the base model gives for the same input: for penalties on it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from peft.utils import AuxiliaryTrainingWrapper
from torch import Tensor, nn

from ndlora_plugins.errors import NdLoraValueError

if TYPE_CHECKING:
    from ndlora_plugins.schedules.base import Outputs

    from .shared import Clock

__all__ = ["OutputsWatch", "watch_outputs"]

Penalty = Callable[[nn.Module], Tensor | None]
# of a forward's arguments: what makes a loss, which the base needs not
_OF_THE_LOSS = ("labels", "num_items_in_batch", "shift_labels")


def watch_outputs(model: nn.Module, clock: Clock, penalty: Penalty) -> None:
    """Watch the training forwards of a model: a PEFT model, its tuner, or one whose layers are adapted without them."""
    if clock.outputs is None:
        tuner = model if isinstance(model, BaseTuner) else getattr(model, "base_model", None)
        model = tuner.model if isinstance(tuner, BaseTuner) else model
        clock.outputs = OutputsWatch(model, clock, penalty)


class OutputsWatch:
    """A forward hook. Where a trainer's callback drives the model, it adds the penalty to the loss in its output.

    Args:
        clock: of the model.
        penalty: model -> what its schedules that read outputs add to the loss, or None.

    Attributes:
        handle: takes the hook off the model.
    """

    def __init__(self, model: nn.Module, clock: Clock, penalty: Penalty) -> None:
        self._clock, self._penalty = clock, penalty
        self._last: tuple[nn.Module, tuple, Mapping[str, Any], Any] | None = None
        self.handle = model.register_forward_hook(self, with_kwargs=True)

    def __call__(self, module: nn.Module, args: tuple, kwargs: Mapping[str, Any], output: Any) -> None:
        reads = any(each.schedule.reads_outputs for chosen in self._clock.chosen.values() for each in chosen)
        if not reads or self._clock.measuring or not module.training or not torch.is_grad_enabled():
            return
        self._last = (module, args, kwargs, output)
        if not self._clock.driven:
            return
        total = self._penalty(module)
        if total is None:
            return
        if getattr(output, "loss", None) is None:
            raise NdLoraValueError(
                "A schedule reads what the model gives, and adds to the loss that the model gives: this trainer makes "
                "its loss elsewhere. Leave the schedule out; trainers with a reference model have such a term already."
            )
        output.loss = output.loss + total.to(output.loss.device)

    def read(self) -> Outputs:
        """The outputs of the last forward, which is forgotten.

        Raises:
            NdLoraValueError: there was none, or it gave no logits.
        """
        from ndlora_plugins.schedules.base import Outputs

        if self._last is None:
            raise NdLoraValueError("No training forward has run yet: call penalty() after the forward pass.")
        (module, args, kwargs, output), self._last = self._last, None
        logits = getattr(output, "logits", None)
        if not isinstance(logits, Tensor) or logits.dim() < 2:
            raise NdLoraValueError(
                "A schedule reads the model's logits, and its forward gives none: set the trainer's loss to one that "
                "keeps them (not liger's, not a chunked one), or leave the schedule out."
            )
        with torch.no_grad(), _base_alone(module):
            base = module.forward(
                *args, **{name: value for name, value in kwargs.items() if name not in _OF_THE_LOSS}
            ).logits
        counted = _counted(logits, kwargs, getattr(module, "config", None))
        divisor = kwargs.get("num_items_in_batch")
        return Outputs(logits, base, counted, counted.sum().clamp(min=1) if divisor is None else divisor)


def _counted(logits: Tensor, kwargs: Mapping[str, Any], config: Any) -> Tensor:
    """The positions of the logits (...) that the loss counts."""
    everywhere = torch.ones(logits.shape[:-1], dtype=torch.bool, device=logits.device)
    labels, mask = kwargs.get("labels"), kwargs.get("attention_mask")
    shape = logits.shape[:-1]
    if labels is None or labels.shape != shape or labels.dim() == 1:
        return mask.bool() if labels is None and mask is not None and mask.shape == shape else everywhere
    counted = labels != -100
    of_tokens = logits.shape[-1] == getattr(config, "vocab_size", None)
    if of_tokens and not getattr(
        config, "is_encoder_decoder", False
    ):  # each position tells the next one's token
        counted = torch.cat([counted[..., 1:], torch.zeros_like(counted[..., :1])], dim=-1)
    return counted


@contextmanager
def _base_alone(model: nn.Module) -> Iterator[None]:
    """Without adapters and dropout; which parameters train stays as it is, unlike in `disable_adapter`."""
    modules = list(model.modules())
    off = [
        m
        for m in modules
        if isinstance(m, (BaseTunerLayer, AuxiliaryTrainingWrapper)) and not m.disable_adapters
    ]
    training = [module for module in modules if module.training]
    try:
        for module in off:
            module._disable_adapters = True
        for module in training:
            module.training = False
        yield
    finally:
        for module in off:
            module._disable_adapters = False
        for module in training:
            module.training = True
