"""Makes `adapter: ndlora` enough: every configuration passes Axolotl's `validate_config`, which we wrap.

`ndlora_autoload` calls `activate` when `axolotl.utils.config` has been imported.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

from ..patches import stand_before

PLUGIN = "ndlora_plugins.integrations.axolotl.NdLoraPlugin"


def activate() -> None:
    """Wrap `axolotl.utils.config.validate_config`. Idempotent."""
    stand_before(importlib.import_module("axolotl.utils.config"), "validate_config", _bringing_in_the_plugin)


def _bringing_in_the_plugin(original: Callable[..., Any]) -> Callable[..., Any]:
    def validate_config(cfg: Any, *args: Any, **kwargs: Any) -> Any:
        if cfg.get("adapter") == "ndlora":
            bring_in_plugin(cfg)
        elif cfg.get("ndlora"):
            from ndlora_plugins.errors import NdLoraValueError

            raise NdLoraValueError(
                f"The block `ndlora:` says nothing with adapter: {cfg.get('adapter')}. Write `adapter: "
                f"ndlora`, or take the block out."
            )
        return original(cfg, *args, **kwargs)

    return validate_config


def bring_in_plugin(cfg: Any) -> None:
    """Add our plugin to the configuration and to Axolotl's manager, unless it is listed already."""
    from axolotl.integrations.base import PluginManager

    from .plugin import NdLoraPlugin

    manager = PluginManager.get_instance()
    listed = list(cfg.get("plugins") or [])
    if any(isinstance(manager.plugins.get(path), NdLoraPlugin) for path in listed):
        return
    manager.register(PLUGIN)
    cfg["plugins"] = [*listed, PLUGIN]  # Axolotl calls plugins only where this key stands
    manager.plugins[PLUGIN].register(cfg)
