"""IntTune: NLoRA whose core alone trains; down and up stay slices of the base weight and are never saved.

Source: arXiv 2502.14482; https://github.com/TracyGuo2001/NLoRA (`inttune.py`).
"""

from dataclasses import replace

from ndlora_plugins.methods.nlora import nlora

__all__ = ["inttune"]

inttune = replace(
    nlora,
    name="inttune",
    summary="NLoRA with down and up frozen: rank x rank numbers a layer",
    trains=("core",),
)
