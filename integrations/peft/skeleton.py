"""Models without weights, for planning and for reading their files."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any

import torch
import transformers
from torch import nn
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, PretrainedConfig

from ndlora_plugins.errors import NdLoraValueError

__all__ = ["component_on_meta", "config_of_model", "model_on_meta"]


def config_of_model(directory: str, *, trust_remote_code: bool = False) -> PretrainedConfig:
    """The configuration of a model that is on this machine.

    Raises:
        NdLoraValueError: it has none of transformers.
        PermissionError: it may not be read.
    """
    try:
        return AutoConfig.from_pretrained(directory, trust_remote_code=trust_remote_code)
    except PermissionError:
        raise
    except (OSError, ValueError) as error:
        raise NdLoraValueError(
            f"{directory} has no config.json of transformers: {str(error).splitlines()[0]}"
        ) from error


def model_on_meta(
    config: PretrainedConfig, *, auto_class: Any = None, trust_remote_code: bool = False
) -> nn.Module:
    """The model of a configuration on the "meta" device, its weights tied as they will be.

    Args:
        auto_class: such as `AutoModelForSequenceClassification`. By default the class that the configuration
            names, else the causal language model, else the bare model.
    """
    named = getattr(transformers, (config.architectures or [""])[0], None)
    with torch.device("meta"), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if auto_class is None and named is not None:
            model = named(config)
        else:
            known = type(config) in AutoModelForCausalLM._model_mapping
            auto_class = auto_class or (AutoModelForCausalLM if known else AutoModel)
            model = auto_class.from_config(config, trust_remote_code=trust_remote_code)
    model.tie_weights()
    return model


def component_on_meta(config: Mapping[str, Any]) -> nn.Module:
    """The component of a diffusers pipeline that a config.json describes, on the "meta" device.

    Args:
        config: what the file holds; `_class_name` is diffusers' class.

    Raises:
        AttributeError: the installed diffusers has no such class.
    """
    import diffusers

    with torch.device("meta"):
        return getattr(diffusers, config["_class_name"]).from_config(dict(config))
