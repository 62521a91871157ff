"""Adapter-only weight sync: the exact LoRA of an NDLORA adapter goes to a vLLM server, at every sync of AsyncGRPO.

TRL's trainer takes PEFT's LoRA only (trl/experimental/async_grpo/async_grpo_trainer.py, tried on TRL 1.16); for other
adapters it merges and sends whole weights. Two of its functions are made to know ours.
"""

from __future__ import annotations

import functools
import os
import shutil
from pathlib import Path
from typing import Any, cast

from peft import LoraConfig, PeftModel
from torch import Tensor
from transformers.pytorch_utils import Conv1D

from ndlora_plugins.errors import NdLoraValueError

from ..peft.configuration.config import NdLoraConfig
from ..peft.exports.compress import low_rank_form
from ..peft.exports.stock import lora_config, lora_pair
from ..peft.files.tensors import ADAPTER_FILE, save_tensors
from ..peft.layers.layer import NdLoraLayer
from .norms import whole

__all__ = ["lora_of", "sync_as_lora"]

_NO_PLACE = ("modules_to_save", "trainable_token_indices")  # in a LoRA that a server loads


def sync_as_lora() -> None:
    """Let `AsyncGRPOTrainer` send NDLORA adapters to vLLM as LoRA; call it before the trainer is made.

    The server is started with `--enable-lora` and the `--max-lora-rank` that `ndlora export --to lora` names.

    Raises:
        NdLoraValueError: this TRL has no adapter-only sync.
    """
    try:
        from trl.experimental.async_grpo import async_grpo_trainer as trainer
    except ImportError as error:
        raise NdLoraValueError(f"This TRL has no AsyncGRPOTrainer: {error}. TRL 1.16 has it.") from error
    missing = [
        name for name in ("validate_lora_for_vllm_sync", "save_lora_adapter") if not hasattr(trainer, name)
    ]
    if missing:
        raise NdLoraValueError(
            f"This TRL's AsyncGRPOTrainer syncs no adapters ({missing[0]} is missing): TRL 1.16 does."
        )
    if not hasattr(trainer.save_lora_adapter, "__wrapped__"):
        _wrap(trainer)


def _wrap(trainer: Any) -> None:
    validate, save = trainer.validate_lora_for_vllm_sync, trainer.save_lora_adapter

    @functools.wraps(validate)
    def validate_lora_for_vllm_sync(model: PeftModel) -> LoraConfig:
        if len(model.active_adapters) == 1 and _is_ours(model, model.active_adapters[0]):
            return lora_of(model, model.active_adapters[0])[0]  # its error is a ValueError: TRL merges then
        return validate(model)

    @functools.wraps(save)
    def save_lora_adapter(model: PeftModel, accelerator: Any, adapter_name: str, dest_dir: str) -> None:
        if not _is_ours(model, adapter_name):
            return save(model, accelerator, adapter_name, dest_dir)
        config, tensors = lora_of(model, adapter_name)  # in every process: sharded factors are gathered
        if accelerator.is_main_process:
            _publish(config, tensors, Path(dest_dir))

    trainer.validate_lora_for_vllm_sync, trainer.save_lora_adapter = (
        validate_lora_for_vllm_sync,
        save_lora_adapter,
    )


def lora_of(model: PeftModel, adapter: str) -> tuple[LoraConfig, dict[str, Tensor]]:
    """The exact LoRA of a loaded adapter, as `ndlora export --to lora` writes it; no weight is merged.

    Returns:
        Its configuration, and its tensors on the CPU in the factors' dtype, by PEFT's names.

    Raises:
        NdLoraValueError: a method without an exact LoRA, a layer that is not linear, the output layer (vLLM computes
            prompt log-probabilities without its adapter), or trained parts that a LoRA has no place for.
    """
    config = cast(NdLoraConfig, model.peft_config[adapter])
    held = [f"{field}={getattr(config, field)!r}" for field in _NO_PLACE if getattr(config, field)]
    if config.bias != "none":
        held.append(f"bias={config.bias!r}")
    if held:
        raise NdLoraValueError(
            f"{', '.join(held)} of adapter {adapter!r} has no place in a LoRA that vLLM serves."
        )
    tensors, ranks, transposed = {}, {}, False
    base = cast(Any, model.get_base_model())
    head = base.get_output_embeddings() if hasattr(base, "get_output_embeddings") else None
    for name, layer in base.named_modules():
        if not isinstance(layer, NdLoraLayer) or adapter not in layer.plan:
            continue
        plan = layer.plan[adapter]
        if layer.form.kind != "linear" or layer is head:
            kind = "model's output layer" if layer is head else layer.form.kind
            raise NdLoraValueError(
                f"Layer {name!r} is a {kind}: vLLM takes a LoRA of the other linear layers."
            )
        trained, frozen = (
            {key: whole(value) for key, value in some.items()} for some in layer.tensors(adapter)
        )
        kept = next(iter(trained.values())).dtype
        try:
            down, up = low_rank_form(plan, trained, frozen)
        except NdLoraValueError as error:
            raise NdLoraValueError(f"Layer {name!r} cannot be synced as LoRA: {error}") from error
        pair = lora_pair(name, None, down, layer.scaling[adapter] * up)
        tensors |= {key: value.detach().to("cpu", kept).contiguous() for key, value in pair.items()}
        ranks[name] = len(down)
        transposed |= isinstance(layer.get_base_layer(), Conv1D)
    return lora_config(config, ranks, transposed), tensors


def _is_ours(model: PeftModel, adapter: str) -> bool:
    return isinstance(model.peft_config[adapter], NdLoraConfig)


def _publish(config: LoraConfig, tensors: dict[str, Tensor], directory: Path) -> None:
    """Written beside, then moved into place: a server never reads a half of it."""
    beside = directory.with_name(f".{directory.name}.tmp")
    shutil.rmtree(beside, ignore_errors=True)
    beside.mkdir(parents=True)
    config.save_pretrained(str(beside))
    save_tensors(tensors, beside / ADAPTER_FILE)
    shutil.rmtree(directory, ignore_errors=True)
    os.replace(beside, directory)
