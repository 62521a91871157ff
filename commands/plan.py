"""The budget of a model that is only known by its configuration."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from importlib import metadata
from typing import Any

from ndlora_plugins.budget import Budget, make_budget
from ndlora_plugins.errors import NdLoraValueError
from ndlora_plugins.integrations.peft.configuration.config import NdLoraConfig
from ndlora_plugins.integrations.peft.tuner.targets import plan_model
from ndlora_plugins.integrations.peft.tuner.towers import find_parts, part_of

__all__ = ["model_from_config", "parse_options", "plan_from_model_config", "versions"]


def plan_from_model_config(model: str, *, lora_rank: int = 8, **options: Any) -> Budget:
    """Build the model on the "meta" device and plan it.

    Args:
        model: a directory with a config.json, that file itself, or a name on the hub.
        lora_rank: of the plain LoRA to compare with.
        **options: fields of `NdLoraConfig`.

    Raises:
        NdLoraValueError: no model can be made of `model`, an option cannot work, or nothing matches.
        PermissionError: its config.json may not be read.
    """
    config = NdLoraConfig(**options)
    skeleton = model_from_config(model)
    layers = plan_model(skeleton, config)
    if not layers:
        raise NdLoraValueError(
            f"target_modules={config.target_modules!r} match no layer of {model!r}. Leave them out to adapt every "
            f"linear layer."
        )
    parts = find_parts(skeleton)
    named = [
        (f"{name} ({part_of(name, parts) or 'between'})" if parts else name, plan) for name, plan in layers
    ]
    return make_budget(named, lora_rank)


def model_from_config(model: str) -> Any:
    """The model of a config.json on the "meta" device; arguments and errors as of `plan_from_model_config`."""
    from transformers import AutoConfig

    from ndlora_plugins.integrations.peft.skeleton import model_on_meta

    path = os.path.dirname(model) or "." if model.endswith(".json") else model
    if os.path.isfile(os.path.join(path, "adapter_config.json")) and not os.path.isfile(
        os.path.join(path, "config.json")
    ):
        raise NdLoraValueError(
            f"{model!r} is an adapter: give its base model. `ndlora check` looks at an adapter."
        )
    try:
        model_config = AutoConfig.from_pretrained(path)
    except PermissionError:
        raise
    except (OSError, ValueError) as error:
        raise NdLoraValueError(
            f"{model!r} is neither a directory with a transformers config.json nor a model on the hub that can be "
            f"reached: {str(error).splitlines()[0]}"
        ) from error
    except Exception as error:  # of whatever kind the model's own checks raise
        raise _no_model(model, error) from error
    try:
        return model_on_meta(model_config)
    except Exception as error:
        raise _no_model(model, error) from error


def _no_model(model: str, error: Exception) -> NdLoraValueError:
    said = " ".join(str(error).split())
    return NdLoraValueError(
        f"transformers makes no model of {model!r}'s config.json: {type(error).__name__}: {said}"
    )


def parse_options(given: Sequence[str], flag: str = "--option") -> dict[str, Any]:
    """What a flag that may be repeated says, a method's options as a rule: NAME=JSON, a plain word is a string.

    Raises:
        NdLoraValueError: one without "=".
    """
    options = {}
    for text in given:
        name, equals, value = text.partition("=")
        if not equals:
            raise NdLoraValueError(f"{flag} {text!r}: write it as NAME=VALUE, such as crossed_modes=8.")
        try:
            options[name] = json.loads(value)
        except json.JSONDecodeError:
            options[name] = value
    return options


def versions() -> dict[str, str]:
    """Versions of this package and of the hosts that are installed."""
    found = {}
    for name in ("ndlora-plugins", "torch", "peft", "transformers", "trl", "axolotl"):
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found
