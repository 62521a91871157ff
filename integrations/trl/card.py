"""The model card of a training: what a trainer knows, and our part kept where a trainer writes the card anew."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..peft.configuration.config import NdLoraConfig
from ..peft.files.card import note_picture, note_training, write_model_card

if TYPE_CHECKING:
    from transformers import Trainer, TrainerState, TrainingArguments

__all__ = ["keep_model_card", "note_plot", "note_recipe"]


def note_recipe(model: Any, args: TrainingArguments, state: TrainerState) -> None:
    """Let the cards of a model's NDLORA adapters name learning rate, schedule, steps and batch."""
    recipe = {
        "learning rate": args.learning_rate,
        "schedule": getattr(args.lr_scheduler_type, "value", args.lr_scheduler_type),
        "optimizer": getattr(args.optim, "value", args.optim),
        "weight decay": args.weight_decay,
        "steps": state.max_steps,
        "batch": args.train_batch_size * args.gradient_accumulation_steps * args.world_size,
    }
    for config in _configurations(model):
        note_training(config, recipe)


def note_plot(model: Any, path: str | Path) -> None:
    """Let the cards of a model's NDLORA adapters show the picture of the training."""
    for config in _configurations(model):
        note_picture(config, path)


def _configurations(model: Any) -> list[NdLoraConfig]:
    found = (getattr(model, "peft_config", None) or {}).values()
    return [config for config in found if isinstance(config, NdLoraConfig)]


def keep_model_card(trainer: Trainer) -> None:
    """Put our part of README.md back after `trainer.create_model_card`, which `push_to_hub` calls after the save.

    transformers' and TRL's trainers write the whole file there, without the adapter's part.
    """
    create = trainer.create_model_card

    @functools.wraps(create)
    def create_model_card(*args: Any, **kwargs: Any) -> None:
        create(*args, **kwargs)
        model = trainer.accelerator.unwrap_model(trainer.model)
        config = (getattr(model, "peft_config", None) or {}).get("default")
        if trainer.is_world_process_zero() and isinstance(config, NdLoraConfig):
            note_recipe(model, trainer.args, trainer.state)
            write_model_card(config, trainer.args.output_dir or ".")

    trainer.create_model_card = create_model_card
