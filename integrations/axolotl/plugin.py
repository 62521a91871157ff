"""The Axolotl plugin: translates, and refuses what cannot be translated."""

from __future__ import annotations

from typing import Any

from axolotl.integrations.base import AdapterCapabilities, BasePlugin
from axolotl.utils.logging import get_logger
from peft import PeftConfig, PeftModel, get_peft_model
from transformers import TrainerCallback

from ndlora_plugins.errors import NdLoraValueError

from ..peft.names import NAME
from ..peft.registration import activate
from ..trl.card import keep_model_card
from .keys import (
    YAML_KEYS,
    build_callback,
    build_config,
    refuse_what_cannot_apply,
    written_fields,
)
from .patches import let_quantise, merge_by_shards

__all__ = ["NdLoraPlugin"]

ADAPTER = "ndlora"
# Axolotl shows what loggers below its own name say, and of others only warnings
LOG = get_logger("axolotl.plugins.ndlora")
_FRESH = (
    "lora_model_dir is not set: %s uses a fresh adapter, that is, the base model. Set lora_model_dir to the "
    "output_dir of the training (on the command line: --lora-model-dir=DIR)."
)
# fields that say how an adapter begins, not what it is
_NOT_OF_THE_FILE = ("random_seed", "ensure_weight_tying")


class NdLoraPlugin(BasePlugin):
    """`adapter: ndlora`. Listing it under `plugins:` is allowed but not needed."""

    def __init__(self):
        super().__init__()
        self._inference = False  # Axolotl's validation drops the key, and its loader does not say it

    def register(self, cfg: Any) -> None:
        """Look at the configuration as it was written, before Axolotl validates it.

        Raises:
            NdLoraValueError: a key that cannot apply to this adapter.
        """
        activate()
        if cfg.get("adapter") != ADAPTER:
            return
        self._inference = bool(cfg.get("inference"))
        refuse_what_cannot_apply(cfg)
        let_quantise()
        merge_by_shards(cfg)

    def get_input_args(self) -> str:
        """The pydantic model of the `ndlora:` block."""
        return "ndlora_plugins.integrations.axolotl.args.NdLoraArgs"

    def get_adapter_capabilities(self) -> list[AdapterCapabilities]:
        """Not lora_like: Axolotl would fall back to plain LoRA. Its ReLoRA knows LoRA's layers only."""
        return [AdapterCapabilities(name=ADAPTER, lora_like=False, relora=False)]

    def load_adapter(
        self, model: Any, cfg: Any, inference: bool = False, config_only: bool = False
    ) -> tuple[Any, PeftConfig | None] | None:
        """Put the adapter on the model, or hand TRL its configuration; None for other adapters.

        Returns:
            (PeftModel, config), or (None, config) with `config_only` (DPO, KTO: TRL wraps the model).

        Raises:
            NdLoraValueError: a directory with another kind of adapter, or a value that cannot work here.
        """
        if cfg.adapter != ADAPTER:
            return None
        config = build_config(cfg, model)
        if config_only:
            if cfg.lora_model_dir:
                raise NdLoraValueError(
                    f"`lora_model_dir` with `rl: {getattr(cfg.rl, 'value', cfg.rl)}` would be dropped: "
                    f"Axolotl starts from a new adapter there. Merge the saved one first (merge-lora), "
                    f"and train from the merged model."
                )
            return None, config
        options = {}
        if cfg.peft_autocast_adapter_dtype is not None:
            options["autocast_adapter_dtype"] = cfg.peft_autocast_adapter_dtype
        if cfg.lora_model_dir:
            model = _load_saved(model, cfg, not inference, options)
        else:
            if inference or self._inference:
                LOG.warning(_FRESH, "inference")
            model = get_peft_model(model, config, **options)
        trained, total = model.get_nb_trainable_parameters()
        active = model.peft_config[model.active_adapter]
        counts = f"{trained:,} trainable of {total:,} parameters"
        LOG.info("ndlora: method %s, %s", active.method, counts)
        return model, active

    def post_trainer_create(self, cfg: Any, trainer: Any) -> None:
        """Axolotl writes the model card anew after the adapter was saved: keep our part in it."""
        if cfg.adapter == ADAPTER:
            keep_model_card(trainer)

    def add_callbacks_post_trainer(self, cfg: Any, trainer: Any) -> list:
        """The callback that `ndlora.callback` asks for, and a watch over an evaluation of a fresh adapter."""
        if cfg.adapter != ADAPTER:
            return []
        callback = build_callback(cfg)
        callbacks = [] if callback is None else [callback]
        return callbacks if cfg.lora_model_dir else [*callbacks, _FreshAdapterWatch()]


def _load_saved(model: Any, cfg: Any, trainable: bool, options: dict) -> PeftModel:
    saved = PeftConfig.from_pretrained(cfg.lora_model_dir)
    if saved.peft_type != NAME:
        kind = getattr(saved.peft_type, "value", saved.peft_type)
        raise NdLoraValueError(
            f"`lora_model_dir: {cfg.lora_model_dir}` holds an adapter of type {kind}, but `adapter: ndlora` "
            f"needs one of type {NAME}. Set `adapter:` to what it was trained with, or take the key out."
        )
    differing = []
    for field, value in written_fields(cfg).items():
        kept = getattr(saved, field)
        kept = sorted(kept) if isinstance(kept, set) else kept
        # no dropout is what Axolotl fills in where nothing is written
        if field not in _NOT_OF_THE_FILE and value != kept and (field, value) != ("lora_dropout", 0.0):
            differing.append(f"{YAML_KEYS.get(field, f'ndlora.{field}')}: {value!r} (saved: {kept!r})")
    if differing:
        ignored = ", ".join(differing)
        LOG.warning("The adapter in %s is used as it was saved; ignored: %s", cfg.lora_model_dir, ignored)
    if cfg.lora_on_cpu:
        options = {**options, "torch_device": "cpu", "device_map": {"": "cpu"}}
    return PeftModel.from_pretrained(model, cfg.lora_model_dir, is_trainable=trainable, **options)


class _FreshAdapterWatch(TrainerCallback):
    """Warns, once, when an evaluation ends and no training has begun: evaluate without lora_model_dir."""

    def __init__(self):
        self._settled = False

    def on_train_begin(self, args, state, control, **kwargs):
        self._settled = True

    def on_evaluate(self, args, state, control, **kwargs):
        if not self._settled:
            LOG.warning(_FRESH, "evaluate")
        self._settled = True
