"""What is known of an adapter while it is in memory, and not of its configuration."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

__all__ = ["Session"]


@dataclass
class Session:
    """The state of one configuration in this process.

    Attributes:
        base_fingerprint, layers, checksums: of the model that it is on; become the fields of these names when it is
            saved.
        same_storage: whether the base of a loaded adapter is stored in the dtype of the training.
        training: what a trainer noted, for the model card.
        picture: a PNG of the training, for the model card.
        gradients: layer's name -> gradient of its weight (out_features, in_features), for starts that read one.
    """

    base_fingerprint: dict | None = None
    layers: dict | None = None
    checksums: dict | None = None
    same_storage: bool = True
    training: Mapping[str, Any] = field(default_factory=dict)
    picture: Path | None = None
    gradients: Mapping[str, Tensor] = field(default_factory=dict)
