"""Gradients of the base weights over some batches, for starts that read them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import ExitStack
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn

from ndlora_plugins.errors import NdLoraTypeError, NdLoraValueError

from .configuration.config import NdLoraConfig
from .layers.layer import adapted_layers
from .layers.weights import weight_form
from .tuner.targets import find_targets, layer_generator

__all__ = ["measure_gradients", "start_from_gradients", "waits_for_gradients"]


def measure_gradients(model: nn.Module, config: NdLoraConfig, step: Callable[[], Any]) -> None:
    """Measure the gradient of every weight that `config` adapts, and keep it in `config` for `get_peft_model`.

    Works on quantised models too: a weight's gradient is made of what goes into its layer and of the gradient of what
    comes out, and no weight gets one of its own. One float32 matrix of the weight's size is held for each layer.

    Args:
        model: the base model, before the adapter is added.
        config: whose `init_lora_weights` is a start that reads gradients.
        step: runs the model on some batches and calls `backward()` on each loss, as PEFT's `preprocess_loraga` asks
            for it. The mean over the forward passes of the model is kept.

    Raises:
        NdLoraTypeError: a layer that is not linear.
        NdLoraValueError: `step` brought no gradient to a layer.
    """
    targets = find_targets(model, config)
    for target in targets:
        form = weight_form(target.base, target.parameter_name)
        _check_linear(target.name, target.base, None if form is None else form.kind)
    config.session.gradients = _measured(model, {target.name: target.base for target in targets}, step)


def start_from_gradients(model: nn.Module, adapter: str, step: Callable[[], Any]) -> None:
    """Measure the gradients of the weights under an adapter that is in the model, and start it from them.

    The parameters stay the same objects, so that an optimizer may have them already. Every process is to call it: the
    gradients are the mean of all.

    Args:
        model: a PEFT model, or one whose layers are adapted without one.
        adapter: one that has no values yet (`waits_for_gradients`).
        step: as for `measure_gradients`.

    Raises:
        NdLoraTypeError: a layer that is not linear.
        NdLoraValueError: `step` brought no gradient to a layer, or layers share factors of the start.
    """
    layers = adapted_layers(model, adapter)
    for layer in layers:
        _check_linear(layer.name, layer.get_base_layer(), layer.form.kind)
        if layer.plan[adapter].shared:
            raise NdLoraValueError(
                f"method={layer.plan[adapter].method.name!r} shares factors between layers: measure its gradients "
                f"before they are made, with measure_gradients(model, config, step), and leave gradient_batches out."
            )
    found = _measured(model, {layer.name: layer.get_base_layer() for layer in layers}, step)
    distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
    with torch.no_grad():
        for layer in layers:
            gradient = found.pop(layer.name)
            if distributed:
                torch.distributed.all_reduce(gradient)
                gradient /= torch.distributed.get_world_size()
            seed = cast(Any, model).peft_config[adapter].random_seed
            trained, frozen = layer._initialize(
                adapter, layer.plan[adapter], gradient, layer_generator(seed, layer.name)
            )
            holders = [(layer.ndlora_factors[adapter], trained)]
            if adapter in layer.ndlora_frozen:
                holders.append((layer.ndlora_frozen[adapter], frozen))
            for holder, values in holders:
                for name, value in values.items():
                    getattr(holder, name).copy_(value)


def waits_for_gradients(model: nn.Module, adapter: str) -> bool:
    """Tell whether an adapter's start reads gradients, and has no values yet, neither of these nor of a file."""
    layers = adapted_layers(model, adapter)
    return any("gradient" in layer.plan[adapter].start.reads for layer in layers) and not any(
        value.any() for layer in layers for group in layer.tensors(adapter) for value in group.values()
    )


def _check_linear(name: str, module: nn.Module, kind: str | None) -> None:
    if kind != "linear":
        raise NdLoraTypeError(
            f"Layer {name!r} of type {type(module).__name__} is not linear: its gradient cannot be measured. Take it "
            f"out of target_modules."
        )


def _measured(
    model: nn.Module, modules: Mapping[str, nn.Module], step: Callable[[], Any]
) -> dict[str, Tensor]:
    """Name -> mean gradient of the module's weight, over the forwards of `step`."""
    sums: dict[str, Tensor] = {}
    passes = 0

    def count(*_: Any) -> None:
        nonlocal passes
        passes += torch.is_grad_enabled()

    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    with ExitStack() as undo:
        for parameter in trained:
            parameter.requires_grad_(False)
            undo.callback(parameter.requires_grad_, True)
        undo.callback(model.register_forward_pre_hook(count).remove)
        embedding = getattr(model, "get_input_embeddings", lambda: None)()
        if embedding is not None:  # else gradient checkpointing would pass nothing on
            undo.callback(embedding.register_forward_hook(_let_output_need_gradient).remove)
        for name, module in modules.items():
            undo.callback(module.register_forward_hook(partial(_watch, name, sums)).remove)
        step()
    silent = [name for name in modules if name not in sums]
    if silent:
        raise NdLoraValueError(
            f"No gradient reached {len(silent)} layers, the first is {silent[0]!r}: `step` must call backward() on a "
            f"loss that depends on them, or exclude them (exclude_modules)."
        )
    return {name: total / max(passes, 1) for name, total in sums.items()}


def _let_output_need_gradient(module: nn.Module, args: Any, output: Tensor) -> Tensor:
    return output.requires_grad_() if torch.is_grad_enabled() else output


def _watch(name: str, sums: dict[str, Tensor], module: nn.Module, args: tuple, output: Tensor) -> Tensor:
    """A forward hook: adds the gradient of the weight (out, in) when that of the output arrives."""
    if not torch.is_grad_enabled():
        return output
    if not output.requires_grad:  # nothing before it trains
        output = output.detach().requires_grad_()
    x = args[0].detach()

    def add(gradient: Tensor) -> None:
        # (tokens, out)^T (tokens, in)
        product = gradient.reshape(-1, gradient.shape[-1]).float().T @ x.reshape(-1, x.shape[-1]).float()
        sums[name] = product if name not in sums else sums[name].add_(product)

    output.register_hook(add)
    return output
