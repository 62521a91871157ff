"""The methods, the starts and the schedules, as `ndlora methods` shows them."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import MISSING, fields
from typing import Any

from ndlora_plugins.errors import NdLoraValueError
from ndlora_plugins.options import adapter_options
from ndlora_plugins.registry import fits, methods, schedules, starts

__all__ = ["describe_methods", "describe_schedules", "describe_starts"]


def describe_methods() -> list[dict[str, Any]]:
    """One row for each method."""
    return [
        {
            "method": name,
            "default r": found.value.rank,
            "start": found.value.start,
            "options": _options(found.value.Options),
            "what it is": found.value.summary,
            "source": found.value.source,
            "plugin": found.plugin,
        }
        for name, found in methods().items()
    ]


def describe_schedules() -> list[dict[str, Any]]:
    """One row for each schedule."""
    return [
        {
            "schedule": name,
            "options": _options(found.value.Options),
            "what it does": found.value.summary,
            "source": found.value.source,
            "plugin": found.plugin,
        }
        for name, found in schedules().items()
    ]


def _options(options: type) -> list[str]:
    return [f"{each.name}={'?' if each.default is MISSING else each.default}" for each in fields(options)]


def describe_starts() -> list[dict[str, Any]]:
    """One row for each start."""
    rows = []
    for name, found in starts().items():
        fitting = [method for method in methods() if fits(method, name)]
        rows.append(
            {
                "init_lora_weights": name,
                "methods": fitting,
                "reads": sorted(found.value.reads),
                "default alpha": found.value.alpha or "r",
                "default anchor": _default_anchors(fitting, name),
                "what it is": found.value.summary,
                "source": found.value.source,
                "plugin": found.plugin,
            }
        )
    return rows


def _default_anchors(fitting: list[str], start: str) -> list[str]:
    """With the methods that need no options."""
    anchors = set()
    for method in fitting:
        with suppress(NdLoraValueError):  # an option that has no default is missing
            anchors.add(adapter_options(method, start).anchor)
    return sorted(anchors)
