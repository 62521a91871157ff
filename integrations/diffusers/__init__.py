"""NDLORA in diffusers: adapters of a pipeline's components, saved, loaded and handed to stock pipelines as LoRA.

`pipe.unet.add_adapter(NdLoraConfig(...))` needs nothing of this; diffusers has no file for what is not LoRA, so:

    save_adapter(pipe.unet, "my-adapter")
    load_adapter(pipe.unet, "my-adapter")
    export_lora({"unet": "my-adapter"}, "plain-lora")  # pipe.load_lora_weights("plain-lora") needs no ndlora_plugins
"""

from .files import load_adapter, save_adapter
from .stock import LORA_FILE, export_lora

__all__ = ["LORA_FILE", "export_lora", "load_adapter", "save_adapter"]
