"""PEFT: the tuner type NDLORA. Names are imported when first used, so that registration stays light."""

from importlib import import_module

_PUBLIC = {
    "NdLoraConfig": "config",
    "NdLoraLayer": "layer",
    "NdLoraLinear": "layer",
    "NdLoraModel": "model",
}
__all__ = ["NdLoraConfig", "NdLoraLayer", "NdLoraLinear", "NdLoraModel"]


def __getattr__(name: str):
    if name not in _PUBLIC:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from ndlora_plugins.integrations.peft import registration

    registration.activate()
    return getattr(import_module(f"{__name__}.{_PUBLIC[name]}"), name)
