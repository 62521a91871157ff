"""IntTune: NLoRA whose core alone trains; down and up stay slices of the base weight and are never saved.

Source: arXiv 2502.14482; https://github.com/TracyGuo2001/NLoRA (`inttune.py`).
"""

from dataclasses import replace

from ndlora_plugins.methods.nlora import NLora

__all__ = ["IntTune"]


class IntTune(NLora):
    """SLoRA's factors, `core` the only one that is trained."""

    name = "inttune"
    summary = "NLoRA with down and up frozen: rank x rank numbers a layer"
    default_initializer = "n_lora_step"

    def factors(self, layout):
        return tuple(replace(factor, trainable=factor.name == "core") for factor in super().factors(layout))

    def start_factors(self, layout):
        return ("down", "up")

    def anchored(self, layout, start, change):
        # B0 (N0 + dN) A0 - B0 N0 A0 = B0 dN A0
        return {"down": start["down"], "core": change["core"], "up": start["up"]}

    def anchored_product(self, layout, start, change):
        return self.product(layout, self.anchored(layout, start, change))

    def anchored_layout(self, layout):
        return layout
