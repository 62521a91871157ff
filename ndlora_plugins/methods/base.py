"""What a method is: a record that names a structure, a start, and what of it trains."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from ndlora_plugins.methods.options import NoOptions
from ndlora_plugins.structures.base import Factor, Layout, Structure

__all__ = ["Method"]


@dataclass(frozen=True, kw_only=True)
class Method:
    """A family of updates dW. Hand an instance to the hook `ndlora_methods` (docs/development.md shows a whole one).

    Attributes:
        name: what `NdLoraConfig(method=...)` is set to.
        summary: one line for `ndlora methods`.
        source: paper, or reference file.
        structure: layout -> the form of dW on one layer; may raise `NdLoraValueError` for a layout that cannot work.
        factors: the names of the structure's factors that every layout has, or a function of the options.
        start: the name of its own start.
        trains: the names of the factors that train, or a function of the options; None for all. The others are
            given by the start and stay.
        rank: the default rank.
        Options: a frozen dataclass of the method's own options; its `__post_init__` checks them.
        shared: (factor, layer's name, layout) -> the key of the tensor that all layers with this key share, or None
            for a tensor of the layer's own.
        schedules: names of those that a training has where none are chosen.
    """

    name: str
    summary: str
    source: str
    structure: Callable[[Layout], Structure]
    factors: tuple[str, ...] | Callable[[Any], tuple[str, ...]]
    start: str
    trains: tuple[str, ...] | Callable[[Any], tuple[str, ...] | None] | None = None
    rank: int = 8
    Options: type = NoOptions
    shared: Callable[[Factor, str, Layout], str | None] | None = None
    schedules: tuple[str, ...] = ()

    def factor_names(self, options: Any) -> tuple[str, ...]:
        """The factors that every layout has with these options."""
        return self.factors(options) if callable(self.factors) else self.factors

    def trained_names(self, options: Any, names: Iterable[str] | None = None) -> frozenset[str]:
        """The trained ones of the factors `names`, by default of `factor_names`."""
        names = self.factor_names(options) if names is None else names
        trains = self.trains(options) if callable(self.trains) else self.trains
        return frozenset(name for name in names if trains is None or name in trains)
