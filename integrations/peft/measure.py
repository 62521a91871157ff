"""Gradients of the base weights over some batches, for starts that read them."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ndlora_plugins.errors import NdLoraTypeError, NdLoraValueError
from ndlora_plugins.integrations.peft.config import NdLoraConfig
from ndlora_plugins.integrations.peft.targets import find_targets
from ndlora_plugins.integrations.peft.weights import weight_form

__all__ = ["measure_gradients"]


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
    sums: dict[str, Tensor] = {}
    passes = 0

    def count(*_: Any) -> None:
        nonlocal passes
        passes += torch.is_grad_enabled()

    for target in targets:
        form = weight_form(target.base, target.parameter_name)
        if form is None or form.kind != "linear":
            raise NdLoraTypeError(
                f"Layer {target.name!r} of type {type(target.base).__name__} is not linear: its gradient cannot be "
                f"measured. Take it out of target_modules."
            )
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    with ExitStack() as undo:
        for parameter in trained:
            parameter.requires_grad_(False)
            undo.callback(parameter.requires_grad_, True)
        undo.callback(model.register_forward_pre_hook(count).remove)
        embedding = model.get_input_embeddings() if hasattr(model, "get_input_embeddings") else None
        if embedding is not None:  # else gradient checkpointing would pass nothing on
            undo.callback(embedding.register_forward_hook(_let_output_need_gradient).remove)
        for target in targets:
            handle = target.base.register_forward_hook(partial(_watch, target.name, sums))
            undo.callback(handle.remove)
        step()
    silent = [target.name for target in targets if target.name not in sums]
    if silent:
        raise NdLoraValueError(
            f"No gradient reached {len(silent)} layers, the first is {silent[0]!r}: `step` must call backward() on a "
            f"loss that depends on them, or exclude them (exclude_modules)."
        )
    config.session.gradients = {name: total / max(passes, 1) for name, total in sums.items()}


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
