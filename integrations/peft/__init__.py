"""PEFT: the tuner type NDLORA. Names are imported when first used, so that registration stays light."""

from importlib import import_module

# Completes PEFT, and with it our registration, before a module of ours is entered: it would otherwise be
# registration that imports that module, half-way through.
import peft as _peft  # noqa: F401

_PUBLIC = {
    "NdLoraConfig": "configuration.config",
    "NdLoraLayer": "layers.layer",
    "NdLoraLinear": "layers.kinds",
    "NdLoraModel": "tuner.model",
    "measure_gradients": "measure",
    "plan_model": "tuner.targets",
}
__all__ = ["NdLoraConfig", "NdLoraLayer", "NdLoraLinear", "NdLoraModel", "measure_gradients", "plan_model"]


def __getattr__(name: str):
    if name not in _PUBLIC:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_PUBLIC[name]}"), name)
