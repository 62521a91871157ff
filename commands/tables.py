"""What commands print: tables with a line for each kind of layer, not for each layer, and JSON."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Hashable, Iterable, Sequence
from typing import Any, TypeVar

from rich.console import Console

__all__ = ["group_by", "kind_of", "spread", "to_json", "wide_console"]

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


def wide_console() -> Console:
    """A console that does not fold a table at 80 columns where it is piped into a file."""
    return Console(width=None if Console().is_terminal else 160)


def to_json(found: Any) -> str:
    """What a command found; NaN and infinity, which JSON does not have, are null."""
    return json.dumps(_finite(found), indent=2, default=str)


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(each) for key, each in value.items()}
    if isinstance(value, (set, frozenset)):
        return sorted(value)
    if isinstance(value, (list, tuple)):
        return [_finite(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
