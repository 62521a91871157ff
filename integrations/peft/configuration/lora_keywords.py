"""Keywords of PEFT's `LoraConfig` that `NdLoraConfig` knows only to say why they cannot apply."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import InitVar, field, make_dataclass
from typing import Any

from ndlora_plugins.errors import NdLoraValueError

__all__ = ["LoraKeywords", "refuse_keywords"]

# keyword -> why it has no meaning here, and what to do instead
_REFUSED = {
    "use_dora": "the magnitude vector is defined for LoRA's product only; leave it out",
    "use_qalora": "it is defined for LoRA's product only; leave it out",
    "qalora_group_size": "it belongs to use_qalora; leave it out",
    "use_bdlora": "it is defined for LoRA's product only; leave it out",
    "loftq_config": "LoftQ computes LoRA's two matrices; use init_lora_weights='n_lora' or True instead",
    "eva_config": "EVA computes LoRA's two matrices; use init_lora_weights=True instead",
    "corda_config": "CorDA computes LoRA's two matrices; use init_lora_weights=True instead",
    "lora_ga_config": "LoRA-GA computes LoRA's two matrices; use init_lora_weights=True instead",
    "alora_invocation_tokens": "activated LoRA is defined for LoRA's product only; leave it out",
    "megatron_config": "Megatron layers are not supported; leave it out",
    "megatron_core": "Megatron layers are not supported; leave it out",
    "layer_replication": "it writes new layers into the model; replicate them before the adapter is added",
    "lora_bias": "a biased update cannot be merged and has no place in these methods; use bias='all' instead",
    "arrow_config": "Arrow routes between LoRA adapters; leave it out",
    "velora_config": "VeLoRA compresses what LoRA's product keeps for backward; leave it out",
    "monteclora_config": "MonteCLoRA samples LoRA's matrices; leave it out",
    "kasa_config": "KaSA is defined for LoRA's product only; leave it out",
}
# what LoraConfig itself fills in, so that all its fields can be passed on
_WITHOUT_EFFECT = {"qalora_group_size": 16, "megatron_core": "megatron.core"}

# a base class of the configuration whose `__init__` takes them all
LoraKeywords = make_dataclass(
    "LoraKeywords", [(keyword, InitVar, field(default=None, kw_only=True)) for keyword in _REFUSED]
)


def refuse_keywords(values: Sequence[Any]) -> None:
    """Raise for a keyword that was given; what LoraConfig itself fills in may be passed on.

    Args:
        values: of all keywords, in the order in which `__post_init__` gets them.
    """
    for keyword, value in zip(_REFUSED, values, strict=True):
        if value and value != _WITHOUT_EFFECT.get(keyword):
            raise NdLoraValueError(
                f"{keyword}={value!r} is an option of LoraConfig that NdLoraConfig does not have: {_REFUSED[keyword]}."
            )
