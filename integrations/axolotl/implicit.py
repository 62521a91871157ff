"""Makes `adapter: ndlora` enough: a configuration that says it gets our plugin before Axolotl validates it.

`ndlora_autoload` calls `activate` when `axolotl.utils.config` has been imported.
"""

from __future__ import annotations

from typing import Any

from .patches import look_before_validation

__all__ = ["PLUGIN", "activate", "bring_in_plugin"]

PLUGIN = "ndlora_plugins.integrations.axolotl.NdLoraPlugin"


def activate() -> None:
    """Look at every configuration. Idempotent."""
    look_before_validation(_look)


def _look(cfg: Any) -> None:
    if cfg.get("adapter") == "ndlora":
        bring_in_plugin(cfg)
    elif cfg.get("ndlora"):
        from ndlora_plugins.errors import NdLoraValueError

        raise NdLoraValueError(
            f"The block `ndlora:` says nothing with adapter: {cfg.get('adapter')}. Write `adapter: "
            f"ndlora`, or take the block out."
        )


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
