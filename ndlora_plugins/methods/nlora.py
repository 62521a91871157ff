"""NLoRA: SLoRA started from slices of the base weight, in the style of Nystrom's approximation, without an SVD.

Source: arXiv 2502.14482; https://github.com/TracyGuo2001/NLoRA (`nlora_init`).
"""

from dataclasses import replace

from ndlora_plugins.methods.slora import slora

__all__ = ["nlora"]

nlora = replace(
    slora,
    name="nlora",
    summary="SLoRA started from rows and columns of the base weight, no SVD",
    start="n_lora_step",
)
