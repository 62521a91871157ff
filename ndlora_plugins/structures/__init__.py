"""The structures: an update dW as a multilinear form of named factors, one file each, with every view of it."""

from ndlora_plugins.structures.base import Factor, Layout, Structure
from ndlora_plugins.structures.chain import Chain
from ndlora_plugins.structures.composed import Composed
from ndlora_plugins.structures.einsum import Einsum
from ndlora_plugins.structures.kronecker import KroneckerSum

__all__ = ["Chain", "Composed", "Einsum", "Factor", "KroneckerSum", "Layout", "Structure"]
