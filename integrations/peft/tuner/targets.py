"""Which weights a configuration adapts, and the plan of each.

The core is imported when it is first used: registration runs at every `import peft`, so it loads little.
"""

from __future__ import annotations

import copy
import zlib
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer, _maybe_include_all_linear_layers
from peft.utils.quantization_utils import ForwardOnlyQuantizationBackend, QuantizationBackend
from torch import nn

from ndlora_plugins.errors import NdLoraTypeError, NdLoraValueError

from ..configuration.config import NdLoraConfig
from ..layers.weights import (
    WeightForm,
    quantization_backend,
    weight_form,
)
from .towers import SHORTHANDS, layers_of_part

if TYPE_CHECKING:
    from ndlora_plugins.adapter import LayerAdapter
    from ndlora_plugins.options import AdapterOptions

__all__ = [
    "Planned",
    "Target",
    "fill_in_targets",
    "find_targets",
    "layer_generator",
    "largest",
    "matched_targets",
    "plan_form",
    "plan_model",
    "plan_target",
    "plan_targets",
    "target_form",
]

# what PEFT trains in full for a task, though the configuration does not name it yet
_HEADS = {
    "SEQ_CLS": ("classifier", "score"),
    "TOKEN_CLS": ("classifier", "score"),
    "QUESTION_ANS": ("qa_outputs",),
}


# model type -> the layers whose weights transformers' fused kernels read in training; the first two names are what PEFT
# refuses for LoRA
_MIXER = frozenset({"out_proj", "conv1d"})
_UNCALLED: dict[str | None, frozenset[str]] = {
    **dict.fromkeys(("mamba2", "falcon_h1", "nemotron_h"), _MIXER),
    **dict.fromkeys(("mamba", "falcon_mamba"), _MIXER | {"x_proj", "dt_proj"}),
}


class Target(NamedTuple):
    """A weight that a configuration adapts.

    Attributes:
        name: of the layer in the model, without adapters; of the parameter where a bare one is adapted.
        base: the layer.
        parameter_name: its bare parameter; None for its weight.
        path: the layer's name in the adapter's file. PEFT nests the wrappers of several parameters of one module.
    """

    name: str
    base: nn.Module
    parameter_name: str | None
    path: str

    @property
    def weight(self) -> torch.Tensor | None:
        """The parameter as it lies in the layer."""
        return getattr(self.base, self.parameter_name or "weight", None)


class Planned(NamedTuple):
    """A target, how its weight is read, its quantisation if any, its adapter, and the alpha of its scaling."""

    target: Target
    form: WeightForm
    backend: QuantizationBackend | None
    plan: LayerAdapter
    alpha: float


def plan_model(model: nn.Module, config: NdLoraConfig) -> list[tuple[str, LayerAdapter]]:
    """Plan every layer that `config` adapts: (name, plan), in the model's order. Changes neither.

    The weights are not read: a model on the "meta" device will do.

    Raises:
        NdLoraValueError, NdLoraTypeError: as adding the adapter would.
    """
    planned = plan_targets(config, find_targets(model, config), config.resolved())
    return [(each.target.name, each.plan) for each in planned]


def find_targets(model: nn.Module, config: NdLoraConfig) -> list[Target]:
    """Every weight that `config` adapts, in the model's order. Changes neither."""
    config = copy.deepcopy(config)
    fill_in_targets(config, model)
    return list(matched_targets(config, model))


def fill_in_targets(config: NdLoraConfig, model: nn.Module) -> str | list[str] | None:
    """None, "all-linear", "language-linear" and "vision-linear" become the set of names; returns what was there.

    Raises:
        NdLoraValueError: the model has no linear layer, or no such part.
    """
    if config.target_modules is None and not config.target_parameters:
        config.target_modules = "all-linear"
    asked = config.target_modules
    shorthand = asked.lower() if isinstance(asked, str) else None
    if shorthand in SHORTHANDS:
        config.target_modules = "all-linear"
    all_linear = isinstance(config.target_modules, str) and config.target_modules.lower() == "all-linear"
    _maybe_include_all_linear_layers(config, model)
    if not all_linear:
        return asked
    whole = {*_HEADS.get(config.task_type or "", ()), *(config.modules_to_save or ())}
    names = {
        name
        for name in config.target_modules or ()
        if not any(f".{entry}." in f".{name}." for entry in whole)
        and name.rpartition(".")[2] not in _uncalled(model)
    }
    if shorthand in SHORTHANDS:
        names = layers_of_part(shorthand, names, model)
    if not names:
        raise NdLoraValueError(
            f"{type(model).__name__} has no linear layer, which target_modules='all-linear' (the default) takes: "
            f"name the layers to adapt in target_modules; convolutions and embeddings can be too."
        )
    # without those that exclude_modules and layers_to_transform leave out; PEFT does not look at the index of the layer
    # where a name is a full one
    by_end = copy.copy(config)
    by_end.target_modules = sorted({name.rpartition(".")[2] for name in names})
    names = {name for name in names if BaseTuner._check_target_module_exists(by_end, name)}
    config.target_modules = names  # pyright: ignore[reportAttributeAccessIssue]  a set, as PEFT makes one
    return asked


def _uncalled(model: nn.Module) -> frozenset[str]:
    """The names of layers that a model does not call in training."""
    return _UNCALLED.get(getattr(getattr(model, "config", None), "model_type", None), frozenset())


def matched_targets(config: NdLoraConfig, model: nn.Module) -> Iterator[Target]:
    """Match as PEFT does `target_modules` and `target_parameters`.

    Raises:
        NdLoraValueError: a new adapter would lie on a layer that the model does not call in training.
    """
    inside = ()
    for name, module in model.named_modules():
        if not name or name.startswith(inside or ("\0",)):
            continue
        if isinstance(module, BaseTunerLayer):
            inside = (*inside, f"{name}.")
        if BaseTuner._check_target_module_exists(config, name):
            # in inference such layers are called, so an adapter from a file may have them
            if config.base_fingerprint is None and name.rpartition(".")[2] in _uncalled(model):
                raise NdLoraValueError(
                    f"method={config.method!r} cannot adapt layer {name!r}: in training {type(model).__name__} reads "
                    f"its weight and does not call it, so that an adapter would learn nothing. Take it out of "
                    f"target_modules, or name it in exclude_modules."
                )
            yield Target(
                name, module.get_base_layer() if isinstance(module, BaseTunerLayer) else module, None, name
            )
    wanted = tuple(config.target_parameters or ())
    for path, module in model.named_modules() if wanted else ():
        if isinstance(module, BaseTunerLayer):
            continue  # its base layer comes later
        name = path.replace(".base_layer", "")
        found = [
            parameter
            for parameter, _ in module.named_parameters(recurse=False)
            if any(f".{name}.{parameter}".endswith(f".{entry}") for entry in wanted)
        ]
        for depth, parameter in enumerate(reversed(found)):  # the last one is wrapped outermost
            yield Target(f"{name}.{parameter}", module, parameter, name + depth * ".base_layer")


def plan_targets(
    config: NdLoraConfig, targets: Iterable[Target], resolved: AdapterOptions, **quantization: Any
) -> list[Planned]:
    """Plan all targets of a model, as `plan_target` does one."""
    forms = [(target, target_form(config, target)) for target in targets]
    widest = largest(form for _, form in forms)
    return [plan_target(config, target, form, resolved, widest, **quantization) for target, form in forms]


def layer_generator(seed: int | None, path: str) -> torch.Generator | None:
    """The generator that a layer's start draws from; None, the global generator, without a seed.

    Args:
        path: the layer's name in the adapter's file.
    """
    # of its own for each layer, so that their order does not matter; 32 bits are all that torch uses
    return None if seed is None else torch.Generator().manual_seed(zlib.crc32(f"{seed} {path}".encode()))


def largest(forms: Iterable[WeightForm]) -> tuple[int, int]:
    """The most (in features, out features) of these; (0, 0) of none."""
    forms = list(forms)
    ins = max((form.in_features for form in forms), default=0)
    return ins, max((form.out_features for form in forms), default=0)


def target_form(config: NdLoraConfig, target: Target) -> WeightForm:
    """The form of a target's weight; refuses what cannot be adapted.

    Raises:
        NdLoraValueError, NdLoraTypeError: with the layer's name.
    """
    if hasattr(target.weight, "device_mesh"):
        raise NdLoraTypeError(
            f"method={config.method!r} cannot adapt layer {target.name!r}: its weight is split over several processes "
            f"(tensor parallelism or FSDP2). Add the adapter to the whole model and shard it after that, with FSDP2; "
            f"under tensor parallelism NDLORA does not work."
        )
    form = weight_form(target.base, target.parameter_name)
    if form is None and target.parameter_name is not None:
        shape = list(getattr(target.base, target.parameter_name).shape)
        raise NdLoraTypeError(
            f"method={config.method!r} cannot adapt the parameter {target.name!r} of shape {shape}: a matrix "
            f"(out, in) or a stack of them (experts, out, in) can be. Take it out of target_parameters."
        )
    if form is None:
        raise NdLoraTypeError(
            f"method={config.method!r} cannot adapt layer {target.name!r} of type {type(target.base).__name__}: "
            f"nn.Linear (quantised too), transformers' Conv1D, nn.Embedding, nn.Conv1d, nn.Conv2d and nn.Conv3d can "
            f"be. Take it out of target_modules, or name it in exclude_modules."
        )
    if form.kind == "parameter" and config.lora_dropout:
        raise NdLoraValueError(
            f"lora_dropout={config.lora_dropout} cannot be used on the parameter {target.name!r}: its update is added "
            f"to the parameter, which has no input. Set lora_dropout=0."
        )
    return form


def plan_target(
    config: NdLoraConfig,
    target: Target,
    form: WeightForm,
    resolved: AdapterOptions,
    widest: tuple[int, int],
    get_apply_tensor_subclass: Any = None,
) -> Planned:
    """Plan one target.

    Args:
        form: its `target_form`.
        resolved: `config.resolved()`.
        widest: `largest` of all adapted layers.
        get_apply_tensor_subclass: as PEFT's `get_quantization_kwargs` gives it.

    Raises:
        NdLoraValueError, NdLoraTypeError: with the layer's name.
    """
    options = config.options_for(target.name, resolved)
    plan = plan_form(options, target.name, form, widest)
    backend = None
    if target.parameter_name is None:
        backend = quantization_backend(target.base, get_apply_tensor_subclass)
    if "weight" in plan.start.reads and isinstance(backend, ForwardOnlyQuantizationBackend):
        raise NdLoraTypeError(
            f"method={config.method!r} with init_lora_weights={config.init_lora_weights!r} reads its start from the "
            f"weight of layer {target.name!r}, which is quantised with {backend.backend_name}: PEFT cannot dequantise "
            f"it. Use a start that does not read the weight (`ndlora methods`), or load the base model in 16 or 32 bit."
        )
    return Planned(target, form, backend, plan, options.alpha)


def plan_form(
    options: AdapterOptions, name: str, form: WeightForm, widest: tuple[int, int] | None = None
) -> LayerAdapter:
    """The plan of one weight.

    Args:
        options: what `NdLoraConfig.options_for` says of the layer.
        name: of the layer.
        widest: `largest` of all adapted layers.
    """
    from ndlora_plugins.adapter import plan_layer
    from ndlora_plugins.budget import check_size

    plan = plan_layer(
        options,
        form.in_features,
        form.out_features,
        layer=name,
        leading=form.leading,
        trailing=form.trailing,
        one_hot=form.kind == "embedding",
        largest=widest,
    )
    check_size(plan, name)
    return plan
