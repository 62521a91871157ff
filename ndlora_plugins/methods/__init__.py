"""The methods: records, one file each. `base` says what a method is."""

from ndlora_plugins.checks import NoOptions
from ndlora_plugins.methods.base import Method

__all__ = ["Method", "NoOptions"]
