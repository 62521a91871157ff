"""Axolotl: `adapter: ndlora`. Names are imported when first used; they need `ndlora-plugins[axolotl]`."""

from importlib import import_module
from importlib.util import find_spec

_PUBLIC = {"NdLoraArgs": "args", "NdLoraPlugin": "plugin"}
__all__ = ["NdLoraArgs", "NdLoraPlugin"]


def __getattr__(name: str):
    if name not in _PUBLIC:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    if find_spec("axolotl") is None:
        from ndlora_plugins.errors import MissingExtraError

        raise MissingExtraError(
            f'{__name__}.{name} needs Axolotl, which is not installed: pip install "ndlora-plugins[axolotl]"'
        )
    return getattr(import_module(f"{__name__}.{_PUBLIC[name]}"), name)


def __dir__():
    return sorted({*globals(), *_PUBLIC})
