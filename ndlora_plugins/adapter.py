"""A planned adapter: what one layer gets, decided once from the options and the layer's shape."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
import torch.nn.functional as F
from torch import Generator, Tensor, nn

from ndlora_plugins.errors import NdLoraValueError
from ndlora_plugins.fused import Product, add_product, cast_factors, compute_dtype, linear_with_product
from ndlora_plugins.methods.base import Method
from ndlora_plugins.options import AdapterOptions
from ndlora_plugins.registry import method_and_start
from ndlora_plugins.schedules.base import Ranks
from ndlora_plugins.schedules.mask import seen_factors
from ndlora_plugins.starts.base import Seen, Start
from ndlora_plugins.structures.base import Factor, Factors, Layout, Structure

__all__ = ["LayerAdapter", "plan_layer"]


@dataclass(frozen=True)
class LayerAdapter:
    """A planned adapter. Holds no tensors: `trained` and `frozen` are mappings that the host keeps.

    With the snapshot anchor `trained` holds the changes since the start (zeros at the start) and `frozen` the
    start; without, `trained` holds the trainable factors and `frozen` the others.

    Attributes:
        shared: (factor, key) of each factor that is one tensor for all layers with this key.
        save_frozen: whether the file holds `frozen` though it could be made again.
    """

    method: Method
    start: Start
    layout: Layout
    scaling: float
    anchor: str
    shared: tuple[tuple[str, str], ...] = ()
    save_frozen: bool = False

    @cached_property
    def structure(self) -> Structure:
        """The form of dW."""
        return self.method.structure(self.layout)

    @cached_property
    def _trained_names(self) -> frozenset[str]:
        names = [factor.name for factor in self.structure.factors]
        return self.method.trained_names(self.layout.options, names)

    @cached_property
    def trained(self) -> tuple[Factor, ...]:
        """The factors that train."""
        return tuple(factor for factor in self.structure.factors if factor.name in self._trained_names)

    @cached_property
    def frozen(self) -> tuple[Factor, ...]:
        """The tensors held beside them: factors that do not train, or the start."""
        if self.anchor == "snapshot":
            names = self.structure.start_factors(self._trained_names)
            return tuple(factor for factor in self.structure.factors if factor.name in names)
        return tuple(factor for factor in self.structure.factors if factor not in self.trained)

    @property
    def recomputed(self) -> bool:
        """Tell whether `frozen` is made again from the base weight or a seed at load, so that it need not be saved."""
        return bool(self.frozen) and not self.save_frozen and self.start.recomputes(bool(self.shared))

    def __reduce__(self) -> tuple[Any, ...]:
        # methods and starts travel by name: they are code, and may come from a plugin
        numbers = (self.layout, self.scaling, self.anchor, self.shared, self.save_frozen)
        return _planned, (self.method.name, self.start.name, *numbers)

    def __deepcopy__(self, memo: dict[int, Any]) -> LayerAdapter:
        return self

    @property
    def num_parameters(self) -> int:
        """Trainable numbers of this layer's own."""
        return self.count_own(self.trained)

    @property
    def num_saved(self) -> int:
        """Numbers of its own in the adapter file."""
        return self.num_parameters + self.count_own(self.frozen_in_file)

    @property
    def frozen_in_file(self) -> tuple[Factor, ...]:
        """The part of `frozen` that the adapter file holds."""
        return () if self.recomputed else self.frozen

    def shared_sizes(self, factors: tuple[Factor, ...]) -> dict[str, int]:
        """Numbers in those of these factors that layers share, by key."""
        keys = dict(self.shared)
        return {keys[factor.name]: factor.numel for factor in factors if factor.name in keys}

    def count_own(self, factors: tuple[Factor, ...]) -> int:
        """Numbers in these factors, without those that other layers share."""
        shared = {name for name, _ in self.shared}
        return sum(factor.numel for factor in factors if factor.name not in shared)

    @property
    def multiply_adds(self) -> int:
        """Multiply-adds of the update for one token, forward."""
        if self.anchor == "snapshot":
            return self.structure.changed(self._trained_names).multiply_adds
        return self.structure.multiply_adds

    def initialize(
        self, seen: Seen | None = None, generator: Generator | None = None
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Make `(trained, frozen)`, by name, on the device of what is seen (CPU if nothing is).

        Args:
            seen: what the start reads.
            generator: a CPU generator; without it the global one is used, as `nn.Linear` does.

        Raises:
            NdLoraValueError: what the start reads is not there, or it gives other factors than it should.
        """
        seen = replace(seen or Seen(), keys=dict(self.shared))
        for name in self.start.reads:
            if getattr(seen, name) is None:
                raise NdLoraValueError(
                    f"init_lora_weights={self.start.name!r} reads the {name}, and there is none."
                )
        with torch.no_grad():
            values = self.start.function(self.structure, self._trained_names, seen, generator)
            values |= seen.shared
        shapes = {factor.name: factor.shape for factor in self.structure.factors}
        given = {name: tuple(value.shape) for name, value in values.items()}
        if given != shapes:
            raise NdLoraValueError(
                f"init_lora_weights={self.start.name!r} gives the factors {given}, and method={self.method.name!r} has "
                f"{shapes}. The start must give every factor, in its shape."
            )
        return self._held(values)

    def zeros(self) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Make `(trained, frozen)` as `initialize` does, of zeros: for values that come from elsewhere."""
        dtypes = {f.name: torch.float32 if f.indices is None else torch.long for f in self.structure.factors}
        return self._held(
            {f.name: torch.zeros(f.shape, dtype=dtypes[f.name]) for f in self.structure.factors}
        )

    def _held(self, values: dict[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """(trained, frozen) where the factors start with these values."""
        trained = {factor.name: values[factor.name] for factor in self.trained}
        if self.anchor == "snapshot":
            trained = {name: torch.zeros_like(value) for name, value in trained.items()}
        return trained, {factor.name: values[factor.name] for factor in self.frozen}

    # Those below leave the scaling to the host, which may have changed it since (PEFT's `set_scale`). `ranks` is
    # given in training alone, by schedules that show a part of them.

    def update(
        self, trained: Factors, frozen: Factors, ranks: Ranks | None = None
    ) -> tuple[Structure, Factors]:
        """The structure of what is added to the layer, and its factors: dW, or with the anchor its change."""
        structure, trained, frozen = self._visible(trained, frozen, ranks)
        if self.anchor == "snapshot":
            return structure.changed(frozenset(trained)), structure.change(frozen, trained)
        return structure, {**frozen, **trained}

    def add_update(
        self,
        output: Tensor,
        trained: Factors,
        frozen: Factors,
        x: Tensor,
        scaling: float,
        in_place: bool = False,
        ranks: Ranks | None = None,
    ) -> Tensor:
        """output + scaling * dW x; see `fused.add_product`."""
        found = self._product(trained, frozen, ranks)
        if found is None:
            update, factors = self.update(trained, frozen, ranks)
            floating = [value for value in factors.values() if value.is_floating_point()]
            dtype = compute_dtype(x, floating, torch.is_autocast_enabled(x.device.type))
            y = update.apply(cast_factors(factors, dtype), x.to(dtype))
            return (output + (y if scaling == 1 else y * scaling)).to(output.dtype)
        return add_product(*found, output, x, scaling, in_place)

    def linear(
        self,
        weight: Tensor,
        bias: Tensor | None,
        trained: Factors,
        frozen: Factors,
        x: Tensor,
        scaling: float,
        ranks: Ranks | None = None,
    ) -> Tensor:
        """F.linear(x, weight, bias) + scaling * dW x; see `fused.linear_with_product`."""
        found = self._product(trained, frozen, ranks)
        if found is None:
            return self.add_update(F.linear(x, weight, bias), trained, frozen, x, scaling, ranks=ranks)
        return linear_with_product(*found, weight, bias, x, scaling)

    def delta(self, trained: Factors, frozen: Factors, ranks: Ranks | None = None) -> Tensor:
        """dW as a matrix (out_features, in_features), without scaling."""
        update, factors = self.update(trained, frozen, ranks)
        return update.delta(factors)

    def delta_norm(self, trained: Factors, frozen: Factors) -> float:
        """||dW||_F without scaling, in float64 (float32 on devices that have none) and without gradients.

        dW is not formed where the structure has a cheaper exact way. Waits for the device.
        """
        with torch.no_grad():
            update, factors = self.update(trained, frozen)
            device = next(iter(factors.values())).device.type
            wide = torch.float32 if device == "mps" else torch.float64
            return float(update.norm(cast_factors(factors, wide)))

    def _product(
        self, trained: Factors, frozen: Factors, ranks: Ranks | None
    ) -> tuple[Product, tuple[Tensor, ...]] | None:
        structure, trained, frozen = self._visible(trained, frozen, ranks)
        if self.anchor == "snapshot":
            return structure.change_product(frozen, trained)
        return structure.product({**frozen, **trained})

    def _visible(
        self, trained: Factors, frozen: Factors, ranks: Ranks | None
    ) -> tuple[Structure, Factors, Factors]:
        """What of the factors this forward uses, of the start as of the change."""
        if ranks is None:
            return self.structure, trained, frozen
        trained, frozen = (seen_factors(self.structure, f, ranks, self.trained) for f in (trained, frozen))
        return self.structure.cut(ranks.seen), trained, frozen


def _planned(method: str, start: str, layout: Layout, *rest: Any) -> LayerAdapter:
    """What a pickled `LayerAdapter` is made of again."""
    options = {} if layout.options is None else vars(layout.options)
    return LayerAdapter(*method_and_start(method, start, options)[:2], layout, *rest)


def plan_layer(
    options: AdapterOptions,
    in_features: int,
    out_features: int,
    layer: str,
    *,
    leading: tuple[int, ...] = (),
    trailing: tuple[int, ...] = (),
    one_hot: bool = False,
    largest: tuple[int, int] | None = None,
) -> LayerAdapter:
    """Plan one layer; nothing is allocated.

    Args:
        layer: its name, for messages and for what layers share.
        leading, trailing, one_hot: what else there is to know of the weight; see `Layout`.
        largest: (in features, out features), the most that any adapted layer of the model has; this layer's if None.

    Raises:
        NdLoraValueError: an option that cannot work on this layer.
    """
    method, start, rank = options.method, options.start, options.rank
    layout = Layout(in_features, out_features, rank, options.options, leading, trailing, one_hot)
    if method.shared is not None:
        layout = replace(layout, largest=largest or (in_features, out_features))
    scaling = options.alpha / (math.sqrt(rank) if options.use_rslora else rank)
    shape = f"{out_features} x {in_features} (out x in)"
    try:
        structure = method.structure(layout)
    except NdLoraValueError as error:
        raise NdLoraValueError(f"Layer {layer!r}, {shape}: {error}") from error
    if start.max_rank is not None and rank > start.max_rank(structure):
        raise NdLoraValueError(
            f"init_lora_weights={start.name!r} allows at most r={start.max_rank(structure)} on layer {layer!r} with "
            f"its weight of {shape}, but r={rank}. Lower r, or give this layer a smaller one in rank_pattern."
        )
    factors, share = structure.factors, method.shared or (lambda *_: None)
    for factor in factors:
        if factor.indices is not None and factor.numel > factor.indices:
            raise NdLoraValueError(
                f"method={method.name!r} chooses {factor.numel} different features with r={rank}, and layer {layer!r} "
                f"of {shape} has {factor.indices} of them. Lower r, or give this layer a smaller one in rank_pattern."
            )
    shared = tuple((f.name, key) for f in factors if (key := share(f, layer, layout)) is not None)
    own = tuple(("keeps", factor.name, factor.name) for factor in factors)
    for verb, name, key in own + tuple(("shares", *pair) for pair in shared):
        if not (isinstance(key, str) and re.fullmatch(r"\w+", key)) or hasattr(nn.ParameterDict(), key):
            raise NdLoraValueError(
                f"method={method.name!r} {verb} {name!r} of layer {layer!r} under {key!r}: a key is made of letters, "
                f"digits and underscores, and is no name that nn.ParameterDict has."
            )
    return LayerAdapter(method, start, layout, scaling, options.anchor, shared, options.save_frozen)
