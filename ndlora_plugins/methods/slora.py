"""SLoRA: dW = up @ core @ down, a small square matrix between LoRA's two.

Source: arXiv 2502.14482; https://github.com/TracyGuo2001/NLoRA (`peft/src/peft/tuners/lora/layer.py`, where
down is A, core is N and up is B).
"""

from __future__ import annotations

from dataclasses import replace

import torch

from ndlora_plugins.low_rank import AnchoredCoreProduct, CoreProduct
from ndlora_plugins.methods.base import Factor, Method

__all__ = ["SLora"]


class SLora(Method):
    """Factors `down` (rank, in_features), `core` (rank, rank) and `up` (out_features, rank)."""

    name = "slora"
    summary = "LoRA with a trained rank x rank matrix between down and up"
    source = "arXiv 2502.14482"
    default_rank = 8
    default_initializer = "s_lora"

    def factors(self, layout):
        return (
            Factor(
                "down", (layout.rank, layout.in_features), fan_in=1 if layout.one_hot else layout.in_features
            ),
            Factor("core", (layout.rank, layout.rank), fan_in=layout.rank),
            Factor("up", (layout.out_features, layout.rank), fan_in=layout.rank),
        )

    def apply(self, layout, factors, x):
        product, tensors = self.product(layout, factors)
        return product.plain(x, tensors)

    def product(self, layout, factors):
        return CoreProduct(layout.in_features, layout.out_features), _in_order(factors)

    def anchored_product(self, layout, start, change):
        tensors = _in_order(change) + _in_order(start)
        return AnchoredCoreProduct(layout.in_features, layout.out_features), tensors

    def delta(self, layout, factors):
        return factors["up"] @ (factors["core"] @ factors["down"])

    def low_rank(self, layout, factors):
        return factors["core"] @ factors["down"], factors["up"]

    def anchored(self, layout, start, change):
        # with A = A0 + dA, ..: B N A - B0 N0 A0 = dB N A + B0 (dN A + N0 dA)
        #                                       = [dB, B0] [[N, 0], [dN, N0]] [A; dA]
        down, core = start["down"] + change["down"], start["core"] + change["core"]
        return {
            "down": torch.cat([down, change["down"]]),
            "core": torch.cat(
                [
                    torch.cat([core, torch.zeros_like(core)], dim=1),
                    torch.cat([change["core"], start["core"]], dim=1),
                ]
            ),
            "up": torch.cat([change["up"], start["up"]], dim=1),
        }

    def anchored_layout(self, layout):
        return replace(layout, rank=2 * layout.rank)

    def multiply_adds(self, layout):
        return layout.rank * (layout.in_features + layout.rank + layout.out_features)


def _in_order(factors):
    return factors["down"], factors["core"], factors["up"]
