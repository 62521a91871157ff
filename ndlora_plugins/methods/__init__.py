"""The methods: records, one file each. `base` says what a method is."""

from ndlora_plugins.methods.base import Method
from ndlora_plugins.methods.options import NoOptions

__all__ = ["Method", "NoOptions"]
