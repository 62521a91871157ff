"""The hooks by which methods, starts and schedules come in, ours as anybody's (entry-point group "ndlora")."""

from __future__ import annotations

from collections.abc import Iterable

import pluggy

from ndlora_plugins.methods.base import Method
from ndlora_plugins.schedules.base import Schedule
from ndlora_plugins.starts.base import Start

__all__ = ["hookimpl", "hookspec"]

hookspec = pluggy.HookspecMarker("ndlora")
hookimpl = pluggy.HookimplMarker("ndlora")


@hookspec
def ndlora_methods() -> Iterable[Method]:
    """Methods that `NdLoraConfig(method=...)` shall know."""
    ...


@hookspec
def ndlora_starts() -> Iterable[Start]:
    """Starts that `NdLoraConfig(init_lora_weights=...)` shall know."""
    ...


@hookspec
def ndlora_schedules() -> Iterable[Schedule]:
    """Schedules that `NdLoraConfig(schedules=...)` and `NdLoraCallback(schedules=...)` shall know."""
    ...
