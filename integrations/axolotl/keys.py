"""Axolotl's keys: which `NdLoraConfig` field each is, and which cannot apply. Knows no Axolotl module."""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping
from typing import Any

from ndlora_plugins.errors import NdLoraTypeError, NdLoraValueError

__all__ = [
    "REFUSED",
    "YAML_KEYS",
    "build_callback",
    "build_config",
    "refuse_what_cannot_apply",
    "written_fields",
]

# field of NdLoraConfig -> Axolotl's key. The fields of the block `ndlora:` bear their own names.
YAML_KEYS = {
    "r": "lora_r",
    "lora_alpha": "lora_alpha",
    "lora_dropout": "lora_dropout",
    "target_modules": "lora_target_modules",
    "target_parameters": "lora_target_parameters",
    "exclude_modules": "lora_exclude_modules",
    "modules_to_save": "lora_modules_to_save",
    "fan_in_fan_out": "lora_fan_in_fan_out",
    "rank_pattern": "lora_rank_pattern",
    "alpha_pattern": "lora_alpha_pattern",
    "layers_to_transform": "peft_layers_to_transform",
    "layers_pattern": "peft_layers_pattern",
    "init_lora_weights": "peft_init_lora_weights",
    "use_rslora": "peft_use_rslora",
    "trainable_token_indices": "peft_trainable_token_indices",
    "ensure_weight_tying": "peft_ensure_weight_tying",
}

# honoured elsewhere than in NdLoraConfig
_HONOURED = {
    "lora_target_linear",
    "lora_model_dir",
    "lora_on_cpu",
    "peft_autocast_adapter_dtype",
}

# of the block, and no fields
_NO_FIELDS = ("callback", "parameters")

_KERNEL = "it puts LoRA's formula in place of the layers' own forward; set it to false or take it out"
_SYNC = "the weight sync to vLLM that goes with it merges LoRA's two matrices by itself; take it out"
_LOADED_BY_LORA = "Axolotl's loader for it knows LoRA only; take it out"

# key ("block.key") -> why it cannot apply, and what to do
REFUSED = {
    "peft_use_dora": "DoRA's magnitude vector is defined for LoRA's product only; take it out",
    "peft.loftq_config": "LoftQ computes LoRA's two matrices; take it out, or use peft_init_lora_weights: "
    "n_lora",
    "peft_layer_replication": "it writes new layers into the model; replicate them before the training",
    "lora_mlp_kernel": _KERNEL,
    "lora_qkv_kernel": _KERNEL,
    "lora_o_kernel": _KERNEL,
    "lora_embedding_kernel": _KERNEL,
    "flash_attn_fuse_mlp": "it replaces the linear layers that are to be adapted; take it out",
    "use_onebitllms": "it replaces the linear layers that are to be adapted; take it out",
    "relora": "Axolotl's restarts merge and reset LoRA's two matrices only; take it out",
    "loraplus_lr_ratio": "LoRA+ finds the parameters of the higher rate by the name lora_B, which no method "
    "here has, so it would do nothing; set learning_rate, or lr_groups, instead",
    "qlora_sharded_model_loading": _LOADED_BY_LORA,
    "gptq": "layers quantised with GPTQ are not supported; use load_in_4bit on the unquantised model",
    "nvfp4_merge_aware": _LOADED_BY_LORA,
    "quantize_moe_experts": _LOADED_BY_LORA,
    "expert_parallel_size": "Axolotl's expert parallelism shards and saves LoRA's two matrices only; take it "
    "out",
    "trl.vllm_lora_sync": "vLLM serves LoRA adapters only; take it out",
    "trl.async_prefetch": _SYNC,
    "trl.use_data_producer": _SYNC,
}
_HARMLESS = {"expert_parallel_size": (1,)}


def refuse_what_cannot_apply(cfg: Mapping[str, Any]) -> None:
    """Look through a configuration as the user wrote it.

    Raises:
        NdLoraValueError: one sentence for each key that could only be dropped.
    """
    wrong = [
        f"`{key}: {_read(cfg, key)}` cannot apply to adapter: ndlora: {reason}."
        for key, reason in REFUSED.items()
        if _read(cfg, key) and _read(cfg, key) not in _HARMLESS.get(key, ())
    ]
    known = {*YAML_KEYS.values(), *_HONOURED, *REFUSED, "peft"}
    for key, value in cfg.items():
        if str(key).startswith(("lora_", "peft_")) and key not in known and value not in (None, False):
            close = difflib.get_close_matches(key, known, n=1)
            hint = f"did you mean `{close[0]}`?" if close else "take it out."
            wrong.append(f"`{key}: {value}` is no key that adapter: ndlora knows: {hint}")
    if cfg.get("load_in_4bit") and cfg.get("load_in_8bit"):
        wrong.append("`load_in_4bit` and `load_in_8bit` are both true: choose one.")
    for quantised in ("load_in_4bit", "load_in_8bit"):
        for sharded in ("fsdp", "fsdp_config"):
            if cfg.get(quantised) and cfg.get(sharded):
                wrong.append(
                    f"`{quantised}: true` with `{sharded}` cannot apply to adapter: ndlora: Axolotl shards "
                    f"quantised weights for adapter: qlora only; take one of the two out."
                )
    if wrong:
        raise NdLoraValueError(" ".join(wrong))


def _read(cfg: Mapping[str, Any], key: str) -> Any:
    """The value of "key" or "block.key"; None where it is missing."""
    block, _, name = key.rpartition(".")
    holder = cfg if not block else cfg.get(block)
    return holder.get(name) if isinstance(holder, Mapping) else None


def written_fields(cfg: Any) -> dict[str, Any]:
    """The fields of `NdLoraConfig` that a validated configuration says something of, targets left out.

    Args:
        cfg: Axolotl's validated configuration, or its pydantic model.
    """
    fields = {}
    for field, key in YAML_KEYS.items():
        value = getattr(cfg, key, None)
        if field != "target_modules" and value is not None and value != []:
            fields[field] = _plain(value)
    fields.update({name: value for name, value in _block(cfg).items() if name not in _NO_FIELDS})
    return fields


def _block(cfg: Any) -> dict[str, Any]:
    """What the block `ndlora:` says."""
    block = getattr(cfg, "ndlora", None)
    if block is None:
        return {}
    items = block.items() if isinstance(block, Mapping) else iter(block)
    return {name: _plain(value) for name, value in items if value is not None}


def build_callback(cfg: Any) -> Any | None:
    """The `NdLoraCallback` that the block asks for (`callback: true`, or a mapping of its arguments), or None.

    Schedules, those of the method too, and `gradient_batches` ask for it as well.

    Args:
        cfg: as for `written_fields`.

    Raises:
        NdLoraValueError: an unknown argument, or a value that cannot work.
    """
    from ..trl.callback import make_callback

    asked = _plain(getattr(getattr(cfg, "ndlora", None), "callback", None))
    if asked is None or asked is False:
        config = build_config(cfg)
        if not config.schedules and config.gradient_batches is None:
            return None
        if asked is False:
            raise NdLoraValueError(
                "`ndlora.callback: false`, but the callback is what runs schedules and gradient_batches: take it out."
            )
        asked = {"log_norms": False}
    return make_callback({} if asked is True else asked, "ndlora.callback")


def _plain(value: Any) -> Any:
    """Axolotl's dicts answer None for any attribute, which PEFT does not expect: make them dict and list."""
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, (list, tuple)) else value


def build_config(cfg: Any, model: Any | None = None):
    """Axolotl's configuration as an `NdLoraConfig`.

    Args:
        cfg: as for `written_fields`.
        model: the base model, which names the task and, where `lora_target_linear` is joined with
            `lora_target_modules`, its linear layers. Without it the result is good for checking values only.

    Raises:
        NdLoraValueError: a value that cannot work; names the YAML's key.
    """
    from ..peft import NdLoraConfig
    from ..peft.choose import fields_within

    fields = {"target_modules": _targets(cfg, model), "task_type": _task(model), **written_fields(cfg)}
    parameters = _block(cfg).get("parameters")
    try:
        if parameters is not None:
            fields = fields_within(parameters, fields, model)
        return NdLoraConfig(**fields)
    except (NdLoraValueError, NdLoraTypeError) as error:
        raise type(error)(f"{error}{_in_the_yaml(str(error))}") from error


def _targets(cfg: Any, model: Any | None) -> Any:
    targets = _plain(getattr(cfg, "lora_target_modules", None)) or None
    if not getattr(cfg, "lora_target_linear", None):
        return targets
    if targets is None or targets == "all-linear" or model is None:
        return "all-linear"
    from axolotl.loaders.adapter import find_all_linear_names

    listed = [targets] if isinstance(targets, str) else targets
    return sorted({*listed, *find_all_linear_names(model)})


def _task(model: Any | None) -> str:
    name = type(model).__name__
    if "SequenceClassification" in name:
        return "SEQ_CLS"
    return "TOKEN_CLS" if "TokenClassification" in name else "CAUSAL_LM"


def _in_the_yaml(message: str) -> str:
    """ " (in the YAML: r is lora_r)" for the fields that a message names by another name than the YAML's."""
    from ..peft import NdLoraConfig
    from ..peft.configuration.validation import fields_to_set

    names = {
        field.name: YAML_KEYS.get(field.name, f"ndlora.{field.name}") for field in fields_to_set(NdLoraConfig)
    }
    said = [
        f"{field} is {key}"
        for field, key in names.items()
        if field != key and re.search(rf"\b{field}=", message)
    ]
    return f" (In the YAML {', '.join(said)}.)" if said else ""
