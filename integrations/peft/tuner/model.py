"""The tuner: plans and checks everything, then puts the adapters in.

The core is imported when it is first used: registration runs at every `import peft`, so it loads little.
"""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any

from peft import __version__ as peft_version
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from peft.utils import AuxiliaryTrainingWrapper
from peft.utils.quantization_utils import get_quantization_kwargs
from torch import nn

from ndlora_plugins.errors import NdLoraValueError

from ..configuration.config import NdLoraConfig
from ..layers.kinds import LAYER_KINDS
from ..layers.layer import NdLoraLayer
from ..layers.shared import SHARED, Bank, Clock
from ..measure import waits_for_gradients
from ..names import PREFIX
from .advice import warn_of_lopsided, warn_of_penalties, warn_of_targets
from .checks import (
    check_bases,
    check_gradients,
    check_recomputed,
    check_shared,
)
from .rows import check_rows
from .schedules import Scheduled, check_plans, install
from .targets import (
    Planned,
    Target,
    fill_in_targets,
    layer_generator,
    matched_targets,
    plan_targets,
)
from .undo import undone_on_failure

if TYPE_CHECKING:
    from ndlora_plugins.adapter import LayerAdapter

__all__ = ["NdLoraModel"]


class NdLoraModel(Scheduled):
    """Adds NDLORA adapters to a model; made by `get_peft_model` and `PeftModel.from_pretrained`.

    Args:
        model: any `nn.Module`.
        config: an `NdLoraConfig`, or a dict of adapter name to one.
        adapter_name: of the adapter to add.
    """

    peft_config: dict[str, NdLoraConfig]
    prefix = PREFIX
    tuner_layer_cls = NdLoraLayer
    target_module_mapping: dict = {}

    def __init__(self, model: nn.Module, peft_config, adapter_name: str, *args, **kwargs) -> None:
        # what the layers refer to: those that are made next, and those that are there without a PEFT model
        found = next((module for module in model.modules() if isinstance(module, NdLoraLayer)), None)
        self.bank, self.clock = (
            (Bank(), Clock(warn_of_penalties)) if found is None else (found.bank, found.clock)
        )
        self._planned: dict[tuple[int, str | None], Planned] = {}
        self._to_be_loaded: set[str] = set()  # adapters that a start gave nothing
        self._injected = not isinstance(peft_config, dict)  # PEFT then drops this model and keeps the layers
        super().__init__(model, peft_config, adapter_name, *args, **kwargs)

    def inject_adapter(self, model: nn.Module, adapter_name: str, *args, **kwargs) -> None:
        """Inject as PEFT does; a failure, such as no memory left halfway, leaves the model as it was."""
        try:
            with undone_on_failure(self, self.bank.factors, self.bank.frozen):
                self.bank.delete(adapter_name)  # one of that name is replaced
                self.clock.seeds[adapter_name] = self.peft_config[adapter_name].random_seed or 0
                held = [value for name, value in self.named_parameters() if PREFIX in name]
                flags = [value.requires_grad for value in held]
                super().inject_adapter(model, adapter_name, *args, **kwargs)
                config = self.peft_config[adapter_name]
                check_recomputed(self.model, config, adapter_name)
        finally:
            self._planned = {}
        # of others, which a further one is not to change
        for value, requires_grad in zip(held, flags, strict=True):
            value.requires_grad_(requires_grad)
        install(model if self._injected else self, adapter_name, config.chosen_schedules())
        config.session.gradients = {}  # of the size of the weights, and used
        if (
            self._injected
            and self.clock.watched
            and self.clock.begin_forward not in model._forward_pre_hooks.values()
        ):
            # no PEFT model tells of a forward
            model.register_forward_pre_hook(self.clock.begin_forward)

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
        asked = fill_in_targets(peft_config, model)
        resolved = peft_config.resolved()
        quantization = get_quantization_kwargs(model)
        planned = plan_targets(peft_config, matched_targets(peft_config, model), resolved, **quantization)
        if not planned:
            return  # PEFT raises, and says why nothing matched
        self._check_adapter_names(each.plan for each in planned)
        check_shared(planned)
        check_rows(peft_config, model, {each.target.name for each in planned})
        check_gradients(planned, peft_config)
        check_bases(planned, peft_config)
        chosen = peft_config.chosen_schedules()
        check_plans(chosen, [(each.target.name, each.plan) for each in planned])
        warn_of_targets(peft_config, model, asked, [each.target.name for each in planned])
        warn_of_lopsided(planned)
        if any(each.plan.shared for each in planned):
            if self._injected:
                raise NdLoraValueError(
                    f"method={peft_config.method!r} has tensors that several layers share: they live in the model that "
                    f"`get_peft_model` makes, which adding an adapter without it (inject_adapter_in_model, "
                    f"transformers' add_adapter) has not. Use get_peft_model, or a method without shared tensors."
                )
            self.ndlora_shared, self.ndlora_shared_frozen = self.bank.factors, self.bank.frozen
        self._planned = {(id(each.target.base), each.target.parameter_name): each for each in planned}

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
        plans = [*present, *plans]
        tensors = {factor.name for plan in plans for factor in (*plan.trained, *plan.frozen)}
        keys = {key for plan in plans for _, key in plan.shared}
        groups = {"ndlora_factors", "ndlora_frozen", SHARED, f"{SHARED}_frozen"}
        for name in (tensors | keys | groups) & set(self.peft_config):
            raise NdLoraValueError(
                f"An adapter cannot be called {name!r}: this is the name of one of the tensors of an NDLORA adapter, "
                f"and PEFT could not tell the two apart in a file. Choose another adapter name."
            )

    def _create_and_replace(
        self, peft_config: Any, adapter_name, target, target_name, parent, current_key, parameter_name=None
    ):
        base = target.get_base_layer() if isinstance(target, BaseTunerLayer) else target
        generator = layer_generator(peft_config.random_seed, current_key)
        planned = self._planned.get((id(base), parameter_name))
        if planned is None:  # named by the tensors of a file, not by the configuration
            target_of_file = Target(current_key, base, parameter_name, current_key)
            [planned] = plan_targets(
                peft_config, [target_of_file], peft_config.resolved(), **get_quantization_kwargs(self.model)
            )
        gradient = peft_config.session.gradients.get(planned.target.name)
        if gradient is None and "gradient" in planned.plan.start.reads:
            self._to_be_loaded.add(adapter_name)
        arguments = {
            "lora_dropout": peft_config.lora_dropout,
            "gradient": gradient,
            "generator": generator,
            "inference_mode": peft_config.inference_mode,
        }
        existing = self._existing_layer(target, parameter_name)
        if existing is not None:
            existing.update_layer(adapter_name, planned, **arguments)
            return
        layer = LAYER_KINDS[planned.form.kind](
            target, adapter_name, planned, bank=self.bank, clock=self.clock, **arguments
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

        kept = [
            entry for entry in peft_config.modules_to_save or () if not is_named(entry, *tied_weight_keys)
        ]
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
            NdLoraValueError: the model is in training mode, or an adapter does not exist or has no values.
        """
        if self._to_be_loaded and not self.clock.measuring:
            self._check_loaded()
        if adapter_names is None:
            self.clock.begin_forward(self)
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

    def _check_loaded(self) -> None:
        """A configuration that was read from a file brings no gradients: the tensors must come from there too."""
        for adapter in sorted(self._to_be_loaded & self.peft_config.keys()):
            if waits_for_gradients(self, adapter):
                batches = self.peft_config[adapter].gradient_batches
                raise NdLoraValueError(
                    f"Adapter {adapter!r} starts from gradients, and has neither these nor the tensors of a file. "
                    + (
                        f"gradient_batches={batches} is done by NdLoraCallback in a trainer: pass it one. Elsewhere "
                        if batches
                        else "Load it with PeftModel.from_pretrained, or "
                    )
                    + "call ndlora_plugins.measure_gradients(model, config, step) before get_peft_model."
                )
        self._to_be_loaded.clear()

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
                added up, and the leading singular vectors kept. Or "cluster": k-means of the low-rank forms' units; or
                "keep_down": the first adapter's, with the up that comes nearest to the sum.
            svd_rank: how many singular vectors, or clusters; the adapters' largest or mean rank by default, but to be
                given with "svd" where an update is made of modes.
            density: the share of the entries that pruning keeps.
            majority_sign_method: of the two with "ties", as in `LoraModel.add_weighted_adapter`.

        Raises:
            NdLoraValueError: another combination type, or a sum that cannot be one adapter.
        """
        from ..combining.combine import Combination, add_weighted

        combination = Combination(combination_type, svd_rank, density, majority_sign_method)
        add_weighted(self, adapters, weights, adapter_name, combination)

    @classmethod
    def _get_adapter_state_dict(cls, model, config, adapter_name, state_dict, unwanted_adapter_names):
        own = super()._get_adapter_state_dict(model, config, adapter_name, state_dict, unwanted_adapter_names)
        return own | {key: value for key, value in state_dict.items() if f".{SHARED}" in f".{key}"}

    @classmethod
    def _remap_adapter_state_dict_for_load(cls, model, config, adapter_name, state_dict):
        shared = {
            cls._remove_adapter_name_from_key(key, adapter_name): key
            for key in model.state_dict()
            if f".{SHARED}" in f".{key}" and f".{adapter_name}." in key
        }
        state_dict = {shared.get(key, key): value for key, value in state_dict.items()}
        return super()._remap_adapter_state_dict_for_load(model, config, adapter_name, state_dict)

    def _cast_adapter_dtype(self, adapter_name: str, autocast_adapter_dtype: bool = True) -> None:
        super()._cast_adapter_dtype(adapter_name, autocast_adapter_dtype=autocast_adapter_dtype)
        if autocast_adapter_dtype:
            self.bank.widen(adapter_name)
        for module in self.model.modules():
            if isinstance(module, NdLoraLayer):
                module.cast_frozen(adapter_name)


def _pass_names(adapter_names, module, args, kwargs):
    """A forward pre-hook."""
    return args, {**kwargs, "adapter_names": adapter_names}
