"""What a start is: it gives every factor its first value, from nothing, a generator, or what it may read."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Generator, Tensor

from ndlora_plugins.structures.base import Factor, Layout, Structure

__all__ = [
    "RECIPE_ALPHA",
    "Seen",
    "Start",
    "Values",
    "down_gain",
    "kaiming_uniform",
    "random_but_zero",
    "random_values",
]

Values = dict[str, Tensor]

RECIPE_ALPHA = (
    16  # what LoRA recipes have with r=8; starts that are scaled for it take it in place of alpha = rank
)


@dataclass(frozen=True)
class Seen:
    """Everything that a start may read; None unless its `reads` names it.

    Attributes:
        weight: (out_features, in_features) of the base layer, dequantised.
        gradient: (out_features, in_features), of the loss by that weight, the mean of the batches that were measured.
        shared: factors that other layers share with this one and that have their value already, by name.
        seed: of the adapter; what frozen factors are drawn from with `draw`, so that a file need not hold them.
        layer: the layer's name.
        keys: factor -> the key under which layers share it.
    """

    weight: Tensor | Any = None  # Any: a start need not ask whether what it `reads` is there
    gradient: Tensor | Any = None
    shared: Mapping[str, Tensor] = field(default_factory=dict)
    seed: int = 0
    layer: str = ""
    keys: Mapping[str, str] = field(default_factory=dict)

    def draw(self, factor: str) -> Generator:
        """A CPU generator for this factor of this layer, or of all layers that share it, whatever was drawn before."""
        owner = self.keys.get(factor) or f"{self.layer} {factor}"
        digest = hashlib.blake2b(f"{self.seed} {owner}".encode(), digest_size=8).digest()
        return torch.Generator().manual_seed(int.from_bytes(digest, "little") % 2**63)


@dataclass(frozen=True, kw_only=True)
class Start:
    """A named start. Hand an instance to the hook `ndlora_starts`.

    Attributes:
        name: what `init_lora_weights` is set to.
        summary: one line for `ndlora methods`.
        source: paper, or reference file.
        function: (structure, names of the factors that train, seen, generator) -> a value for every factor, of its
            shape, float32 or the weight's dtype.
        gives: names of factors that a method must have: it fits every method that has them. Empty: any.
        zero: names of factors that it leaves at zero, or a function of the method's factors and of those that train.
        reads: of `Seen`: "weight", "gradient", "seed" (by `Seen.draw`, in place of the generator).
        recomputable: whether the same weight gives the same values on every machine. Frozen factors that come from
            the weight or the seed alone are then made again when an adapter is loaded; else they are saved.
        moves: that it is meant to move the model, so that nothing is subtracted by default.
        max_rank: the largest rank that a structure allows, or None for any.
        alpha: the alpha that it is made for; None for the rank.
        implies: the method that this start alone stands for; None for the default one.
    """

    name: str
    summary: str
    source: str
    function: Callable[[Any, frozenset[str], Seen, Generator | None], Values]  # Any: one kind of Structure
    gives: tuple[str, ...] = ()
    zero: tuple[str, ...] | Callable[[tuple[str, ...], frozenset[str]], Sequence[str]] = ()
    reads: frozenset[str] = frozenset()
    recomputable: bool = True
    moves: bool = False
    max_rank: Callable[[Any], int] | None = None
    alpha: float | None = None
    implies: str | None = None

    def recomputes(self, shared: bool) -> bool:
        """Tell whether frozen factors can be made again at load, of a method that shares factors or not."""
        known = {"seed"} if shared else {"seed", "weight"}
        return self.recomputable and bool(self.reads) and self.reads <= known

    def zero_factors(self, names: tuple[str, ...], trains: frozenset[str]) -> frozenset[str]:
        """The factors that it leaves at zero, for a method with these names of which some train."""
        return frozenset(self.zero(names, trains) if callable(self.zero) else self.zero)


def kaiming_uniform(factor: Factor, generator: Generator | None = None) -> Tensor:
    """U(+-1/sqrt(fan_in)): torch's `kaiming_uniform_(a=sqrt(5))`, the start of every `nn.Linear`; float32.

    A factor of integers gets as many different ones as it holds, in rising order.
    """
    if factor.indices is not None:
        return (
            torch.randperm(factor.indices, generator=generator)[: factor.numel]
            .sort()
            .values.view(factor.shape)
        )
    bound = 1 / math.sqrt(factor.fan_in)
    return torch.empty(factor.shape, dtype=torch.float32).uniform_(-bound, bound, generator=generator)


def down_gain(layout: Layout) -> float:
    """What to multiply a Kaiming-uniform `down` by, so that the first step of an `up` of zeros is LoRA's.

    1, for that is LoRA's own start, but for an embedding: PEFT's LoRA has there a down of zeros and an up from N(0, 1),
    and Adam's first step moves the output by alpha * c along its gradient, with c = sqrt(2 / pi); an up of zeros moves
    it by alpha * c * c * sqrt(out_features / 3). See `modes.first_step_gain`.
    """
    return math.sqrt(3 * math.pi / (2 * layout.out_features)) if layout.one_hot else 1.0


def random_values(
    structure: Structure, trains: frozenset[str], seen: Seen, generator: Generator | None
) -> Values:
    """Every factor Kaiming-uniform."""
    return {factor.name: kaiming_uniform(factor, generator) for factor in structure.factors}


def random_but_zero(zero: str | None = None) -> Callable[..., Values]:
    """A start's function: one factor zero, by default the first that trains, the others Kaiming-uniform."""

    def function(
        structure: Structure, trains: frozenset[str], seen: Seen, generator: Generator | None
    ) -> Values:
        values = random_values(structure, trains, seen, generator)
        name = zero or next(factor.name for factor in structure.factors if factor.name in trains)
        return values | {name: torch.zeros_like(values[name])}

    return function
