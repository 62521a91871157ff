"""All methods, starts and schedules, by name, and which plugin brought each."""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, fields
from functools import cache, lru_cache
from typing import Any, Generic, TypeVar

import pluggy

from ndlora_plugins import builtin, hookspecs
from ndlora_plugins.errors import NdLoraValueError
from ndlora_plugins.methods.base import Method
from ndlora_plugins.methods.options import NoOptions, make_options
from ndlora_plugins.schedules.base import Schedule
from ndlora_plugins.starts.base import Start
from ndlora_plugins.structures import Chain, Layout

__all__ = [
    "ENTRY_POINT_GROUP",
    "Registered",
    "fits",
    "look_up",
    "method_and_start",
    "methods",
    "option_names",
    "product_method",
    "register_plugin",
    "schedules",
    "starts",
    "unregister_plugin",
]

ENTRY_POINT_GROUP = "ndlora"

_BROUGHT = {"ndlora_methods": Method, "ndlora_starts": Start, "ndlora_schedules": Schedule}
Record = TypeVar("Record", Method, Start, Schedule)


@dataclass(frozen=True)
class Registered(Generic[Record]):
    """A record, with the plugin (distribution and version if it has one) that brought it."""

    value: Record
    plugin: str


@lru_cache(maxsize=1)
def _manager() -> pluggy.PluginManager:
    manager = pluggy.PluginManager("ndlora")
    manager.add_hookspecs(hookspecs)
    manager.register(builtin, name="ndlora-plugins")
    manager.load_setuptools_entrypoints(ENTRY_POINT_GROUP)
    return manager


def register_plugin(plugin: object, name: str | None = None) -> None:
    """Bring in a plugin by hand: a module or object with `hookimpl` functions. Entry points need no call.

    Raises:
        NdLoraValueError: it is registered, its name or that of something it brings is taken, a hook of it is none of
            ours, or it brings something else than methods, starts and schedules. Nothing is registered then.
    """
    known = _manager().get_name(plugin) or (name if name and _manager().has_plugin(name) else None)
    if known is not None:
        raise NdLoraValueError(f"A plugin {known!r} is already registered: give another, by another name.")
    try:
        with _in_words():
            _manager().register(plugin, name=name)
        _collect.cache_clear()
        for hook in _BROUGHT:
            _collect(hook)
    except BaseException:
        if _manager().is_registered(plugin):
            unregister_plugin(plugin)
        raise


def unregister_plugin(plugin: object) -> None:
    """Take out what `register_plugin` brought in.

    Raises:
        NdLoraValueError: it is not registered.
    """
    if not _manager().is_registered(plugin):
        raise NdLoraValueError(f"{plugin!r} is no registered plugin: give what `register_plugin` was given.")
    _manager().unregister(plugin)
    _collect.cache_clear()


@contextmanager
def _in_words() -> Iterator[None]:
    """Say what pluggy finds wrong with the hooks of a plugin."""
    try:
        yield
    except pluggy.PluginValidationError as error:
        said = " ".join(str(error).split())
        raise NdLoraValueError(
            f"{said}: a plugin has the hooks {list(_BROUGHT)}, without arguments."
        ) from error


@cache
def _collect(hook: str) -> dict[str, Registered[Any]]:
    with _in_words():
        manager = _manager()
        manager.check_pending()
    versions = {
        plugin: f"{dist.project_name} {dist.version}" for plugin, dist in manager.list_plugin_distinfo()
    }
    found: dict[str, Registered[Any]] = {}
    for implementation in getattr(manager.hook, hook).get_hookimpls():  # built-ins are registered first
        plugin = versions.get(implementation.plugin) or implementation.plugin_name
        for value in implementation.function():
            if not isinstance(value, _BROUGHT[hook]):
                raise NdLoraValueError(
                    f"{hook} of plugin {plugin!r} gives {value!r}, which is no {_BROUGHT[hook].__name__}."
                )
            if value.name in found:
                raise NdLoraValueError(
                    f"{hook.removeprefix('ndlora_')[:-1]} {value.name!r} of plugin {plugin!r} is already "
                    f"registered by {found[value.name].plugin!r}: rename it or uninstall one of the two."
                )
            found[value.name] = Registered(value, plugin)
    return found


def methods() -> dict[str, Registered[Method]]:
    """Every known method by name, built-ins first."""
    return _collect("ndlora_methods")


def starts() -> dict[str, Registered[Start]]:
    """Every known start by name, built-ins first."""
    return _collect("ndlora_starts")


def schedules() -> dict[str, Registered[Schedule]]:
    """Every known schedule by name, built-ins first."""
    return _collect("ndlora_schedules")


def method_and_start(
    method: str | None, init_lora_weights: bool | str | None, options: Mapping[str, Any] | None = None
) -> tuple[Method, Start, Any]:
    """Resolve the three options as a configuration gives them.

    Args:
        method: a name, or None: it then follows from `init_lora_weights` ("n_lora" means nlora), else it is the
            first that was registered.
        init_lora_weights: True (the method's own start), False (random) or a start's name.
        options: the method's own.

    Returns:
        the method, the start, and the method's options, checked.

    Raises:
        NdLoraValueError: an unknown name or option, or a start that does not fit the method.
    """
    resolved, start = _look_up_both(method, init_lora_weights)
    chosen = make_options(resolved, options or {})
    reason = _misfit(resolved, start, chosen)
    if reason is not None:
        fitting = [name for name, found in starts().items() if _misfit(resolved, found.value, chosen) is None]
        raise NdLoraValueError(
            f"init_lora_weights={start.name!r} cannot start method={resolved.name!r}: {reason}. "
            f"Use init_lora_weights=True or one of {fitting}."
        )
    return resolved, start, chosen


def option_names(method: str | None, init_lora_weights: bool | str | None) -> frozenset[str]:
    """The names of the options that the method has which these two resolve to."""
    return frozenset(field.name for field in fields(_look_up_both(method, init_lora_weights)[0].Options))


def _look_up_both(method: str | None, init_lora_weights: bool | str | None) -> tuple[Method, Start]:
    start = None
    if not (init_lora_weights is None or isinstance(init_lora_weights, bool)):
        start = look_up(starts(), init_lora_weights, "init_lora_weights", "start")
    if method is None:
        method = (start.implies if start is not None else None) or next(iter(methods()))
    resolved = look_up(methods(), method, "method", "method")
    if start is None:
        name = "random" if init_lora_weights is False else resolved.start
        start = look_up(starts(), name, "init_lora_weights", "start")
    return resolved, start


def fits(method: str, start: str) -> bool:
    """Tell whether a start can start a method with its default options; True where an option has no default."""
    found = methods()[method].value
    try:
        options = found.Options()
    except TypeError:  # an option without a default: its factors are not known yet
        return not starts()[start].value.gives
    return _misfit(found, starts()[start].value, options) is None


def _misfit(method: Method, start: Start, options: Any) -> str | None:
    """Why the start cannot start the method, or None."""
    names = method.factor_names(options)
    missing = [name for name in start.gives if name not in names]
    if missing:
        return f"it gives the factors {list(start.gives)}, and the method has {list(names)}"
    trains = method.trained_names(options)
    zero = start.zero_factors(names, trains)
    frozen = [name for name in names if name in zero and name not in trains]
    if frozen:
        return f"it starts {frozen[0]!r} at zero and the method keeps it frozen, so nothing would ever get a gradient"
    if len(zero & set(names)) > 1:
        return f"it starts {sorted(zero)} at zero, so none of them would ever get a gradient"
    return None


def look_up(known: dict[str, Registered[Record]], name: str, option: str, kind: str) -> Record:
    """The record of that name.

    Args:
        option: what was set to the name, for the message.
        kind: what it is a name of.

    Raises:
        NdLoraValueError: there is none.
    """
    if isinstance(name, str) and name in known:
        return known[name].value
    listed = ", ".join(map(repr, known))
    meant = "".join(f" Did you mean {near!r}?" for near in difflib.get_close_matches(str(name), known, n=1))
    raise NdLoraValueError(
        f"{option}={name!r} is no known {kind}.{meant} Known: {listed}. A {kind} of another package comes with its "
        f"plugin: install the one that registers {name!r} under the entry-point group {ENTRY_POINT_GROUP!r}."
    )


def product_method(in_features: int, out_features: int, rank: int) -> tuple[Method, Chain]:
    """The first method that can hold any product up @ down of this rank, with its structure."""
    for found in methods().values():
        if found.value.Options is NoOptions and found.value.trains is None:
            structure = found.value.structure(Layout(in_features, out_features, rank, NoOptions()))
            if isinstance(structure, Chain) and not structure.indexed:
                return found.value, structure
    raise NdLoraValueError("No method is registered that holds a product of two matrices.")
