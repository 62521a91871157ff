"""What an adapter asks of its model, checked before it goes in, and what of it is noted for the next save.

The core is imported when it is first used: registration runs at every `import peft`, so it loads little.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch
from torch import nn

from ndlora_plugins.errors import NdLoraValueError

from ..configuration.config import NdLoraConfig
from ..files.format import layer_entry
from ..layers.layer import adapted_layers
from ..layers.weights import base_weight
from .targets import Planned

if TYPE_CHECKING:
    from ndlora_plugins.adapter import LayerAdapter

__all__ = ["check_bases", "check_gradients", "check_recomputed", "check_shared"]


def check_bases(planned: list[Planned], config: NdLoraConfig) -> None:
    """Compare the model with the fingerprint that a loaded adapter brings, or take one for the next save."""
    from .fingerprint import (
        FingerprintedLayer,
        compare_fingerprint,
        make_fingerprint,
    )

    layers = [
        FingerprintedLayer(
            each.target.name,
            (each.form.out_features, each.form.in_features),
            _readable_weight(each),
            _storage(each),
        )
        for each in planned
    ]
    if config.base_fingerprint is not None:
        compare_fingerprint(
            config.base_fingerprint,
            layers,
            reads_weight=any(_reads_base(each.plan) for each in planned),
            base_name=config.base_model_name_or_path,
        )
        storage = {layer.name: layer.storage for layer in layers}
        saved = config.base_fingerprint.items()
        config.session.same_storage = all(storage[name] == entry["storage"] for name, entry in saved)
    else:
        config.session.base_fingerprint = make_fingerprint(layers)
    config.session.layers = {target.path: layer_entry(target.name, form) for target, form, *_ in planned}


def _reads_base(plan: LayerAdapter) -> bool:
    """Whether frozen factors are made again from the base weight."""
    return plan.recomputed and "weight" in plan.start.reads


def _readable_weight(planned: Planned) -> torch.Tensor | Callable[[], torch.Tensor] | None:
    """The weight (out, in), or a function that dequantises it; None if it is not there to be read in passing: on
    "meta", sharded, or quantised and not needed for the start.
    """
    target, form, backend, plan = planned[:4]
    weight = target.weight
    if getattr(weight, "is_meta", False) or hasattr(weight, "ds_id"):  # GPTQ's weight is no tensor
        return None
    if backend is not None:
        return (lambda: form.matrix(base_weight(target.base, backend))) if _reads_base(plan) else None
    if weight is None or tuple(weight.shape) != form.shape or not weight.is_floating_point():
        return None
    return form.matrix(weight)


def _storage(planned: Planned) -> str:
    """What a fingerprint calls the way the weight is stored."""
    if planned.backend is None:
        return str(getattr(planned.target.weight, "dtype", "unknown")).removeprefix("torch.")
    return planned.backend.backend_name.removeprefix("bnb ")


def check_shared(planned: Sequence[Planned]) -> None:
    """Refuse what layers share unless it is one tensor for all of them.

    Raises:
        NdLoraValueError: two layers would share tensors of different shapes under one key.
    """
    found: dict[str, tuple[str, tuple[int, ...]]] = {}
    for each in planned:
        shapes = {factor.name: factor.shape for factor in each.plan.structure.factors}
        for factor, key in each.plan.shared:
            first, shape = found.setdefault(key, (each.target.name, shapes[factor]))
            if shape != shapes[factor]:
                raise NdLoraValueError(
                    f"method={each.plan.method.name!r} shares {factor!r} under {key!r}: it is {list(shape)} on layer "
                    f"{first!r} and {list(shapes[factor])} on layer {each.target.name!r}. Adapt layers of one shape "
                    f"only (target_modules, exclude_modules)."
                )


def check_gradients(planned: Sequence[Planned], config: NdLoraConfig) -> None:
    """A start that reads gradients needs those that were measured, unless the adapter is loaded from a file.

    Raises:
        NdLoraValueError: they are not there, or of another shape than a layer.
    """
    if config.base_fingerprint is not None:
        return
    reads = [each for each in planned if "gradient" in each.plan.start.reads]
    if config.gradient_batches is not None and not reads:
        raise NdLoraValueError(
            f"gradient_batches={config.gradient_batches}: the start of method={config.method!r} with "
            f"init_lora_weights={config.init_lora_weights!r} reads no gradients. Leave it out."
        )
    if config.gradient_batches is not None and not config.session.gradients:
        return  # they are measured before the first step
    for each in reads:
        gradient = config.session.gradients.get(each.target.name)
        if gradient is None or tuple(gradient.shape) != each.form.matrix_shape:
            raise NdLoraValueError(
                f"init_lora_weights={each.plan.start.name!r} reads the gradient of layer {each.target.name!r}, and "
                f"{'none was measured' if gradient is None else f'the one measured is {list(gradient.shape)}'}: call "
                f"ndlora_plugins.measure_gradients(model, config, step) before get_peft_model; or set "
                f"gradient_batches, and NdLoraCallback measures them on the trainer's own data."
            )


def check_recomputed(model: nn.Module, config: NdLoraConfig, adapter: str) -> None:
    """Hold factors that are made again at load against those of the training, or note them for the next save.

    Raises:
        NdLoraValueError: a factor comes out as another one than in training.
    """
    from .fingerprint import checksum, compare_checksum

    found = {}
    for layer in adapted_layers(model, adapter):
        if not layer.plan[adapter].recomputed:
            continue
        frozen = layer.tensors(adapter)[1]
        compare_checksum(config.checksums, layer.name, frozen, exact=config.session.same_storage)
        if config.checksums is None:
            found[layer.name] = checksum(frozen)
    config.session.checksums = {name: sums for name, sums in found.items() if sums is not None} or None
