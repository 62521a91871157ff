"""The tuner: finds the layers, plans and checks everything, then puts the adapters in.

The core is imported when it is first used: registration, which runs at `import peft`, is to cost under 5 ms.
"""

from __future__ import annotations

import copy
import re
import warnings
import zlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import TYPE_CHECKING, NamedTuple

import torch
from peft import __version__ as peft_version
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer, _maybe_include_all_linear_layers
from peft.utils import AuxiliaryTrainingWrapper
from peft.utils.quantization_utils import (
    ForwardOnlyQuantizationBackend,
    QuantizationBackend,
    get_quantization_kwargs,
)
from torch import nn

from ndlora_plugins.errors import (
    LopsidedModesWarning,
    NdLoraTypeError,
    NdLoraValueError,
    UnmatchedTargetWarning,
)
from ndlora_plugins.integrations.peft.config import NdLoraConfig
from ndlora_plugins.integrations.peft.layer import LAYER_KINDS, NdLoraLayer
from ndlora_plugins.integrations.peft.registration import PREFIX
from ndlora_plugins.integrations.peft.rows import check_rows
from ndlora_plugins.integrations.peft.undo import undone_on_failure
from ndlora_plugins.integrations.peft.weights import (
    WeightForm,
    base_weight,
    quantization_backend,
    weight_form,
)

if TYPE_CHECKING:
    from ndlora_plugins.adapter import LayerAdapter

__all__ = ["NdLoraModel", "Target", "find_targets", "plan_model"]


# what PEFT trains in full for a task, though the configuration does not name it yet
_HEADS = {
    "SEQ_CLS": ("classifier", "score"),
    "TOKEN_CLS": ("classifier", "score"),
    "QUESTION_ANS": ("qa_outputs",),
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


class Planned(NamedTuple):
    """A target, how its weight is read, its quantisation if any, and its adapter."""

    target: Target
    form: WeightForm
    backend: QuantizationBackend | None
    plan: LayerAdapter


def plan_model(model: nn.Module, config: NdLoraConfig) -> list[tuple[str, LayerAdapter]]:
    """Plan every layer that `config` adapts: (name, plan), in the model's order. Changes neither.

    The weights are not read: a model on the "meta" device will do.

    Raises:
        NdLoraValueError, NdLoraTypeError: as adding the adapter would.
    """
    return [(target.name, _plan(config, target).plan) for target in find_targets(model, config)]


def find_targets(model: nn.Module, config: NdLoraConfig) -> list[Target]:
    """Every weight that `config` adapts, in the model's order. Changes neither."""
    config = copy.deepcopy(config)
    _fill_in_targets(config, model)
    return list(_matched(config, model))


def _fill_in_targets(config: NdLoraConfig, model: nn.Module) -> None:
    """None and "all-linear" become the set of names."""
    if config.target_modules is None and not config.target_parameters:
        config.target_modules = "all-linear"
    all_linear = isinstance(config.target_modules, str) and config.target_modules.lower() == "all-linear"
    _maybe_include_all_linear_layers(config, model)
    if all_linear:
        whole = {*_HEADS.get(config.task_type, ()), *(config.modules_to_save or ())}
        config.target_modules = {
            name for name in config.target_modules if not any(f".{entry}." in f".{name}." for entry in whole)
        }
    if all_linear and config.layers_to_transform is not None:
        # the names are full ones, and for those PEFT does not look at the index of the layer
        config.target_modules = {name for name in config.target_modules if _is_in_layers(config, name)}


def _is_in_layers(config: NdLoraConfig, name: str) -> bool:
    """Whether `layers_to_transform` lets the module `name` have an adapter."""
    by_end = copy.copy(config)
    by_end.target_modules = {name.rpartition(".")[2]}
    return bool(BaseTuner._check_target_module_exists(by_end, name))


def _matched(config: NdLoraConfig, model: nn.Module) -> Iterator[Target]:
    """As PEFT matches `target_modules` and `target_parameters`."""
    inside = ()
    for name, module in model.named_modules():
        if not name or name.startswith(inside or ("\0",)):
            continue
        if isinstance(module, BaseTunerLayer):
            inside = (*inside, f"{name}.")
        if BaseTuner._check_target_module_exists(config, name):
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


def _plan(config: NdLoraConfig, target: Target) -> Planned:
    if hasattr(_weight(target), "device_mesh"):
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
    plan = plan_form(config, target.name, form)
    backend = quantization_backend(target.base) if target.parameter_name is None else None
    if plan.initializer.reads_weight and isinstance(backend, ForwardOnlyQuantizationBackend):
        raise NdLoraTypeError(
            f"method={config.method!r} with init_lora_weights={config.init_lora_weights!r} reads its start from the "
            f"weight of layer {target.name!r}, which is quantised with {backend.backend_name}: PEFT cannot dequantise "
            f"it. Use method='ndlinear' or 'slora', or load the base model in 16 or 32 bit."
        )
    return Planned(target, form, backend, plan)


def plan_form(config: NdLoraConfig, name: str, form: WeightForm) -> LayerAdapter:
    """The plan of one weight."""
    from ndlora_plugins.adapter import plan_layer
    from ndlora_plugins.budget import check_size

    plan = plan_layer(
        config.options_for(name),
        form.in_features,
        form.out_features,
        layer=name,
        leading=form.leading,
        trailing=form.trailing,
        one_hot=form.kind == "embedding",
    )
    check_size(plan, name)
    return plan


class NdLoraModel(BaseTuner):
    """Adds NDLORA adapters to a model; made by `get_peft_model` and `PeftModel.from_pretrained`.

    Args:
        model: any `nn.Module`.
        config: an `NdLoraConfig`, or a dict of adapter name to one.
        adapter_name: of the adapter to add.
    """

    prefix = PREFIX
    tuner_layer_cls = NdLoraLayer
    target_module_mapping: dict = {}

    def inject_adapter(self, *args, **kwargs) -> None:
        """As PEFT's; a failure halfway, such as no memory left, leaves the model as it was."""
        with undone_on_failure(self):
            super().inject_adapter(*args, **kwargs)

    def _prepare_adapter_config(self, peft_config, model_config):
        return peft_config  # `_prepare_model` fills in the targets, as it has the model

    def _prepare_model(self, peft_config: NdLoraConfig, model: nn.Module) -> None:
        """Everything that can be wrong is found here, before a layer is replaced."""
        self._check_target_parameters(peft_config)
        if peft_config.bias != "none" and not hasattr(BaseTuner, "_get_adapter_state_dict"):
            raise NdLoraValueError(
                f"bias={peft_config.bias!r}: peft {peft_version} saves the biases of its own tuner types only, so the "
                f"trained ones would be lost. Upgrade to peft 0.21 or later, or use bias='none'."
            )
        _fill_in_targets(peft_config, model)
        planned = [_plan(peft_config, target) for target in _matched(peft_config, model)]
        if not planned:
            return  # PEFT raises, and says why nothing matched
        self._check_adapter_names(each.plan for each in planned)
        check_rows(peft_config, model, {each.target.name for each in planned})
        _check_bases(planned, peft_config)
        _warn_of_unmatched(peft_config, [each.target.name for each in planned])
        _warn_of_lopsided(planned)

    def _check_target_parameters(self, peft_config: NdLoraConfig) -> None:
        """Which parameter a tensor of the file belongs to is told by the nesting of the wrappers, so it is to be one
        for all adapters.
        """
        for name, other in self.peft_config.items():
            wanted = set(peft_config.target_parameters or ())
            if other is not peft_config and wanted and other.target_parameters:
                if set(other.target_parameters) != wanted:
                    raise NdLoraValueError(
                        f"target_parameters={sorted(wanted)} differs from that of adapter {name!r}, "
                        f"{sorted(other.target_parameters)}: all adapters of a model must name the same parameters."
                    )

    def _check_adapter_names(self, plans: Iterable[LayerAdapter]) -> None:
        """PEFT takes a key that ends in another adapter's name for that adapter's, so no adapter may have the
        name of a tensor.
        """
        present = [
            plan
            for layer in self.model.modules()
            if isinstance(layer, NdLoraLayer)
            for plan in layer.plan.values()
        ]
        tensors = {factor.name for plan in (*present, *plans) for factor in (*plan.trained, *plan.frozen)}
        for name in {*tensors, "ndlora_factors", "ndlora_frozen"} & set(self.peft_config):
            raise NdLoraValueError(
                f"An adapter cannot be called {name!r}: this is the name of one of the tensors of an NDLORA adapter, "
                f"and PEFT could not tell the two apart in a file. Choose another adapter name."
            )

    def _create_and_replace(
        self, peft_config, adapter_name, target, target_name, parent, current_key, parameter_name=None
    ):
        base = target.get_base_layer() if isinstance(target, BaseTunerLayer) else target
        generator = None
        if peft_config.random_seed is not None:
            # of its own for each layer, so that their order does not matter; 32 bits are all that torch uses
            seed = zlib.crc32(f"{peft_config.random_seed} {current_key}".encode())
            generator = torch.Generator().manual_seed(seed)
        form = weight_form(base, parameter_name)
        plan = plan_form(peft_config, current_key, form)
        arguments = {
            "lora_alpha": peft_config.options_for(current_key).alpha,
            "lora_dropout": peft_config.lora_dropout,
            "generator": generator,
            "inference_mode": peft_config.inference_mode,
        }
        existing = self._existing_layer(target, parameter_name)
        if existing is not None:
            existing.update_layer(adapter_name, plan, **arguments)
            return
        layer = LAYER_KINDS[form.kind](
            target,
            adapter_name,
            plan,
            parameter_name=parameter_name,
            **arguments,
            **get_quantization_kwargs(self.model),
        )
        if adapter_name not in self.active_adapters:
            layer.requires_grad_(False)  # a further adapter does not train before it is made active
        self._replace_module(parent, target_name, layer, target)

    @staticmethod
    def _existing_layer(target: nn.Module, parameter_name: str | None) -> NdLoraLayer | None:
        """The layer to which a further adapter is added, among nested wrappers the one of that parameter."""
        while isinstance(target, NdLoraLayer):
            if target.parameter_name == parameter_name:
                return target
            target = target.base_layer
        return None

    def _add_modules_to_save_to_tie(self, peft_config: NdLoraConfig, tied_weight_keys: list[str]) -> None:
        """For `ensure_weight_tying`: of the tied modules the embedding is trained; PEFT gives the others its copy."""
        embedding = self.model.get_input_embeddings()
        name = next(name for name, module in self.model.named_modules() if module is embedding)

        def is_named(entry: str, *names: str) -> bool:
            return any(name == entry or name.endswith(f".{entry}") for name in names)

        kept = [entry for entry in peft_config.modules_to_save if not is_named(entry, *tied_weight_keys)]
        if not any(is_named(entry, name) for entry in kept):
            kept.append(name)
        peft_config.modules_to_save = kept
        peft_config.modules_to_tie = set(tied_weight_keys)

    def _replace_module(self, parent, child_name, new_module, child):
        if isinstance(new_module, NdLoraLayer):
            super()._replace_module(parent, child_name, new_module, child)
        else:  # unloading: the base layer keeps its own weight, which PEFT would assign once more, or not at all
            setattr(parent, child_name, new_module)

    @contextmanager
    def _enable_peft_forward_hooks(self, *args, adapter_names: list[str] | None = None, **kwargs):
        """PEFT calls this around `forward` and `generate`: brings `adapter_names` to every layer with adapters.

        Args:
            adapter_names: for each sample of the batch the adapter to use; "__base__" for none.

        Raises:
            NdLoraValueError: the model is in training mode, or an adapter does not exist.
        """
        if adapter_names is None:
            yield
            return
        if self.training:
            raise NdLoraValueError(
                "Cannot pass `adapter_names` when the model is in training mode: call eval()."
            )
        unknown = set(adapter_names) - {"__base__", *self.peft_config}
        if unknown:
            raise NdLoraValueError(
                f"Trying to infer with non-existing adapter(s): {', '.join(sorted(unknown))}. There are: "
                f"{', '.join(self.peft_config)}."
            )
        # beam search repeats every sample, but not in an encoder
        repeated = [name for name in adapter_names for _ in range(kwargs.get("num_beams") or 1)]
        encoder = self.model.get_encoder() if hasattr(self.model, "get_encoder") else None
        inside_encoder = set() if encoder in (None, self.model) else set(encoder.modules())
        with ExitStack() as hooks:
            for module in self.model.modules():
                if isinstance(module, (NdLoraLayer, AuxiliaryTrainingWrapper)):
                    names = list(adapter_names) if module in inside_encoder else repeated
                    hook = module.register_forward_pre_hook(partial(_pass_names, names), with_kwargs=True)
                    hooks.callback(hook.remove)
            yield

    def add_weighted_adapter(
        self,
        adapters: list[str],
        weights: list[float],
        adapter_name: str,
        combination_type: str = "cat",
        svd_rank: int | None = None,
        density: float | None = None,
        majority_sign_method: str = "total",
    ) -> None:
        """Add an adapter whose update is sum_i weights[i] times the update of adapters[i].

        Args:
            combination_type: "cat" or "linear", which are the same here: the sum is exact, and the ranks add up. Or
                "svd", "ties_svd", "dare_linear_svd", "dare_ties_svd", "magnitude_prune_svd": the updates are pruned,
                added up, and the leading singular vectors kept, as an adapter of method "slora".
            svd_rank: how many of them; the largest rank of the adapters by default, but to be given for ndlinear.
            density: the share of the entries that pruning keeps.
            majority_sign_method: of the two with "ties", as in `LoraModel.add_weighted_adapter`.

        Raises:
            NdLoraValueError: another combination type, or a sum that cannot be one adapter.
        """
        from ndlora_plugins.integrations.peft.combine import Combination, add_weighted

        combination = Combination(combination_type, svd_rank, density, majority_sign_method)
        add_weighted(self, adapters, weights, adapter_name, combination)

    def _cast_adapter_dtype(self, adapter_name: str, autocast_adapter_dtype: bool = True) -> None:
        super()._cast_adapter_dtype(adapter_name, autocast_adapter_dtype=autocast_adapter_dtype)
        for module in self.model.modules():
            if isinstance(module, NdLoraLayer):
                module.cast_frozen(adapter_name)


def _pass_names(adapter_names, module, args, kwargs):
    """A forward pre-hook."""
    return args, {**kwargs, "adapter_names": adapter_names}


def _check_bases(planned: list[Planned], config: NdLoraConfig) -> None:
    """Compare the model with the fingerprint that a loaded adapter brings, or take one for the next save."""
    from ndlora_plugins.integrations.peft.fingerprint import (
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
            reads_weight=any(each.plan.recomputed for each in planned),
            base_name=config.base_model_name_or_path,
        )
    else:
        config._session_fingerprint = make_fingerprint(layers)
    config._session_weight_forms = {
        target.path: {"name": target.name, "kind": form.kind, "shape": list(form.shape)}
        for target, form, _, _ in planned
        if form.kind != "linear"
    }


def _weight(target: Target) -> torch.Tensor | None:
    """The parameter as it lies in the layer."""
    return getattr(target.base, target.parameter_name or "weight", None)


def _readable_weight(planned: Planned) -> torch.Tensor | Callable[[], torch.Tensor] | None:
    """The weight (out, in), or a function that dequantises it; None if it is not there to be read in passing: on
    "meta", sharded, or quantised and not needed for the start.
    """
    target, form, backend, plan = planned
    weight = _weight(target)
    if getattr(weight, "is_meta", False) or hasattr(weight, "ds_id"):  # GPTQ's weight is no tensor
        return None
    if backend is not None:
        return (lambda: form.matrix(base_weight(target.base, backend))) if plan.recomputed else None
    if weight is None or tuple(weight.shape) != form.shape or not weight.is_floating_point():
        return None
    return form.matrix(weight)


def _storage(planned: Planned) -> str:
    """What a fingerprint calls the way the weight is stored."""
    if planned.backend is None:
        return str(getattr(_weight(planned.target), "dtype", "unknown")).removeprefix("torch.")
    return planned.backend.backend_name.removeprefix("bnb ")


def _warn_of_unmatched(config: NdLoraConfig, names: list[str]) -> None:
    """One warning for each entry that matches no adapted layer."""
    targets = [] if isinstance(config.target_modules, str) else sorted(config.target_modules or [])
    for target in targets:
        if not any(name == target or name.endswith(f".{target}") for name in names):
            _warn_unmatched("target_modules", target, names)
    for option in ("rank_pattern", "alpha_pattern"):
        for key in getattr(config, option):
            _warn_unless_matched(option, key, names)
    if config.modes and not {"in_modes", "out_modes"} & set(config.modes):
        for key in config.modes:
            _warn_unless_matched("modes", key, names)


def _warn_unless_matched(option: str, key: str, names: list[str]) -> None:
    if not any(re.match(rf"(.*\.)?({key})$", name) for name in names):
        _warn_unmatched(option, key, names)


def _warn_unmatched(option: str, entry: str, names: list[str]) -> None:
    known = sorted({name.rpartition(".")[2] for name in names})
    warnings.warn(
        f"{option}: the entry {entry!r} matches no adapted layer, so it does nothing. Layers that are adapted end "
        f"in {known}.",
        UnmatchedTargetWarning,
        stacklevel=2,
    )


def _warn_of_lopsided(planned: Iterable[Planned]) -> None:
    """One warning that names the layers, worst first."""
    from ndlora_plugins.modes import LOPSIDED_RATIO

    lopsided = sorted(
        (
            (plan.lopsidedness, target.name, plan)
            for target, _, _, plan in planned
            if plan.lopsidedness > LOPSIDED_RATIO
        ),
        key=lambda found: (-found[0], found[1]),
    )
    if not lopsided:
        return
    ratio, name, plan = lopsided[0]
    more = f" (and {len(lopsided) - 1} more layers)" if len(lopsided) > 1 else ""
    warnings.warn(
        f"Layer {name!r}{more}: in_features={plan.layout.in_features} split into {list(plan.layout.in_modes)} and "
        f"out_features={plan.layout.out_features} into {list(plan.layout.out_modes)} take {plan.num_parameters:,} "
        f"parameters, {ratio:.1f} times those of even modes. Set `modes`, exclude the layer, or use method='slora'.",
        LopsidedModesWarning,
        stacklevel=2,
    )
