"""Every error and warning of the package. Each error is an `NdLoraError` and the built-in that fits."""

__all__ = [
    "BaseModelWarning",
    "LopsidedModesWarning",
    "MissingExtraError",
    "NdLoraError",
    "NdLoraTypeError",
    "NdLoraValueError",
    "NdLoraWarning",
    "UnmatchedTargetWarning",
]


class NdLoraError(Exception):
    """Base class: `except NdLoraError` catches whatever this package raises on purpose."""


class NdLoraValueError(NdLoraError, ValueError):
    """A value that cannot work. The message names what was given, where, and what to do."""


class NdLoraTypeError(NdLoraError, TypeError):
    """A layer or an argument of a kind that cannot work."""


class MissingExtraError(NdLoraError, ImportError):
    """A host library is not installed. The message names the extra that brings it."""


class NdLoraWarning(UserWarning):
    """Base class: `warnings.simplefilter("ignore", NdLoraWarning)` silences them all."""


class BaseModelWarning(NdLoraWarning):
    """The base model is not bit for bit the one the adapter was trained on."""


class LopsidedModesWarning(NdLoraWarning):
    """A dimension splits so unevenly that the adapter of its layer is several times as large as it should be."""


class UnmatchedTargetWarning(NdLoraWarning):
    """An entry of `target_modules`, `rank_pattern`, `alpha_pattern` or `modes` matches no layer."""
