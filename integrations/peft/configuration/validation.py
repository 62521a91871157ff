"""A configuration's values against the annotations of its fields: the kind, and what a `Check` asks besides."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Callable, Mapping, Sequence, Set
from enum import EnumMeta
from functools import cache
from types import UnionType
from typing import Annotated, Any, Literal, NamedTuple, Union, get_args, get_origin, get_type_hints

from peft.config import PeftConfig

from ndlora_plugins.errors import NdLoraValueError

__all__ = [
    "Alpha",
    "Bias",
    "Check",
    "CrossedModes",
    "Dropout",
    "Indices",
    "Modes",
    "NumModes",
    "Pattern",
    "Patterns",
    "Rank",
    "Rows",
    "Schema",
    "Targets",
    "check_fields",
    "fields_to_set",
]


class Check(NamedTuple):
    """Beside a type in `Annotated`: what a value of it must be.

    Attributes:
        remedy: ends the message, for a value of another type too.
        holds: tells whether a value of the type will do.
    """

    remedy: str
    holds: Callable[[Any], bool] = lambda value: True


class _Unfit(Exception):
    """Carries the end of the message."""


_REMEDIES = {
    bool: "choose True or False.",
    int: "choose an integer.",
    float: "choose a finite number.",
    str: "choose a string.",
    list: "choose a list.",
    dict: "choose a dict.",
}


def check_fields(config: Any) -> None:
    """Hold every field of a dataclass to its annotation, and set it to Python's own types.

    Tuples, sets and other sequences become lists, mappings dicts, numpy's values and arrays Python's: what YAML,
    OmegaConf and numpy give can then be saved as JSON.

    Raises:
        NdLoraValueError: names the field, the value and what to choose.
    """
    for name, annotation in _annotations(type(config)).items():
        value = getattr(config, name)
        try:
            fitted = _fit(value, annotation)
        except _Unfit as reason:
            raise NdLoraValueError(f"{name}={shorten(value)}: {reason}") from None
        setattr(config, name, fitted)


def fields_to_set(config: Any) -> list[dataclasses.Field]:
    """The fields that a user sets: those of every `PeftConfig` left out, and those that a save writes.

    Args:
        config: a configuration, or its class.
    """
    inherited = {field.name for field in dataclasses.fields(PeftConfig)}
    return [
        field
        for field in dataclasses.fields(config)
        if field.name not in inherited and not field.metadata.get("written")
    ]


def _is_regex(text: str) -> bool:
    """Whether `text` is a regular expression."""
    try:
        re.compile(text)
    except (re.error, OverflowError, RecursionError):
        return False
    return True


def _is_pattern(text: str) -> bool:
    """Whether `text` is one where PEFT puts it behind the beginning of a name, as `get_pattern_key` does."""
    return text != "" and _is_regex(rf"(.*\.)?({text})$")


def _are_modes(modes: dict) -> bool:
    """Whether `modes` is one block of them, or names to such blocks."""
    sides = {"in_modes", "out_modes"}
    blocks = [modes] if sides & set(modes) else modes.values()
    return all(isinstance(block, dict) and block and set(block) <= sides for block in blocks)


def _are_targets(names: list[str] | str) -> bool:
    return _is_regex(names) if isinstance(names, str) else True


def _are_patterns(names: list[str] | str) -> bool:
    return names == "" or all(map(_is_pattern, [names] if isinstance(names, str) else names))


def _are_rows(rows: list[int] | dict[str, list[int]]) -> bool:
    lists = rows.values() if isinstance(rows, dict) else [rows]
    return all(indices and min(indices) >= 0 for indices in lists)


# the kinds of a configuration's fields
Rank = Annotated[int, Check("a rank must be an integer of at least 1.", lambda value: value >= 1)]
# beyond, a factor times the scaling is infinite in float32, and that times a factor of zeros is NaN
Alpha = Annotated[
    float, Check("choose a number such as 16, from -1e9 to 1e9.", lambda value: abs(value) <= 1e9)
]
Dropout = Annotated[float, Check("choose a value from 0 up to below 1.", lambda value: 0.0 <= value < 1.0)]
# 2**31, the largest dimension, is a product of 31 numbers above 1
NumModes = Annotated[
    int, Check("choose an integer of at least 2 and at most 32.", lambda value: 2 <= value <= 32)
]
CrossedModes = Annotated[int, Check("choose an integer of at least 1, such as 4.", lambda value: value >= 1)]
Mode = Annotated[int, Check("a mode must be an integer of at least 1.", lambda value: value >= 1)]
Name = Annotated[str, Check("choose a name.", bool)]
Pattern = Annotated[str, Check("choose a name, or a valid regular expression.", _is_pattern)]
_Block = dict[str, list[Mode] | None]
Modes = Annotated[
    _Block | dict[Pattern, _Block],
    Check(
        "give {'in_modes': [...], 'out_modes': [...]} of integers of at least 1 (either may be left out), or a dict "
        "of target names to such dicts.",
        _are_modes,
    ),
]
Patterns = Annotated[
    list[str] | str, Check("choose a name or a valid regular expression, or a list of them.", _are_patterns)
]
Targets = Annotated[
    list[str] | str, Check("choose a list of names, or one valid regular expression.", _are_targets)
]
Indices = Annotated[list[int] | int, Check("choose an integer, or a list of integers.")]
Rows = Annotated[
    list[int] | dict[Name, list[int]],
    Check("choose integers from 0 in a list, or a dict of an embedding's name to such a list.", _are_rows),
]
Bias = Annotated[
    Literal["none", "all", "ndlora_only", "lora_only"], Check("choose 'none', 'all' or 'ndlora_only'.")
]
Schema = Annotated[int, Check("choose an integer of at least 1, or leave it out.", lambda value: value >= 1)]


@cache
def _annotations(cls: type) -> dict[str, Any]:
    hints = get_type_hints(cls, include_extras=True)
    return {field.name: hints[field.name] for field in dataclasses.fields(cls)}


def _fit(value: Any, annotation: Any) -> Any:
    """`value` in the types of `annotation`; where a kind is not known here, as it is.

    Raises:
        _Unfit: it is of another kind, or a check does not hold.
    """
    kind, arguments = get_origin(annotation) or annotation, get_args(annotation)
    if type(value).__module__ == "numpy" and hasattr(value, "tolist"):
        value = value.tolist()
    if kind is Annotated:
        return _fit_checked(value, *arguments)
    if kind in (Union, UnionType):
        return _fit_one(value, arguments)
    if kind is list and arguments:
        return _fit_list(value, *arguments)
    if kind is dict and arguments:
        return _fit_dict(value, *arguments)
    if not _is_of(value, kind, arguments):
        raise _Unfit(_REMEDIES.get(kind, "choose a value of its kind."))
    return value


def _is_of(value: Any, kind: Any, arguments: tuple) -> bool:
    if kind in (int, float):
        return _is_number(value, kind)
    if kind is Literal:
        return value in arguments
    if isinstance(kind, EnumMeta):
        return value in list(kind)
    return not isinstance(kind, type) or kind is Any or isinstance(value, kind)


def _is_number(value: Any, kind: type) -> bool:
    if isinstance(value, bool) or not isinstance(value, (int, kind)):
        return False
    try:
        return math.isfinite(float(value))
    except OverflowError:  # an integer of more than 308 digits
        return False


def _fit_checked(value: Any, annotation: Any, check: Check) -> Any:
    try:
        fitted = _fit(value, annotation)
    except _Unfit:
        raise _Unfit(check.remedy) from None
    if not check.holds(fitted):
        raise _Unfit(check.remedy)
    return fitted


def _fit_one(value: Any, alternatives: tuple) -> Any:
    """The first that fits; if none does, the reason of the first."""
    reasons = []
    for annotation in alternatives:
        try:
            return _fit(value, annotation)
        except _Unfit as reason:
            reasons.append(reason)
    raise reasons[0]


def _fit_list(value: Any, element: Any) -> list:
    if not isinstance(value, (Sequence, Set)) or isinstance(value, (str, bytes)):
        raise _Unfit(_REMEDIES[list])
    return [_fit_part(f"[{index}]", part, element) for index, part in enumerate(value)]


def _fit_dict(value: Any, key: Any, element: Any) -> dict:
    if not isinstance(value, Mapping):
        raise _Unfit(_REMEDIES[dict])
    # YAML reads the number of a layer as an integer
    named = {str(name) if type(name) is int else name: part for name, part in value.items()}
    return {
        _fit_part("its key", name, key): _fit_part(str(name), part, element) for name, part in named.items()
    }


def _fit_part(name: str, value: Any, annotation: Any) -> Any:
    try:
        return _fit(value, annotation)
    except _Unfit as reason:
        raise _Unfit(f"{name}={shorten(value)}: {reason}") from None


def shorten(value: Any) -> str:
    """A value for a message, however long it is."""
    try:
        text = repr(value)
    except ValueError:  # an integer of more digits than Python writes
        text = f"{type(value).__name__} of {value.bit_length()} bits"
    return text if len(text) <= 200 else f"{text[:200]}..."
