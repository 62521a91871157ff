"""Starts that read gradients, from the trainer's own batches: `NdLoraConfig(gradient_batches=8)`."""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, cast

import numpy as np
import torch
from torch import nn

from ndlora_plugins.errors import NdLoraValueError

from ..peft.measure import start_from_gradients, waits_for_gradients

__all__ = ["measure_on_batches"]


def measure_on_batches(model: nn.Module, batches: Any, sharded: bool) -> dict[str, int]:
    """Start the adapters of a model that ask for it and have no values yet.

    The batches are the first ones of the trainer's data loader; the training meets them again.

    Args:
        batches: the trainer's data loader.
        sharded: whether DeepSpeed or FSDP holds the weights.

    Returns:
        adapter -> on how many batches its gradients were measured.

    Raises:
        NdLoraValueError: there is no data, no loss, or nobody holds the whole weights.
    """
    done = {}
    for adapter, config in (getattr(model, "peft_config", None) or {}).items():
        count = getattr(config, "gradient_batches", None)
        if count is None or not waits_for_gradients(model, adapter):
            continue
        if sharded:
            raise NdLoraValueError(
                f"gradient_batches={count} does not work under DeepSpeed or FSDP, where no process holds whole "
                f"gradients: measure them on one device with measure_gradients, save the adapter, and train that."
            )
        if batches is None:
            raise NdLoraValueError(
                f"gradient_batches={count}: the trainer has no training data to measure them on."
            )
        clock = cast(Any, model).base_model.clock
        try:
            clock.measuring = True
            with _untouched_generators():
                start_from_gradients(model, adapter, lambda count=count: _run(model, batches, count))
        finally:
            clock.measuring = False
        done[adapter] = count
    return done


def _run(model: nn.Module, batches: Any, count: int) -> None:
    device = next(model.parameters()).device
    was_training = model.training
    model.train()  # as the training runs it, with checkpointing
    try:
        for batch in itertools.islice(batches, count):
            inputs = {name: _moved(value, device) for name, value in batch.items()}
            try:
                loss = getattr(model(**inputs), "loss", None)
            except TypeError as error:  # an input that the model does not know
                raise NdLoraValueError(_NO_LOSS.format(count, f" ({error})")) from error
            if loss is None:
                raise NdLoraValueError(_NO_LOSS.format(count, ""))
            loss.backward()
    finally:
        model.train(was_training)
        if hasattr(batches, "end"):  # accelerate's, which was left before its end
            batches.end()


_NO_LOSS = (
    "gradient_batches={}: this trainer's batches are no inputs from which the model gives a loss{}. Call "
    "ndlora_plugins.measure_gradients(model, config, step) before get_peft_model instead."
)


def _moved(value: Any, device: torch.device) -> Any:
    if isinstance(value, Mapping):
        return {name: _moved(part, device) for name, part in value.items()}
    return value.to(device) if isinstance(value, torch.Tensor) else value


@contextmanager
def _untouched_generators() -> Iterator[None]:
    """The training is to draw what it would have drawn."""
    python, numpy = random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng():
            yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)
