"""The two hooks by which methods and initialisers come in, ours as anybody's (entry-point group "ndlora")."""

from __future__ import annotations

from collections.abc import Iterable

import pluggy

from ndlora_plugins.initializers import Initializer
from ndlora_plugins.methods.base import Method

__all__ = ["hookimpl", "hookspec"]

hookspec = pluggy.HookspecMarker("ndlora")
hookimpl = pluggy.HookimplMarker("ndlora")


@hookspec
def ndlora_methods() -> Iterable[Method]:
    """Methods that `NdLoraConfig(method=...)` shall know."""


@hookspec
def ndlora_initializers() -> Iterable[Initializer]:
    """Initialisers that `NdLoraConfig(init_lora_weights=...)` shall know."""
