"""`load_in_4bit` and `load_in_8bit`: Axolotl reads them for `adapter: qlora` and `adapter: lora` only."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ..patches import stand_before

__all__ = ["enable"]

# the steps of Axolotl's model loader that look at the adapter's name to decide on quantisation
_STEPS = ("_set_quantization_config", "_prepare_model_for_quantization")


def enable() -> None:
    """Let those steps see the name that they quantise for, while they run. Idempotent."""
    from axolotl.loaders.model import ModelLoader

    for name in _STEPS:
        stand_before(ModelLoader, name, _named_for_its_bits)


def _named_for_its_bits(step: Callable[..., Any]) -> Callable[..., Any]:
    def wrapped(self: Any, *args: Any, **kwargs: Any) -> Any:
        cfg = self.cfg
        if cfg.adapter != "ndlora" or not (cfg.load_in_4bit or cfg.load_in_8bit):
            return step(self, *args, **kwargs)
        cfg.adapter = "qlora" if cfg.load_in_4bit else "lora"
        try:
            return step(self, *args, **kwargs)
        finally:
            cfg.adapter = "ndlora"

    return wrapped
