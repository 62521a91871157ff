"""What a failure halfway through adding an adapter leaves behind is taken back."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

__all__ = ["undone_on_failure"]


@contextmanager
def undone_on_failure(*models: nn.Module) -> Iterator[None]:
    """If the block fails, all modules of `models` hold the submodules, parameters and adapters that they held before.

    Only references are kept: values that are written in place stay written.
    """
    containers = [
        (held, held.copy())
        for model in models
        for module in model.modules()
        for held in vars(module).values()
        if type(held) in (dict, list, set)
    ]
    trainable = [(value, value.requires_grad) for model in models for value in model.parameters()]
    try:
        yield
    except BaseException:  # no memory left, or Ctrl-C
        for held, before in containers:
            held.clear()
            (held.extend if isinstance(held, list) else held.update)(before)
        for parameter, requires_grad in trainable:
            parameter.requires_grad_(requires_grad)
        raise
