"""What is compared: a layer or a model, bare or with an adapter, all around the same frozen weights."""

from __future__ import annotations

import contextlib
import copy
import math
import warnings
from collections.abc import Callable

import torch
from peft import LoKrConfig, LoraConfig, PeftConfig, VeraConfig, get_peft_model
from torch import Tensor, nn

from ndlora_plugins import NdLoraConfig
from ndlora_plugins.kernels import modes
from ndlora_plugins.methods.modes import balanced_modes

__all__ = ["BASELINE", "CORES", "KRONECKER", "ON_CUDA", "OURS", "VARIANTS", "adapt", "shake"]

BASELINE = "LoRA"
KRONECKER = ("NdLinear", "NdLinear, crossed")
CORES = ("SLoRA", "NLoRA", "IntTune")
OURS = (*KRONECKER, *CORES)


class ReferenceNdLinear(nn.Module):
    """NdLinear-LoRA as its reference writes it: one mode after the other, each between two transposed copies.

    Source: https://github.com/ensemble-core/NdLinear (`ndlinear.py`, `NdLinear.forward`).
    """

    def __init__(self, base_layer: nn.Linear):
        super().__init__()
        self.base_layer = base_layer
        self.in_modes = balanced_modes(base_layer.in_features, 2)
        self.out_modes = balanced_modes(base_layer.out_features, 2)
        self.modes = nn.ModuleList(
            nn.Linear(i, o, bias=False, dtype=base_layer.weight.dtype, device=base_layer.weight.device)
            for i, o in zip(self.in_modes, self.out_modes, strict=True)
        )

    def forward(self, x: Tensor) -> Tensor:
        y = x.reshape(-1, *self.in_modes)
        for axis, mode in enumerate(self.modes, start=1):
            y = y.transpose(axis, 2).contiguous()
            y = mode(y.view(-1, y.shape[2])).view(*y.shape[:2], -1)
            y = y.transpose(axis, 2).contiguous()
        return self.base_layer(x) + 1.0 * y.view(*x.shape[:-1], -1)


def _reference(model: nn.Module, targets: list[str], rank: int) -> nn.Module:
    model.requires_grad_(False)
    for name, module in list(model.named_modules()):
        if name.rpartition(".")[2] in targets:
            model.set_submodule(name, ReferenceNdLinear(module))
    return model


def _peft(config: Callable[[list[str], int], PeftConfig]):
    return lambda model, targets, rank: get_peft_model(model, config(targets, rank))


_WIDEST = 1 << 20  # a rank above every factor's size: LoKr keeps both factors whole

# name -> (model, names of the layers, rank) -> the model with the adapter
VARIANTS: dict[str, Callable[[nn.Module, list[str], int], nn.Module]] = {
    "no adapter": lambda model, targets, rank: model.requires_grad_(False),
    BASELINE: _peft(lambda targets, rank: LoraConfig(r=rank, lora_alpha=rank, target_modules=targets)),
    "DoRA": _peft(
        lambda targets, rank: LoraConfig(r=rank, lora_alpha=rank, use_dora=True, target_modules=targets)
    ),
    "VeRA": _peft(lambda targets, rank: VeraConfig(target_modules=targets)),
    "LoKr": _peft(
        lambda targets, rank: LoKrConfig(
            r=_WIDEST, alpha=_WIDEST, decompose_factor=-1, target_modules=targets
        )
    ),
    "reference NdLinear": _reference,
    "NdLinear": _peft(lambda targets, rank: NdLoraConfig(method="ndlinear", target_modules=targets)),
    "NdLinear, crossed": _peft(lambda targets, rank: NdLoraConfig(method="crossed", target_modules=targets)),
    "SLoRA": _peft(lambda targets, rank: NdLoraConfig(method="slora", r=rank, target_modules=targets)),
    "NLoRA": _peft(lambda targets, rank: NdLoraConfig(method="nlora", r=rank, target_modules=targets)),
    "IntTune": _peft(lambda targets, rank: NdLoraConfig(method="inttune", r=rank, target_modules=targets)),
}


def _triton(model: nn.Module, targets: list[str], rank: int) -> nn.Module:
    """NdLinear by its Triton kernels. What forward takes, backward takes."""
    from ndlora_plugins.kernels.triton_modes import triton_mode_product

    @contextlib.contextmanager
    def kernels():
        modes.others.append(triton_mode_product)
        try:
            yield
        finally:
            modes.others.remove(triton_mode_product)

    model = VARIANTS["NdLinear"](model, targets, rank)
    # hooks of the whole model would not be called by `generate`
    for name in ("forward", "generate"):
        if hasattr(model, name):
            setattr(model, name, kernels()(getattr(model, name)))
    return model


# what is there on a GPU alone, beside VARIANTS. Not of crossed modes: theirs are too large for the kernels
ON_CUDA = {"NdLinear, Triton": _triton}


def adapt(variant: str, model: nn.Module, targets: list[str], rank: int = 8) -> nn.Module:
    """A copy of `model` with the adapter on the layers named `targets`; the base weights are shared."""
    shared = {id(tensor): tensor for tensor in [*model.parameters(), *model.buffers()]}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return shake((VARIANTS | ON_CUDA)[variant](copy.deepcopy(model, shared), targets, rank))


def shake(model: nn.Module) -> nn.Module:
    """Move what trains away from its start: a product with zeros may be cheaper."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.1 / math.sqrt(parameter.shape[-1]))
    return model
