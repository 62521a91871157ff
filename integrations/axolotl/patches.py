"""Every function of Axolotl that one of ours stands before. Tried on axolotl 0.19.0; its line stands beside each."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable
from typing import Any

from ..patches import stand_before

__all__ = ["let_quantise", "look_before_validation", "merge_by_shards"]


def look_before_validation(look: Callable[[Any], None]) -> None:
    """Let `look` see every configuration before Axolotl validates it. Idempotent."""

    def make(original: Callable[..., Any]) -> Callable[..., Any]:
        def validate_config(cfg: Any, *args: Any, **kwargs: Any) -> Any:
            look(cfg)
            return original(cfg, *args, **kwargs)

        return validate_config

    # axolotl/utils/config/__init__.py:457
    stand_before(importlib.import_module("axolotl.utils.config"), "validate_config", make)


def let_quantise() -> None:
    """Let `load_in_4bit` and `load_in_8bit` work, which Axolotl reads for `qlora` and `lora` only. Idempotent."""
    from axolotl.loaders.model import ModelLoader

    # axolotl/loaders/model.py:747 and 1116: the steps that look at the adapter's name to decide on quantisation
    for name in ("_set_quantization_config", "_prepare_model_for_quantization"):
        stand_before(ModelLoader, name, _named_for_its_bits)


def merge_by_shards(cfg: Any) -> None:
    """Let `axolotl merge-lora` merge ours: its default way reads LoRA's keys only and would merge nothing.

    Where Axolotl has not loaded that command yet, `cfg` asks for "legacy", the loaded model, which is as right.
    """
    command = sys.modules.get("axolotl.cli.merge_lora")
    if command is None:
        cfg["merge_method"] = "legacy"
        return
    stand_before(command, "do_merge_lora", _merging_by_shard)  # axolotl/cli/merge_lora.py:20


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


def _merging_by_shard(original: Callable[..., None]) -> Callable[..., None]:
    def do_merge_lora(*, cfg: Any) -> None:
        from .merge import merge_and_save

        if cfg.adapter != "ndlora" or cfg.merge_method == "legacy" or not merge_and_save(cfg):
            return original(cfg=cfg)

    return do_merge_lora
