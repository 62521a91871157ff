"""The starts, by the factors that they give. `base` says what a start is."""

from ndlora_plugins.starts.base import Seen, Start, kaiming_uniform

__all__ = ["Seen", "Start", "kaiming_uniform"]
