"""What torch runs at the end of `import torch` (entry-point group "torch.backends"): makes NDLORA known to PEFT.

Standard library only, and nothing here may raise: an exception would break `import torch`. All it does is to
wait for some modules: once `peft.tuners` has been imported our tuner type is registered, once
`axolotl.utils.config` has been imported `adapter: ndlora` brings our plugin in by itself, and so on.

`NDLORA_AUTOLOAD=0` switches it off; `import ndlora_plugins` then registers by hand. It is a module of its own,
beside the package, because importing the package is that explicit act.
"""

import importlib
import importlib.abc
import os
import sys

# module whose import we wait for -> our module, whose function `activate` is then called
WATCHED = {
    "peft.tuners": "ndlora_plugins.integrations.peft.registration",
    "axolotl.utils.config": "ndlora_plugins.integrations.axolotl.implicit",
    "diffusers.loaders.peft": "ndlora_plugins.integrations.diffusers.patches",
    "swift.tuner_plugin.mapping": "ndlora_plugins.integrations.ms_swift.tuner",
}
_OFF = {"0", "false", "no", "off"}


def autoload() -> None:
    """Called by torch. Never raises."""
    try:
        if os.environ.get("NDLORA_AUTOLOAD", "1").strip().lower() not in _OFF:
            install()
    except Exception as error:  # whatever it is, `import torch` must go on
        _complain("autoload", error)


def install() -> None:
    """Wait for the watched modules; act at once on those that are complete already. May be called again."""
    if not any(isinstance(finder, _PostImportFinder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _PostImportFinder())
    _activate_imported()


def _activate_imported() -> None:
    """Act on watched modules that have been imported, but not on one that is half-way through its import."""
    for name in [n for n in WATCHED if n not in _done]:
        module = sys.modules.get(name)
        if module is not None and not getattr(getattr(module, "__spec__", None), "_initializing", False):
            _activate(name)


_done = set()


def _activate(name: str) -> None:
    if name in _done:
        return
    _done.add(name)
    try:
        importlib.import_module(WATCHED[name]).activate()
    except Exception as error:  # a broken install of ours must not break theirs
        _complain(name, error)


def _complain(name: str, error: Exception) -> None:
    import logging

    logging.getLogger("ndlora_plugins").warning(
        "ndlora-plugins could not attach itself to %s (%s: %s). All else works as ever, without its "
        "adapters. Reinstall ndlora-plugins, or set NDLORA_AUTOLOAD=0 to silence this.",
        name,
        type(error).__name__,
        error,
    )


class _PostImportFinder(importlib.abc.MetaPathFinder):
    """Finds nothing itself: wraps the loader of a watched module, so that we hear when it has been executed."""

    def find_spec(self, fullname, path=None, target=None):
        if fullname not in WATCHED:
            # a watched module may have been half-way through its import when we came
            if len(_done) < len(WATCHED) and any(
                name in sys.modules for name in WATCHED if name not in _done
            ):
                _activate_imported()
            return None
        if fullname in _done:
            return None
        for finder in sys.meta_path:
            if finder is self or not hasattr(finder, "find_spec"):
                continue
            spec = finder.find_spec(fullname, path, target)
            if spec is not None:
                if spec.loader is not None and hasattr(spec.loader, "exec_module"):
                    spec.loader = _NotifyingLoader(spec.loader, fullname)
                return spec
        return None


class _NotifyingLoader(importlib.abc.Loader):
    """Runs the real loader, which it first puts back in its place, then activates us."""

    def __init__(self, loader, name):
        self._loader, self._name = loader, name

    def create_module(self, spec):
        return self._loader.create_module(spec)

    def exec_module(self, module):
        module.__spec__.loader = self._loader  # pyright: ignore[reportOptionalMemberAccess]  the importer set it
        module.__loader__ = self._loader
        self._loader.exec_module(module)
        _activate(self._name)

    def __getattr__(self, attribute):
        return getattr(self._loader, attribute)
