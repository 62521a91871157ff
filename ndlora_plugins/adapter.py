"""One adapter on one layer: method, layout, start and anchor put together. What hosts call."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Generator, Tensor

from ndlora_plugins.errors import NdLoraValueError
from ndlora_plugins.fused import Product, add_product, linear_with_product
from ndlora_plugins.initializers import Initializer
from ndlora_plugins.methods.base import Factor, Layout, Method
from ndlora_plugins.modes import balanced_modes, check_modes, crossed_modes, lopsidedness
from ndlora_plugins.registry import method_and_initializer

__all__ = ["ANCHORS", "AdapterOptions", "LayerAdapter", "plan_layer"]

ANCHORS = ("snapshot", "none")


@dataclass(frozen=True)
class AdapterOptions:
    """What a host's configuration says of one layer.

    Attributes:
        method, init_lora_weights: as `registry.method_and_initializer` takes them.
        rank: None for the method's default.
        alpha: scaling = alpha / rank, or alpha / sqrt(rank) with `use_rslora`; None for the start's own, else rank.
        anchor: "snapshot", "none", or None for "snapshot" exactly where the start would move the model.
        num_modes: into how many modes in and out features are split where `in_modes`, `out_modes` do not say it;
            experts and the axes of a kernel are modes of their own beside them.
        crossed_modes: the size of the small modes of `modes.crossed_modes`, in place of even ones.
    """

    method: str | None = None
    init_lora_weights: bool | str | None = True
    rank: int | None = None
    alpha: float | None = None
    use_rslora: bool = False
    anchor: str | None = None
    num_modes: int = 2
    crossed_modes: int | None = None
    in_modes: Sequence[int] | None = None
    out_modes: Sequence[int] | None = None


@dataclass(frozen=True)
class LayerAdapter:
    """A planned adapter. Holds no tensors: `trained` and `frozen` are mappings that the host keeps.

    With the snapshot anchor `trained` holds the changes since the start (zeros at the start) and `frozen` the
    start; without, `trained` holds the trainable factors and `frozen` the others.

    Attributes:
        recomputed: whether `frozen` is read from the base weight at load, so that it need not be saved.
    """

    method: Method
    initializer: Initializer
    layout: Layout
    scaling: float
    anchor: str
    trained: tuple[Factor, ...] = field(init=False)
    frozen: tuple[Factor, ...] = field(init=False)
    recomputed: bool = field(init=False)

    def __post_init__(self):
        factors = self.method.factors(self.layout)
        if self.anchor == "snapshot":
            names = self.method.start_factors(self.layout)
            frozen = tuple(f for f in factors if f.name in names)
        else:
            frozen = tuple(f for f in factors if not f.trainable)
        object.__setattr__(self, "trained", tuple(f for f in factors if f.trainable))
        object.__setattr__(self, "frozen", frozen)
        read = self.initializer.reads_weight and not self.initializer.saves_start
        object.__setattr__(self, "recomputed", bool(frozen) and read)

    def __reduce__(self):
        # methods and initialisers travel by name: they are code, and may come from a plugin
        return _planned, (self.method.name, self.initializer.name, self.layout, self.scaling, self.anchor)

    def __deepcopy__(self, memo):
        return self

    @property
    def num_parameters(self) -> int:
        """Trainable numbers."""
        return sum(math.prod(factor.shape) for factor in self.trained)

    @property
    def num_saved(self) -> int:
        """Numbers in the adapter file."""
        return self.num_parameters + (0 if self.recomputed else self.num_frozen)

    @property
    def num_frozen(self) -> int:
        """Numbers held beside the trainable ones."""
        return sum(math.prod(factor.shape) for factor in self.frozen)

    @property
    def multiply_adds(self) -> int:
        """Of the update of one token, forward."""
        return self.method.multiply_adds(self._effective_layout)

    @property
    def lopsidedness(self) -> float:
        """1.0 for even modes; see `modes.lopsidedness`. Always 1.0 for methods without modes.

        Modes that are axes of the weight, experts and kernel, are left out.
        """
        if not self.method.uses_modes:
            return 1.0
        in_modes, out_modes = self.layout.in_modes, self.layout.out_modes
        before, after = _axes(self.layout.leading), _axes(self.layout.trailing)
        first, last = len(before), len(in_modes) - len(after)
        if out_modes[:first] == before and in_modes[last:] == after:
            in_modes, out_modes = in_modes[first:last], out_modes[first:last]
        return lopsidedness(in_modes, out_modes)

    def initialize(
        self, weight: Tensor | None, generator: Generator | None = None
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Make `(trained, frozen)`, by name, on the weight's device (CPU without one).

        Args:
            weight: (out_features, in_features) of the base layer, dequantised; needed if the initialiser reads it.
            generator: a CPU generator; without it the global one is used, as `nn.Linear` does.
        """
        if self.initializer.reads_weight and weight is None:
            raise NdLoraValueError(f"initialiser {self.initializer.name!r} needs the base weight.")
        with torch.no_grad():
            values = self.initializer.function(self.method, self.layout, weight, generator)
        frozen = {factor.name: values[factor.name] for factor in self.frozen}
        if self.anchor == "snapshot":
            trained = {factor.name: torch.zeros_like(values[factor.name]) for factor in self.trained}
        else:
            trained = {factor.name: values[factor.name] for factor in self.trained}
        return trained, frozen

    # The three below leave the scaling to the host, which may have changed it since (PEFT's `set_scale`).

    def apply(self, trained: Mapping[str, Tensor], frozen: Mapping[str, Tensor], x: Tensor) -> Tensor:
        """dW x for x (..., in_features) -> (..., out_features), without scaling."""
        return self.method.apply(self._effective_layout, self._effective(trained, frozen), x)

    def add_update(
        self,
        output: Tensor,
        trained: Mapping[str, Tensor],
        frozen: Mapping[str, Tensor],
        x: Tensor,
        scaling: float,
        in_place: bool = False,
    ) -> Tensor:
        """output + scaling * dW x; see `fused.add_product`."""
        found = self._product(trained, frozen)
        if found is None:
            y = self.apply(trained, frozen, x)
            return output + (y if scaling == 1 else y * scaling)
        return add_product(*found, output, x, scaling, in_place)

    def linear(
        self,
        weight: Tensor,
        bias: Tensor | None,
        trained: Mapping[str, Tensor],
        frozen: Mapping[str, Tensor],
        x: Tensor,
        scaling: float,
    ) -> Tensor:
        """F.linear(x, weight, bias) + scaling * dW x; see `fused.linear_with_product`."""
        found = self._product(trained, frozen)
        if found is None:
            return self.add_update(F.linear(x, weight, bias), trained, frozen, x, scaling)
        return linear_with_product(*found, weight, bias, x, scaling)

    def lookup(self, trained: Mapping[str, Tensor], frozen: Mapping[str, Tensor], indices: Tensor) -> Tensor:
        """Columns of dW for integer indices (...) -> (..., out_features), without scaling."""
        return self.method.lookup(self._effective_layout, self._effective(trained, frozen), indices)

    def convolve(
        self,
        trained: Mapping[str, Tensor],
        frozen: Mapping[str, Tensor],
        x: Tensor,
        convolution: Callable[[Tensor, Tensor], Tensor],
    ) -> Tensor:
        """The convolution of x (batch, in_channels, *size) with dW, without scaling; see `Method.convolve`."""
        return self.method.convolve(self._effective_layout, self._effective(trained, frozen), x, convolution)

    def delta(self, trained: Mapping[str, Tensor], frozen: Mapping[str, Tensor]) -> Tensor:
        """dW as a matrix (out_features, in_features), without scaling."""
        return self.method.delta(self._effective_layout, self._effective(trained, frozen))

    def low_rank(
        self, trained: Mapping[str, Tensor], frozen: Mapping[str, Tensor]
    ) -> tuple[Tensor, Tensor] | None:
        """(down, up) with dW = up @ down exactly, or None where the method has no such form; without scaling."""
        return self.method.low_rank(self._effective_layout, self._effective(trained, frozen))

    def delta_norm(self, trained: Mapping[str, Tensor], frozen: Mapping[str, Tensor]) -> float:
        """||dW||_F without scaling, in float64 (float32 on devices that have none) and without gradients.

        dW is not formed where the method has a cheaper exact way. Waits for the device.
        """
        with torch.no_grad():
            wide = [
                {
                    name: value.detach().to(torch.float32 if value.device.type == "mps" else torch.float64)
                    for name, value in tensors.items()
                }
                for tensors in (trained, frozen)
            ]
            return float(self.method.delta_norm(self._effective_layout, self._effective(*wide)))

    @property
    def _effective_layout(self) -> Layout:
        return self.method.anchored_layout(self.layout) if self.anchor == "snapshot" else self.layout

    def _product(
        self, trained: Mapping[str, Tensor], frozen: Mapping[str, Tensor]
    ) -> tuple[Product, tuple[Tensor, ...]] | None:
        if self.anchor == "snapshot":
            return self.method.anchored_product(self.layout, frozen, trained)
        return self.method.product(self.layout, {**frozen, **trained})

    def _effective(self, trained: Mapping[str, Tensor], frozen: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        if self.anchor == "snapshot":
            return self.method.anchored(self.layout, frozen, trained)
        return {**frozen, **trained}


def _planned(method: str, initializer: str, layout: Layout, scaling: float, anchor: str) -> LayerAdapter:
    """What a pickled `LayerAdapter` is made of again."""
    return LayerAdapter(*method_and_initializer(method, initializer), layout, scaling, anchor)


def plan_layer(
    options: AdapterOptions,
    in_features: int,
    out_features: int,
    layer: str,
    *,
    leading: tuple[int, ...] = (),
    trailing: tuple[int, ...] = (),
    one_hot: bool = False,
) -> LayerAdapter:
    """Plan one layer; nothing is allocated.

    Args:
        layer: its name, for messages.
        leading, trailing, one_hot: what else there is to know of the weight; see `Layout`.

    Raises:
        NdLoraValueError: an option that cannot work on this layer.
    """
    method, initializer = method_and_initializer(options.method, options.init_lora_weights)
    rank = method.default_rank if options.rank is None else options.rank
    if not isinstance(rank, int) or isinstance(rank, bool) or rank < 1:
        raise NdLoraValueError(f"r={rank!r} for layer {layer!r}: the rank must be an integer of at least 1.")
    in_modes, out_modes = _modes(method, options, in_features, out_features, layer, leading, trailing)
    layout = Layout(in_features, out_features, rank, in_modes, out_modes, leading, trailing, one_hot)
    if initializer.max_rank is not None and rank > initializer.max_rank(layout):
        raise NdLoraValueError(
            f"init_lora_weights={initializer.name!r} allows at most r={initializer.max_rank(layout)} on layer "
            f"{layer!r} with its weight of {out_features} x {in_features} (out x in), but r={rank}. Lower r, or "
            f"give this layer a smaller one in rank_pattern."
        )
    alpha = resolve_alpha(options.alpha, rank, initializer)
    scaling = alpha / (math.sqrt(rank) if options.use_rslora else rank)
    return LayerAdapter(method, initializer, layout, scaling, resolve_anchor(options.anchor, initializer))


def resolve_alpha(alpha: float | None, rank: int, initializer: Initializer) -> float:
    """None becomes what the start is made for, else the rank, so that the scaling is 1."""
    return alpha if alpha is not None else initializer.default_alpha or rank


def resolve_anchor(anchor: str | None, initializer: Initializer) -> str:
    """None becomes "snapshot" exactly where the start would move the model.

    `random` is the exception: it is meant to move it (for tests), so None stays "none" there.
    """
    if anchor is None:
        return "none" if initializer.starts_at_zero or initializer.name == "random" else "snapshot"
    if anchor not in ANCHORS:
        raise NdLoraValueError(f"anchor={anchor!r}: choose one of {list(ANCHORS)}, or leave it out.")
    return anchor


def _axes(sizes: tuple[int, ...]) -> tuple[int, ...]:
    """Those that are worth a mode."""
    return tuple(size for size in sizes if size > 1)


def _modes(
    method: Method,
    options: AdapterOptions,
    in_features: int,
    out_features: int,
    layer: str,
    leading: tuple[int, ...],
    trailing: tuple[int, ...],
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    given = {"in_modes": options.in_modes, "out_modes": options.out_modes}
    lengths = {len(modes) for modes in given.values() if modes is not None}
    if len(lengths) > 1:
        raise NdLoraValueError(
            f"in_modes={list(options.in_modes)} and out_modes={list(options.out_modes)} of layer {layer!r} must "
            f"be equally many: each pair of modes is one factor."
        )
    before, after = _axes(leading), _axes(trailing)
    num_modes = lengths.pop() - len(before) - len(after) if lengths else options.num_modes
    if not isinstance(num_modes, int) or num_modes < (1 if before or after else 2):
        beside = f" beside its own axes {[*before, *after]}" if before or after else ""
        least = 1 if before or after else 2
        raise NdLoraValueError(
            f"{num_modes} modes for layer {layer!r}{beside}: at least {least} {'is' if least == 1 else 'are'} needed."
        )
    # (experts, out) x (in, height, width): an axis of one side has a mode of size 1 on the other
    sides = {
        "in_modes": (in_features, (1,) * len(before), after),
        "out_modes": (out_features, before, (1,) * len(after)),
    }
    rest = {side: features // math.prod((*first, *last)) for side, (features, first, last) in sides.items()}
    splits = {}
    if not method.uses_modes:  # nothing reads them: no divisor is searched
        splits = {side: (1,) * (num_modes - 1) + (features,) for side, features in rest.items()}
    elif options.crossed_modes is not None and not lengths:
        splits = dict(
            zip(rest, crossed_modes(*rest.values(), options.crossed_modes, num_modes), strict=True)
        )
    found = []
    for side, (features, first, last) in sides.items():
        if given[side] is not None:
            found.append(check_modes(tuple(given[side]), features, side, layer))
        else:
            split = splits.get(side) or balanced_modes(rest[side], num_modes)
            found.append((*first, *split, *last))
    return found[0], found[1]
