"""What a method is: a record that names a structure, a start, and what of it trains."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from typing import Any

from torch import Tensor

from ndlora_plugins.errors import NdLoraValueError
from ndlora_plugins.structures.base import Factor, Factors, Layout, Structure

__all__ = ["Method", "Moment", "NoOptions", "make_options"]


@dataclass(frozen=True)
class NoOptions:
    """Of a method that has none."""


@dataclass(frozen=True)
class Moment:
    """One training step, the same in every layer and in what gradient checkpointing runs again.

    Attributes:
        step: of the optimiser, from 0.
        seed: of the adapter.
    """

    step: int
    seed: int = 0

    def draw(self, high: int) -> int:
        """A number from 0 up to below `high`; the same for the same step and seed, on every machine."""
        digest = hashlib.blake2b(f"{self.seed} {self.step}".encode(), digest_size=8).digest()
        return int.from_bytes(digest, "little") % high


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
        visible: (structure, factors, moment) -> the structure and factors that a forward in training uses, such as
            `structure.cut(k)` and `structure.cut_factors(factors, k)`. It may be given some of the factors only.
        shared: (factor, layer's name, layout) -> the key of the tensor that all layers with this key share, or None
            for a tensor of the layer's own.
        penalty: (structure, trained factors) -> a scalar that is added to the loss in training.
        shrink: (structure, trained factors, step size) -> changes the factors in place after an optimiser step: a
            proximal step.
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
    visible: Callable[[Structure, Factors, Moment], tuple[Structure, Factors]] | None = None
    shared: Callable[[Factor, str, Layout], str | None] | None = None
    penalty: Callable[[Structure, Factors], Tensor] | None = None
    shrink: Callable[[Structure, Factors, float], None] | None = None

    @property
    def asks_for_steps(self) -> bool:
        """Whether a training is more to it than its factors."""
        return any(asked is not None for asked in (self.visible, self.penalty, self.shrink))

    def factor_names(self, options: Any) -> tuple[str, ...]:
        """Those that every layout has with these options."""
        return self.factors(options) if callable(self.factors) else self.factors

    def trained_names(self, options: Any) -> tuple[str, ...] | None:
        """Of the factors that train; None for all."""
        return self.trains(options) if callable(self.trains) else self.trains


def make_options(method: Method, given: Mapping[str, Any]) -> Any:
    """The method's options, checked.

    Raises:
        NdLoraValueError: one that the method does not have, or a value that cannot work.
    """
    if not isinstance(given, Mapping):
        raise NdLoraValueError(
            f"options={given!r}: give a mapping of the method's own options, such as {{'size': 4}}."
        )
    known = [field.name for field in fields(method.Options)]
    for name in given:
        if name not in known:
            has = f"has {', '.join(map(repr, known))}" if known else "has none"
            raise NdLoraValueError(
                f"options={{{name!r}: ...}}: method={method.name!r} has no such option; it {has}."
            )
    try:
        return method.Options(**given)
    except (
        TypeError
    ) as error:  # one that has no default is missing, or of a type that the check did not think of
        raise NdLoraValueError(f"options={dict(given)!r} of method={method.name!r}: {error}.") from error
