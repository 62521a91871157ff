"""The methods: records, one file each. `base` says what a method is."""

from ndlora_plugins.methods.base import Method, NoOptions

__all__ = ["Method", "NoOptions"]
