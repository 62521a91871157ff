"""All methods and initialisers, by name, and which plugin brought each."""

from __future__ import annotations

from functools import cache, lru_cache
from typing import NamedTuple

import pluggy

from ndlora_plugins import builtin, hookspecs
from ndlora_plugins.errors import NdLoraValueError
from ndlora_plugins.initializers import Initializer
from ndlora_plugins.methods.base import Method

__all__ = [
    "ENTRY_POINT_GROUP",
    "Registered",
    "initializers",
    "method_and_initializer",
    "methods",
    "register_plugin",
    "unregister_plugin",
]

ENTRY_POINT_GROUP = "ndlora"


class Registered(NamedTuple):
    """A method or an initialiser, with the plugin (distribution and version if it has one) that brought it."""

    value: Method | Initializer
    plugin: str


@lru_cache(maxsize=1)
def _manager() -> pluggy.PluginManager:
    manager = pluggy.PluginManager("ndlora")
    manager.add_hookspecs(hookspecs)
    manager.register(builtin, name="ndlora-plugins")
    manager.load_setuptools_entrypoints(ENTRY_POINT_GROUP)
    return manager


def register_plugin(plugin: object, name: str | None = None) -> None:
    """Bring in a plugin by hand: a module or object with `hookimpl` functions. Entry points need no call."""
    _manager().register(plugin, name=name)
    _collect.cache_clear()
    try:
        _collect("ndlora_methods"), _collect("ndlora_initializers")
    except NdLoraValueError:
        unregister_plugin(plugin)
        raise


def unregister_plugin(plugin: object) -> None:
    """Take out what `register_plugin` brought in."""
    _manager().unregister(plugin)
    _collect.cache_clear()


@cache
def _collect(hook: str) -> dict[str, Registered]:
    manager = _manager()
    versions = {
        plugin: f"{dist.project_name} {dist.version}" for plugin, dist in manager.list_plugin_distinfo()
    }
    found: dict[str, Registered] = {}
    for implementation in getattr(manager.hook, hook).get_hookimpls():  # built-ins are registered first
        plugin = versions.get(implementation.plugin, implementation.plugin_name)
        for value in implementation.function():
            if value.name in found:
                raise NdLoraValueError(
                    f"{hook.removeprefix('ndlora_')[:-1]} {value.name!r} of plugin {plugin!r} is already "
                    f"registered by {found[value.name].plugin!r}: rename it or uninstall one of the two."
                )
            found[value.name] = Registered(value, plugin)
    return found


def methods() -> dict[str, Registered]:
    """Every known method by name, built-ins first."""
    return _collect("ndlora_methods")


def initializers() -> dict[str, Registered]:
    """Every known initialiser by name, built-ins first."""
    return _collect("ndlora_initializers")


def method_and_initializer(
    method: str | None, init_lora_weights: bool | str | None
) -> tuple[Method, Initializer]:
    """Resolve the pair of options as the configuration gives them.

    Args:
        method: a name, or None: it then follows from `init_lora_weights` ("n_lora" means nlora), else ndlinear.
        init_lora_weights: True (the method's own start), False (random) or an initialiser's name.

    Raises:
        NdLoraValueError: an unknown name, or a pair that cannot work.
    """
    if init_lora_weights is None:
        init_lora_weights = True
    initializer = None
    if not isinstance(init_lora_weights, bool):
        initializer = _look_up(initializers(), init_lora_weights, "init_lora_weights", "initialiser")
    if method is None:
        method = initializer.methods[0] if initializer is not None and initializer.methods else "ndlinear"
    resolved = _look_up(methods(), method, "method", "method")
    if initializer is None:
        name = resolved.default_initializer if init_lora_weights else "random"
        initializer = _look_up(initializers(), name, "init_lora_weights", "initialiser")
    if initializer.methods and resolved.name not in initializer.methods:
        reason = initializer.refuses.get(resolved.name, f"it starts {', '.join(initializer.methods)} only")
        fitting = [
            name
            for name, found in initializers().items()
            if not found.value.methods or resolved.name in found.value.methods
        ]
        raise NdLoraValueError(
            f"init_lora_weights={initializer.name!r} cannot start method={resolved.name!r}: {reason}. "
            f"Use init_lora_weights=True or one of {fitting}."
        )
    return resolved, initializer


def _look_up(known: dict[str, Registered], name: str, option: str, kind: str):
    if isinstance(name, str) and name in known:
        return known[name].value
    listed = ", ".join(f"{n!r} ({r.plugin})" for n, r in known.items())
    raise NdLoraValueError(
        f"{option}={name!r} is no known {kind}. Known: {listed}. A {kind} of another package comes with its "
        f"plugin: install the one that registers {name!r} under the entry-point group {ENTRY_POINT_GROUP!r}."
    )
