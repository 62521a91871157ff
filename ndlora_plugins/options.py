"""What a configuration says of an adapter, resolved once: defaults filled in, and checked."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ndlora_plugins.errors import NdLoraValueError
from ndlora_plugins.methods.base import Method
from ndlora_plugins.registry import method_and_start
from ndlora_plugins.starts.base import Start

__all__ = ["ANCHORS", "AdapterOptions", "adapter_options"]

ANCHORS = ("snapshot", "none")


@dataclass(frozen=True)
class AdapterOptions:
    """The configuration of one layer, with all defaults filled in; made by `adapter_options`.

    Attributes:
        scaling = alpha / rank, or alpha / sqrt(rank) with `use_rslora`.
        options: the method's own, an instance of its `Options`.
    """

    method: Method
    start: Start
    options: Any
    rank: int
    alpha: float
    use_rslora: bool
    anchor: str
    save_frozen: bool = False

    @property
    def reads_base(self) -> bool:
        """Tell whether frozen tensors are made again from the base weight at load; see `LayerAdapter.recomputed`."""
        names, trained = self.method.factor_names(self.options), self.method.trained_names(self.options)
        frozen = len(names) > 1 if self.anchor == "snapshot" else len(trained) < len(names)
        recomputes = self.start.recomputes(self.method.shared is not None)
        return frozen and recomputes and not self.save_frozen and "weight" in self.start.reads


def adapter_options(
    method: str | None = None,
    init_lora_weights: bool | str | None = True,
    rank: int | None = None,
    alpha: float | None = None,
    use_rslora: bool = False,
    anchor: str | None = None,
    options: Mapping[str, Any] | None = None,
    save_frozen: bool = False,
) -> AdapterOptions:
    """Fill in the defaults and check what does not depend on a layer.

    Args:
        method, init_lora_weights, options: as `registry.method_and_start` takes them.
        rank: None for the method's default.
        alpha: None for what the start is made for, else the rank, so that the scaling is 1.
        anchor: "snapshot", "none", or None for "snapshot" exactly where the start would move the model. A start that
            is meant to move it is the exception.
        save_frozen: keep in the file what could be made again from the weight or a seed.

    Raises:
        NdLoraValueError: a value that cannot work.
    """
    found, start, chosen = method_and_start(method, init_lora_weights, options)
    rank = found.rank if rank is None else rank
    if not isinstance(rank, int) or isinstance(rank, bool) or rank < 1:
        raise NdLoraValueError(f"r={rank!r}: a rank must be an integer of at least 1.")
    if alpha is None:
        alpha = start.alpha or rank
    if anchor is None:
        at_zero = start.zero_factors(found.factor_names(chosen), found.trained_names(chosen))
        anchor = "none" if at_zero or start.moves else "snapshot"
    elif anchor not in ANCHORS:
        raise NdLoraValueError(f"anchor={anchor!r}: choose one of {list(ANCHORS)}, or leave it out.")
    return AdapterOptions(found, start, chosen, rank, alpha, use_rslora, anchor, save_frozen)
