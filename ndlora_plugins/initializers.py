"""Where factors start. An initialiser gives every factor its value, from nothing, a generator, or the weight."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Generator, Tensor

from ndlora_plugins.methods.base import Factor, Layout, Method

__all__ = ["Initializer", "builtin_initializers", "kaiming_uniform"]

Values = dict[str, Tensor]


@dataclass(frozen=True)
class Initializer:
    """A named start.

    Attributes:
        name: what `init_lora_weights` is set to.
        summary: one line for `ndlora methods`.
        source: paper, or reference file.
        methods: names of the methods it can start, all if empty; the first follows from the name alone.
        reads_weight: whether it needs the base weight. Frozen factors are then recomputed at load, not saved.
        starts_at_zero: whether dW is zero at the start, so that no anchor is needed.
        refuses: method -> why this start cannot work for it, for the error message.
        function: (method, layout, weight, generator) -> a value for every factor, float32 (or the weight's
            dtype). `weight` is (out_features, in_features), or None unless `reads_weight`.
        max_rank: the largest rank that a layout allows, or None for any.
    """

    name: str
    summary: str
    source: str
    methods: tuple[str, ...]
    reads_weight: bool
    starts_at_zero: bool
    function: Callable[[Method, Layout, Tensor | None, Generator | None], Values]
    refuses: Mapping[str, str] = field(default_factory=dict, hash=False)
    max_rank: Callable[[Layout], int] | None = None


def kaiming_uniform(factor: Factor, generator: Generator | None = None) -> Tensor:
    """U(+-1/sqrt(fan_in)): torch's `kaiming_uniform_(a=sqrt(5))`, the start of every `nn.Linear`."""
    bound = 1 / math.sqrt(factor.fan_in)
    return torch.empty(factor.shape, dtype=torch.float32).uniform_(-bound, bound, generator=generator)


def _random(method: Method, layout: Layout, weight: Tensor | None, generator: Generator | None) -> Values:
    return {factor.name: kaiming_uniform(factor, generator) for factor in method.factors(layout)}


def _random_but_zero(zero: str):
    def start(method: Method, layout: Layout, weight: Tensor | None, generator: Generator | None) -> Values:
        values = _random(method, layout, weight, generator)
        return {name: torch.zeros_like(value) if name == zero else value for name, value in values.items()}

    return start


def _n_lora(method: Method, layout: Layout, weight: Tensor | None, generator: Generator | None) -> Values:
    rank = layout.rank
    return {
        "down": weight[:rank].clone(),
        "core": weight[:rank, :rank].clone(),
        "up": weight[:, :rank].clone(),
    }


builtin_initializers = (
    Initializer(
        "zero_mode",
        "the first mode zero, the others Kaiming-uniform: the model starts as it is",
        "LoRA's rule (arXiv 2106.09685, section 4.1) for Kronecker terms",
        ("ndlinear",),
        reads_weight=False,
        starts_at_zero=True,
        function=_random_but_zero("mode_1"),
    ),
    Initializer(
        "ndlinear",
        "every mode as nn.Linear starts, as the reference code does",
        "github.com/ensemble-core/NdLinear-LoRA",
        ("ndlinear",),
        reads_weight=False,
        starts_at_zero=False,
        function=_random,
    ),
    Initializer(
        "s_lora",
        "down and core Kaiming-uniform, up zero: the model starts as it is",
        "arXiv 2502.14482; github.com/TracyGuo2001/NLoRA",
        ("slora", "nlora"),
        reads_weight=False,
        starts_at_zero=True,
        function=_random_but_zero("up"),
        refuses={
            "inttune": "it starts `up` at zero and IntTune keeps `up` frozen, so the core would never get a gradient"
        },
    ),
    Initializer(
        "n_lora",
        "the first r rows, columns and their corner of the base weight, no SVD",
        "arXiv 2502.14482; github.com/TracyGuo2001/NLoRA",
        ("nlora", "slora", "inttune"),
        reads_weight=True,
        starts_at_zero=False,
        function=_n_lora,
        max_rank=lambda layout: min(layout.in_features, layout.out_features),
    ),
    Initializer(
        "random",
        "every factor Kaiming-uniform and no anchor: for tests (init_lora_weights=False)",
        "torch.nn.Linear",
        (),
        reads_weight=False,
        starts_at_zero=False,
        function=_random,
    ),
)
