"""The tuner of `--tuner_type ndlora`, put into ms-swift's table. Saving, loading and resuming are ms-swift's PEFT ways.

`ndlora_autoload` calls `activate` when `swift.tuner_plugin.mapping` has been imported.
"""

from __future__ import annotations

import importlib
import os
from typing import Any

from ndlora_plugins.errors import MissingExtraError, NdLoraError, NdLoraValueError

from ..peft.names import METHOD_NAME
from .flags import (
    CONFIG_VARIABLE,
    FLAGS,
    config_fields,
    refuse_what_cannot_apply,
)

__all__ = ["activate"]

# ms-swift's tasks that PEFT calls otherwise, as ms-swift itself translates them for LoRA
_TASKS = {
    "EMBEDDING": None,
    "RERANKER": "SEQ_CLS",
    "GENERATIVE_RERANKER": "CAUSAL_LM",
    "DECISION": "CAUSAL_LM",
}


def activate() -> None:
    """Put the tuner into `swift.tuner_plugin.mapping.tuners_map`. Idempotent.

    Raises:
        MissingExtraError: ms-swift is not installed, or has no such table.
    """
    try:
        table = importlib.import_module("swift.tuner_plugin.mapping").tuners_map
        base = importlib.import_module("swift.tuner_plugin.base").PeftTuner
    except (ImportError, AttributeError) as error:
        raise MissingExtraError(
            f"--tuner_type {METHOD_NAME} needs ms-swift 4.0 or later, which has swift.tuner_plugin.mapping.tuners_map "
            f"({error}): pip install -U ms-swift."
        ) from error
    if METHOD_NAME not in table:
        table[METHOD_NAME] = _make_tuner(base)


def _make_tuner(base: type) -> type:
    class NdLoraTuner(base):
        """`--tuner_type ndlora`."""

        @staticmethod
        def prepare_model(args: Any, model: Any) -> Any:
            """A PEFT model with a fresh adapter.

            Raises:
                NdLoraValueError: a flag that cannot apply, or a value that cannot work.
            """
            from peft import get_peft_model

            return get_peft_model(model, build_config(args, model))

    return NdLoraTuner


def build_config(args: Any, model: Any) -> Any:
    """The `NdLoraConfig` that the flags of a training ask for.

    Args:
        args: ms-swift's `SftArguments`, or those of a class that inherits from it.
        model: as ms-swift loaded it, which knows its language part and its towers.

    Raises:
        NdLoraValueError: a flag that cannot apply, or a value that cannot work.
    """
    from swift.pipelines.train.tuner import get_modules_to_save, get_target_modules

    from ..peft.configuration.config import NdLoraConfig

    refuse_what_cannot_apply(args)
    task = (args.task_type or "").upper()
    fields = {
        "task_type": _TASKS.get(task, task) or None,
        "target_modules": get_target_modules(args, model),
        "modules_to_save": get_modules_to_save(args, model, task) or None,
    }
    more = config_fields(args, os.environ)
    try:
        return NdLoraConfig(**{**fields, **more})
    except (NdLoraError, TypeError) as error:
        names = ", ".join(f"{field} is --{flag}" for field, flag in FLAGS.items() if field in str(error))
        where = (
            f" ({names} here)" if names else f" ({CONFIG_VARIABLE})" if CONFIG_VARIABLE in os.environ else ""
        )
        raise NdLoraValueError(f"--tuner_type {METHOD_NAME}: {error}{where}") from error
