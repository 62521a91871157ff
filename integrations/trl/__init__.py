"""TRL and transformers' Trainer. Names are imported when first used; only `sft` needs trl itself."""

from importlib import import_module

_PUBLIC = {
    "NdLoraArguments": "sft",
    "NdLoraCallback": "callback",
    "keep_model_card": "card",
    "sync_as_lora": "vllm_sync",
}
__all__ = ["NdLoraArguments", "NdLoraCallback", "keep_model_card", "sync_as_lora"]


def __getattr__(name: str):
    if name not in _PUBLIC:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_PUBLIC[name]}"), name)
