"""Schedules as a configuration names them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ndlora_plugins.errors import NdLoraValueError
from ndlora_plugins.methods.options import make_options
from ndlora_plugins.registry import look_up, schedules
from ndlora_plugins.schedules.base import Chosen

__all__ = ["chosen_schedules"]


def chosen_schedules(given: Mapping[str, Mapping[str, Any] | None]) -> tuple[Chosen, ...]:
    """Schedules with their options, checked.

    Args:
        given: name -> its options; None for none.

    Raises:
        NdLoraValueError: an unknown name or option, or two that both choose the ranks of a step.
    """
    chosen = []
    for name, options in given.items():
        schedule = look_up(schedules(), name, "schedules", "schedule")
        try:
            chosen.append(Chosen(schedule, make_options(schedule, options or {}, "schedule")))
        except NdLoraValueError as error:
            raise NdLoraValueError(f"schedules={{{name!r}: ...}}: {error}") from error
    masks = [each.schedule.name for each in chosen if each.schedule.ranks is not None]
    if len(masks) > 1:
        raise NdLoraValueError(f"schedules={masks}: each says which ranks a step sees. Choose one of them.")
    return tuple(chosen)
