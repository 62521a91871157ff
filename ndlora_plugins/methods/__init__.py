"""The methods: one file each, pure functions over named factors. `base` says what a method is."""

from ndlora_plugins.methods.base import Factor, Layout, Method

__all__ = ["Factor", "Layout", "Method"]
