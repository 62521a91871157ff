"""A trained core between two sides that come from the base weight, the first gradient or a seed, and stay.

Sources: LoRA-XS, arXiv 2405.17604 (MohammadrezaBanaei/LoRA-XS); LoRA-SB, arXiv 2411.19557 (RaghavSinghal10/lora-sb);
SVFit, arXiv 2409.05926; LoLDU (SKDDJ/LoLDU, minloldu/loldu.py); VeRA, arXiv 2310.11454, whose d is such a diagonal.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial

from ndlora_plugins.errors import NdLoraValueError
from ndlora_plugins.methods.base import Method
from ndlora_plugins.methods.options import check_choice, check_number
from ndlora_plugins.structures import Chain

__all__ = ["FirstStep", "loldu", "lora_sb", "lora_xs", "random_diagonal", "svfit"]


@dataclass(frozen=True)
class FirstStep:
    """The step of full fine-tuning that the adapter starts with.

    Attributes:
        first_step: its size for each weight, as a learning rate.
        sign: of the sign of the gradient, as Adam's first step; else of the gradient, scaled to the same norm.
    """

    first_step: float = 1e-4
    sign: bool = True

    def __post_init__(self) -> None:
        check_number("first_step", self.first_step)
        if self.first_step == 0:
            raise NdLoraValueError(f"first_step={self.first_step!r}: choose a number above 0, such as 1e-4.")
        check_choice("sign", self.sign, (True, False))


lora_xs = Method(
    name="lora_xs",
    summary="a trained rank x rank core between the largest singular vectors of the weight",
    source="arXiv 2405.17604",
    structure=Chain,
    factors=("down", "core", "up"),
    trains=("core",),
    start="svd_step",
    rank=32,
)
lora_sb = replace(
    lora_xs,
    name="lora_sb",
    summary="a trained core between the first gradient's singular vectors, started from a step of full fine-tuning",
    source="arXiv 2411.19557",
    start="lora_sb",
    Options=FirstStep,
)
svfit = replace(
    lora_xs,
    name="svfit",
    summary="a number for each of the largest singular values of the weight",
    source="arXiv 2409.05926",
    structure=partial(Chain, core="diagonal"),
    rank=64,
)
loldu = replace(
    svfit,
    name="loldu",
    summary="a number for each of the first pivots of the weight's LU decomposition",
    source="github.com/SKDDJ/LoLDU",
    start="lu",
)
random_diagonal = replace(
    svfit,
    name="random_diagonal",
    summary="a number for each of r random directions, which are made again from a seed",
    source="docs/evidence.md, after arXiv 2310.11454",
    start="random_sides",
)
