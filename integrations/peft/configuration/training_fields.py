"""What a configuration says of the training alone: schedules, and batches that a start measures gradients on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Annotated, Any, cast

from .validation import Check

if TYPE_CHECKING:
    from ndlora_plugins.methods import Method
    from ndlora_plugins.schedules.base import Chosen

__all__ = ["TrainingFields", "as_schedules"]

Batches = Annotated[int, Check("choose an integer of at least 1, such as 8.", lambda value: value >= 1)]
Schedules = Annotated[
    dict[str, dict[str, Any] | None] | list[str] | str,
    Check("give a schedule's name, a list of names, or {'nested_rank': {...}}, a dict of names to options."),
]


@dataclass(kw_only=True)
class TrainingFields:
    """Fields of `NdLoraConfig`."""

    schedules: Schedules | None = field(
        default=None,
        metadata={
            "help": "What happens in training beside the loss: {'nested_rank': {'least': 2}}, or a name, or a list of "
            "them; docs/schedules.md. Default: the method's own, if it has any; {} for none."
        },
    )
    gradient_batches: Batches | None = field(
        default=None,
        metadata={
            "help": "For starts that read gradients: NdLoraCallback measures them before the first step, on so many "
            "batches of the trainer's own data."
        },
    )

    def settle_schedules(self, method: Method, loaded: bool) -> None:
        """Fill in the method's own schedules, and check them unless they were read from a file."""
        from ndlora_plugins.schedules.choose import chosen_schedules

        if self.schedules is None and method.schedules:
            self.schedules = list(method.schedules)
        if self.schedules is not None:
            self.schedules = schedules = as_schedules(self.schedules)
            if not loaded:  # what uses an adapter needs no plugin that trained it
                chosen_schedules(schedules)

    def chosen_schedules(self) -> tuple[Chosen, ...]:
        """The schedules with their options; none of an adapter that does not train."""
        from ndlora_plugins.schedules.choose import chosen_schedules

        return () if cast(Any, self).inference_mode else chosen_schedules(as_schedules(self.schedules or {}))


def as_schedules(given: Mapping | Sequence[str] | str) -> dict[str, dict[str, Any] | None]:
    """Schedules in any of the ways to write them, as names to options."""
    if isinstance(given, Mapping):
        return {name: dict(options or {}) for name, options in given.items()}
    return {name: {} for name in ([given] if isinstance(given, str) else given)}
