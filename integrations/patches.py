"""Functions of hosts that one of ours stands before: how they are wrapped, once each."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any

__all__ = ["stand_before"]

_MARK = "stands_before_a_hosts"


def stand_before(owner: Any, name: str, make: Callable[[Callable[..., Any]], Callable[..., Any]]) -> None:
    """Put a function of ours in the place of a host's. Where one stands already, nothing is changed.

    Args:
        owner: the host's module or class.
        name: of its function, method or static method.
        make: the host's function -> ours, which calls it.
    """
    original = inspect.getattr_static(owner, name)
    function = getattr(original, "__func__", original)  # of a static method
    if hasattr(function, _MARK):
        return
    ours = functools.wraps(function)(make(function))
    setattr(ours, _MARK, True)
    setattr(owner, name, staticmethod(ours) if isinstance(original, staticmethod) else ours)
