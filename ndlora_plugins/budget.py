"""The budget: what an adapter costs, layer by layer, before anything is trained."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace

from ndlora_plugins.adapter import LayerAdapter
from ndlora_plugins.errors import NdLoraValueError
from ndlora_plugins.structures.base import LOPSIDED_RATIO, Factor

__all__ = ["Budget", "BudgetRow", "check_size", "make_budget"]

# an adapter larger than both is a mistake: so many times its layer's weight, and so many numbers, own or shared
_LARGEST_RATIO = 16
_ALWAYS_ALLOWED = 2**20
_ALWAYS_SHARED = 2**30


@dataclass(frozen=True)
class BudgetRow:
    """Layers that cost the same: the same last name, shape and plan.

    Attributes:
        layer: their common last name, such as "q_proj".
        adapters: of each; they differ at most in what they share with which layers.
        lora_rank: of the plain LoRA to compare with.
    """

    layer: str
    adapters: tuple[LayerAdapter, ...]
    lora_rank: int

    @property
    def count(self) -> int:
        """How many there are."""
        return len(self.adapters)

    @property
    def adapter(self) -> LayerAdapter:
        """One of them."""
        return self.adapters[0]

    @property
    def lora_parameters(self) -> int:
        """Numbers of plain LoRA, one layer; its multiply-adds for one token are as many. Each expert has a LoRA."""
        layout = self.adapter.layout
        return self.lora_rank * (layout.in_features * math.prod(layout.leading) + layout.out_features)

    @property
    def shape(self) -> str:
        """out x in."""
        return f"{self.adapter.layout.out_features} x {self.adapter.layout.in_features}"

    @property
    def modes(self) -> str:
        """One pair (out x in) for each factor, or "-" for structures without modes."""
        sides = self.adapter.structure.mode_sizes.values()
        return ", ".join(f"{o}x{i}" for i, o in zip(*sides, strict=True)) if sides else "-"

    @property
    def note(self) -> str:
        """A remark where the modes are lopsided, else nothing."""
        ratio = self.adapter.structure.lopsidedness
        return f"lopsided: {ratio:.1f}x the parameters of even modes" if ratio > LOPSIDED_RATIO else ""


@dataclass(frozen=True)
class Budget:
    """All rows; the totals count every layer."""

    rows: tuple[BudgetRow, ...]
    lora_rank: int

    @property
    def layers(self) -> int:
        """Adapted layers."""
        return sum(row.count for row in self.rows)

    def _numbers(self, factors_of: Callable[[LayerAdapter], tuple[Factor, ...]]) -> int:
        """Numbers in these factors of all layers; a tensor that layers share counts once."""
        shared: dict[str, int] = {}
        own = 0
        for row in self.rows:
            factors = factors_of(row.adapter)
            own += row.count * row.adapter.count_own(factors)
            for adapter in row.adapters:
                shared |= adapter.shared_sizes(factors)
        return own + sum(shared.values())

    @property
    def parameters(self) -> int:
        """Trainable numbers of the model."""
        return self._numbers(lambda adapter: adapter.trained)

    @property
    def saved(self) -> int:
        """Numbers in the adapter file."""
        return self.parameters + self._numbers(lambda adapter: adapter.frozen_in_file)

    @property
    def frozen(self) -> int:
        """Frozen numbers held beside the trainable ones."""
        return self._numbers(lambda adapter: adapter.frozen)

    @property
    def multiply_adds(self) -> int:
        """Multiply-adds of all updates for one token."""
        return sum(row.count * row.adapter.multiply_adds for row in self.rows)

    @property
    def lora_parameters(self) -> int:
        """Numbers of plain LoRA on the same layers."""
        return sum(row.count * row.lora_parameters for row in self.rows)

    @property
    def summary(self) -> str:
        """One sentence on the totals."""
        ratio = self.lora_parameters / self.parameters
        comparison = f"{ratio:.2f}x fewer" if ratio >= 1 else f"{1 / ratio:.2f}x more"
        return (
            f"{self.parameters:,} trainable parameters, {comparison} than LoRA r={self.lora_rank}; {self.saved:,} "
            f"numbers in the adapter file; {self.frozen:,} frozen numbers held beside them."
        )

    def table(self) -> tuple[Sequence[str], list[Sequence[str]]]:
        """Header and rows as text, the totals last: for any printer of tables."""
        theirs = f"LoRA r={self.lora_rank}"
        header = ("layer", "count", "out x in", "modes (out x in)", "parameters", theirs)
        header += ("multiply-adds a token", f"{theirs}'s", "note")
        rows: list[Sequence[str]] = []
        for row in self.rows:
            adapter, lora = row.adapter, row.lora_parameters
            own = (adapter.num_parameters, lora, adapter.multiply_adds, lora)
            texts = [f"{row.count * number:,}" for number in own]
            rows.append((row.layer, str(row.count), row.shape, row.modes, *texts, row.note))
        totals = (self.parameters, self.lora_parameters, self.multiply_adds, self.lora_parameters)
        rows.append(("total", str(self.layers), "", "", *(f"{number:,}" for number in totals), ""))
        return header, rows


def make_budget(layers: Iterable[tuple[str, LayerAdapter]], lora_rank: int = 8) -> Budget:
    """Collect planned layers, given as (full name, plan), into a budget. Equal layers share a row."""
    groups: dict[tuple, list[LayerAdapter]] = {}
    for name, adapter in layers:
        shared = tuple((factor, "") for factor, _ in adapter.shared)  # under whatever key
        key = (name.rpartition(".")[2], replace(adapter, shared=shared))
        groups.setdefault(key, []).append(adapter)
    rows = (BudgetRow(name, tuple(adapters), lora_rank) for (name, _), adapters in groups.items())
    return Budget(tuple(rows), lora_rank)


def check_size(adapter: LayerAdapter, layer: str) -> None:
    """Refuse an adapter that is many times as large as its layer's weight, before memory runs out.

    Args:
        layer: its name, for the message.

    Raises:
        NdLoraValueError: it holds more than 2**20 numbers of its own and more than 16 times those of the weight; or
            shares, with all layers, more than 2**30 and 16 times those of a weight as wide as the widest of them.
    """
    layout, held = adapter.layout, adapter.trained + adapter.frozen
    own, widest = (layout.in_features, layout.out_features), layout.largest or (0, 0)
    for what, numbers, allowed, whose, (ins, outs) in (
        ("an adapter", adapter.count_own(held), _ALWAYS_ALLOWED, "its", own),
        ("shared factors", sum(adapter.shared_sizes(held).values()), _ALWAYS_SHARED, "the widest", widest),
    ):
        if numbers > max(allowed, _LARGEST_RATIO * ins * outs):
            raise NdLoraValueError(
                f"r={layout.rank} makes {what} of {numbers:,} numbers on layer {layer!r}, {numbers // (ins * outs):,} "
                f"times {whose} weight of {outs} x {ins} (out x in); at most {_LARGEST_RATIO} times is allowed. Lower "
                f"r, or give this layer a smaller one in rank_pattern."
            )
