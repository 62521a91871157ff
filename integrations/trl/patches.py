"""The function of transformers' trainer that one of ours stands before. Tried on transformers 5.23.0 and 5.16.1."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from transformers.trainer_callback import CallbackHandler, TrainerCallback

from ..patches import stand_before

__all__ = ["call_first"]


def call_first(kind: type[TrainerCallback]) -> None:
    """Let callbacks of this kind be called before all others from the beginning of a training on. Idempotent.

    A trainer puts the trackers (TensorBoard, W&B, ...) before its user's callbacks, so they would not see what ours
    adds to the logs, and it tells a callback neither of itself nor of the others.
    """

    def make(original: Callable[..., Any]) -> Callable[..., Any]:
        def on_train_begin(self: CallbackHandler, *args: Any, **kwargs: Any) -> Any:
            self.callbacks.sort(key=lambda callback: not isinstance(callback, kind))  # stable
            return original(self, *args, **kwargs)

        return on_train_begin

    stand_before(CallbackHandler, "on_train_begin", make)  # transformers/trainer_callback.py:490
