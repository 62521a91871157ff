"""Adapters with fewer parameters than LoRA, for PEFT, TRL and Axolotl, switched on by configuration alone.

Importing this package makes the tuner type NDLORA known to PEFT (when PEFT is imported, now or later). Nothing
heavy is imported until a name below is used.
"""

from importlib import import_module
from typing import Any

from ndlora_autoload import install

__version__ = "0.2.0"

_PUBLIC = {
    "NdLoraConfig": "ndlora_plugins.integrations.peft",
    "NdLoraModel": "ndlora_plugins.integrations.peft",
    "hookimpl": "ndlora_plugins.hookspecs",
    "hotswap_adapter": "ndlora_plugins.integrations.peft.hotswap",
    "measure_gradients": "ndlora_plugins.integrations.peft",
    "register_plugin": "ndlora_plugins.registry",
    "unregister_plugin": "ndlora_plugins.registry",
}
__all__ = list(_PUBLIC)


def __getattr__(name: str) -> Any:
    if name in _PUBLIC:
        return getattr(import_module(_PUBLIC[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *_PUBLIC})


install()
