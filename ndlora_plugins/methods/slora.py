"""SLoRA: dW = up @ core @ down, a small square matrix between LoRA's two.

Source: arXiv 2502.14482; https://github.com/TracyGuo2001/NLoRA (`peft/src/peft/tuners/lora/layer.py`, where
down is A, core is N and up is B).
"""

from ndlora_plugins.methods.base import Method
from ndlora_plugins.structures import Chain

__all__ = ["slora"]

slora = Method(
    name="slora",
    summary="LoRA with a trained rank x rank matrix between down and up",
    source="arXiv 2502.14482",
    structure=Chain,
    factors=("down", "core", "up"),
    start="s_lora",
)
