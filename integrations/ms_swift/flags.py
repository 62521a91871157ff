"""ms-swift's flags: which `NdLoraConfig` field each is, and which cannot apply. Knows no module of ms-swift's."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import MISSING, fields
from typing import Any

import yaml

from ndlora_plugins.errors import NdLoraValueError

__all__ = ["CONFIG_VARIABLE", "FLAGS", "REFUSED", "config_fields", "refuse_what_cannot_apply"]

# what ms-swift has no flag for: YAML or JSON of further fields of NdLoraConfig
CONFIG_VARIABLE = "NDLORA_CONFIG"

# field of NdLoraConfig -> ms-swift's flag
FLAGS = {
    "r": "lora_rank",
    "lora_alpha": "lora_alpha",
    "lora_dropout": "lora_dropout",
    "bias": "lora_bias",
    "use_rslora": "use_rslora",
    "init_lora_weights": "init_weights",
    "target_parameters": "target_parameters",
}

_TAKE_OUT = "take it out"
# flag -> why it cannot apply, and what to do
REFUSED = {
    "use_dora": f"DoRA's magnitude vector is defined for LoRA's product only; {_TAKE_OUT}",
    "lorap_lr_ratio": "LoRA+ finds the parameters of the higher rate by the name lora_B, which no method here has; "
    "set learning_rate instead",
    "lora_dtype": "the adapter has the base model's dtype; set torch_dtype instead",
    "use_swift_lora": f"it is ms-swift's own LoRA; {_TAKE_OUT}",
    "vllm_enable_lora": f"vLLM serves LoRA adapters only; {_TAKE_OUT}, and the merged weights are sent",
}
# flags of other tuner types by how they begin
_OF_OTHERS = {
    "lora_ga_": "lora with --init_weights lora-ga",
    "adalora_": "adalora",
    "boft_": "boft",
    "fourier_": "fourierft",
    "llamapro_": "llamapro",
    "reft_": "reft",
    "vera_": "vera",
    "adapter_act": "adapter",
    "adapter_length": "adapter",
}


def refuse_what_cannot_apply(args: Any) -> None:
    """Look through the arguments of a training.

    Args:
        args: ms-swift's, a dataclass. What has its default value counts as not written.

    Raises:
        NdLoraValueError: one sentence for each flag that could only be dropped.
    """
    given = _written(args)
    wrong = [
        f"`--{flag} {given[flag]}` cannot apply to --tuner_type ndlora: {reason}."
        for flag, reason in REFUSED.items()
        if given.get(flag)
    ]
    for flag, value in given.items():
        kind = next((kind for start, kind in _OF_OTHERS.items() if flag.startswith(start)), None)
        if kind is not None:
            wrong.append(
                f"`--{flag} {value}` is of --tuner_type {kind} and would do nothing with ndlora; {_TAKE_OUT}."
            )
    if getattr(args, "tuner_backend", "peft") != "peft":
        wrong.append(
            f"`--tuner_backend {args.tuner_backend}` cannot apply to --tuner_type ndlora: it replaces LoRA's layers by "
            f"its own; use --tuner_backend peft."
        )
    if wrong:
        raise NdLoraValueError(" ".join(wrong))


def config_fields(args: Any, environment: Mapping[str, str]) -> dict[str, Any]:
    """The fields of `NdLoraConfig` that the flags and `NDLORA_CONFIG` say something of, targets left out.

    ms-swift's defaults (rank 8, alpha 32, dropout 0.05) are LoRA's recipe: a flag that has its default value counts as
    not written, and the method's own default holds.

    Raises:
        NdLoraValueError: `NDLORA_CONFIG` is no mapping, or says what a flag says too.
    """
    given = _written(args)
    found = {field: given[flag] for field, flag in FLAGS.items() if flag in given}
    text = environment.get(CONFIG_VARIABLE)
    if not text:
        return found
    try:
        more = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise NdLoraValueError(
            f"{CONFIG_VARIABLE}={text!r} is no YAML: {str(error).splitlines()[0]}"
        ) from error
    if not isinstance(more, dict):
        raise NdLoraValueError(
            f"{CONFIG_VARIABLE}={text!r} says no fields of NdLoraConfig: write {{r: 4}}, say."
        )
    twice = sorted(FLAGS[field] for field in found.keys() & more.keys())
    if twice:
        raise NdLoraValueError(
            f"{CONFIG_VARIABLE} and --{', --'.join(twice)} say the same field: write it once."
        )
    return {**found, **more}


def _written(args: Any) -> dict[str, Any]:
    """Flag -> value, of those that have not their default."""
    found = {}
    for field in fields(args):
        default = field.default if field.default is not MISSING else None
        if field.default_factory is not MISSING:
            default = field.default_factory()
        value = getattr(args, field.name, default)
        # init_weights: ms-swift makes a bool of its default text
        if value not in (default, None) and str(value).lower() != str(default).lower():
            found[field.name] = value
    return found
