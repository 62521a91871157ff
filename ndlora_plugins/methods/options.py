"""The options of a record, a method or a schedule: a frozen dataclass, made of a mapping and checked."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

from ndlora_plugins.errors import NdLoraValueError

__all__ = ["NoOptions", "check_choice", "check_number", "make_options"]


@dataclass(frozen=True)
class NoOptions:
    """The options of a record that has none."""


def make_options(owner: Any, given: Mapping[str, Any], kind: str = "method") -> Any:
    """Make the options of a record.

    Args:
        owner: a method or a schedule, with its `name` and `Options`.
        given: name -> value.
        kind: what the owner is, for messages.

    Raises:
        NdLoraValueError: one that it does not have, or a value that cannot work.
    """
    if not isinstance(given, Mapping):
        raise NdLoraValueError(
            f"options={given!r}: give a mapping of the {kind}'s own options, such as {{'size': 4}}."
        )
    known = [field.name for field in fields(owner.Options)]
    for name in given:
        if name not in known:
            has = f"has {', '.join(map(repr, known))}" if known else "has none"
            raise NdLoraValueError(
                f"options={{{name!r}: ...}}: {kind}={owner.name!r} has no such option; it {has}."
            )
    try:
        return owner.Options(**given)
    except (
        TypeError
    ) as error:  # one without a default is missing, or of a type that its check did not think of
        raise NdLoraValueError(f"options={dict(given)!r} of {kind}={owner.name!r}: {error}.") from error


def check_number(
    name: str, value: Any, least: float = 0, most: float = math.inf, whole: bool = False
) -> None:
    """Refuse an option that is no number from `least` to `most`, or no integer if it is to be `whole`.

    Raises:
        NdLoraValueError: with the name, the value and what is allowed.
    """
    kinds = int if whole else (int, float)
    if isinstance(value, bool) or not isinstance(value, kinds) or not least <= value <= most:
        allowed = f"of at least {least}" if most == math.inf else f"from {least} to {most}"
        raise NdLoraValueError(f"{name}={value!r}: choose {'an integer' if whole else 'a number'} {allowed}.")


def check_choice(name: str, value: Any, choices: Sequence[str | bool]) -> None:
    """Refuse an option that is none of the choices.

    Raises:
        NdLoraValueError: with the name, the value and the choices.
    """
    if value not in choices:
        raise NdLoraValueError(f"{name}={value!r}: choose one of {list(choices)}.")
