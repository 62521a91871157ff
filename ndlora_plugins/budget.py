"""The budget: what an adapter costs, layer by layer, before anything is trained."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from ndlora_plugins.adapter import LayerAdapter
from ndlora_plugins.errors import NdLoraValueError
from ndlora_plugins.structures.base import LOPSIDED_RATIO, Factor

__all__ = ["Budget", "BudgetRow", "check_size", "make_budget"]

# an adapter larger than both is a mistake: so many times its layer's weight, and so many numbers
_LARGEST_RATIO = 16
_ALWAYS_ALLOWED = 2**20


@dataclass(frozen=True)
class BudgetRow:
    """Layers that cost the same: the same last name, shape and plan.

    Attributes:
        layer: their common last name, such as "q_proj".
        count: how many there are.
        lora_parameters: of plain LoRA at the budget's `lora_rank`, one layer; its multiply-adds for one token
            are as many.
    """

    layer: str
    count: int
    adapter: LayerAdapter
    lora_parameters: int

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
            shared |= row.adapter.shared_sizes(factors)
            own += row.count * row.adapter.count_own(factors)
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
        header = (
            "layer",
            "count",
            "out x in",
            "modes (out x in)",
            "parameters",
            f"LoRA r={self.lora_rank}",
            "multiply-adds a token",
            f"LoRA r={self.lora_rank}'s",
            "note",
        )
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
    groups: dict[tuple, int] = {}
    for name, adapter in layers:
        key = (name.rpartition(".")[2], adapter)
        groups[key] = groups.get(key, 0) + 1
    rows = []
    for (name, adapter), count in groups.items():
        features = adapter.layout.in_features + adapter.layout.out_features
        rows.append(BudgetRow(name, count, adapter, lora_rank * features))
    return Budget(tuple(rows), lora_rank)


def check_size(adapter: LayerAdapter, layer: str) -> None:
    """Refuse an adapter that is many times as large as its layer's weight, before memory runs out.

    Args:
        layer: its name, for the message.

    Raises:
        NdLoraValueError: it holds more than 2**20 numbers and more than 16 times those of the weight.
    """
    numbers = adapter.num_parameters + adapter.count_own(adapter.frozen)
    layout = adapter.layout
    weight = layout.in_features * layout.out_features
    if numbers > max(_ALWAYS_ALLOWED, _LARGEST_RATIO * weight):
        raise NdLoraValueError(
            f"r={layout.rank} makes an adapter of {numbers:,} numbers on layer {layer!r}, {numbers // weight:,} times "
            f"its weight of {layout.out_features} x {layout.in_features} (out x in); at most {_LARGEST_RATIO} times "
            f"is allowed. Lower r, or give this layer a smaller one in rank_pattern."
        )
