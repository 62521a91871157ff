"""What the tables of commands share: a line for each kind of layer, not for each layer."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Sequence
from typing import TypeVar

__all__ = ["group_by", "kind_of", "spread"]

Row = TypeVar("Row")
Key = TypeVar("Key", bound=Hashable)


def group_by(rows: Iterable[Row], key: Callable[[Row], Key]) -> dict[Key, list[Row]]:
    """Rows of one key together, keys in the order in which they first come."""
    groups: dict[Key, list[Row]] = {}
    for row in rows:
        groups.setdefault(key(row), []).append(row)
    return groups


def kind_of(layer: str) -> str:
    """The last part of a layer's name: "q_proj" of "model.layers.0.self_attn.q_proj"."""
    return layer.rpartition(".")[2]


def spread(numbers: Sequence[float]) -> str:
    """The smallest to the largest, or one number where they look alike."""
    least, most = (f"{number:.3g}" for number in (min(numbers), max(numbers)))
    return least if least == most else f"{least} to {most}"
