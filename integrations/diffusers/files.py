"""Adapters of a pipeline's components as directories: adapter_config.json and adapter_model.safetensors, as PEFT's."""

from __future__ import annotations

from pathlib import Path

from peft import PeftConfig, inject_adapter_in_model
from peft.utils import get_peft_model_state_dict, set_peft_model_state_dict
from safetensors.torch import load_file
from torch import nn

from ndlora_plugins.errors import NdLoraValueError

from ..peft.files.adapter import AdapterReader, listed
from ..peft.files.directories import new_directory
from ..peft.files.format import KEY_PREFIX
from ..peft.files.tensors import ADAPTER_FILE, save_tensors
from ..peft.names import NAME
from ..peft.tuner.undo import undone_on_failure

__all__ = ["load_adapter", "save_adapter"]


def save_adapter(component: nn.Module, directory: str | Path, adapter_name: str = "default") -> None:
    """Write one NDLORA adapter of a component, as `PeftModel.save_pretrained` would.

    Args:
        component: a UNet, a transformer or a text encoder on which `add_adapter` was called.
        directory: one that does not exist yet, or is empty; it appears when it is whole.

    Raises:
        NdLoraValueError: the component has no such adapter, or `directory` holds something.
        OSError: it cannot be written; the error names the file.
    """
    adapters = getattr(component, "peft_config", {})
    config = adapters.get(adapter_name)
    if config is None or config.peft_type != NAME:
        ours = [name for name, each in adapters.items() if each.peft_type == NAME]
        raise NdLoraValueError(
            f"{type(component).__name__} has no NDLORA adapter {adapter_name!r}; it has {ours or 'none'}. Add one with "
            f"add_adapter(NdLoraConfig(...), {adapter_name!r})."
        )
    tensors = get_peft_model_state_dict(component, adapter_name=adapter_name)
    with new_directory(directory) as files:
        prefixed = {f"{KEY_PREFIX}{name}": value.contiguous() for name, value in tensors.items()}
        save_tensors(prefixed, files / ADAPTER_FILE)
        config.save_pretrained(str(files))


def load_adapter(
    component: nn.Module, directory: str | Path, adapter_name: str = "default", *, is_trainable: bool = False
) -> None:
    """Put a saved NDLORA adapter onto a component and make it the active one. A failure changes nothing.

    Args:
        component: of the architecture that the adapter was trained on.
        directory: of the adapter, or its name on the hub.
        is_trainable: whether a training goes on with it.

    Raises:
        NdLoraValueError: the adapter is of another kind, broken, or of another component; or the name is taken.
    """
    if adapter_name in getattr(component, "peft_config", {}):
        raise NdLoraValueError(
            f"{type(component).__name__} has an adapter {adapter_name!r} already: load this one under another "
            f"adapter_name, or call delete_adapters({adapter_name!r}) first."
        )
    reader = AdapterReader(directory)
    _check_layers(reader, component)
    for layer in reader.shapes:
        reader.plan(layer)
    config = PeftConfig.from_pretrained(str(reader.directory))
    config.inference_mode = not is_trainable
    tensors = {key.removeprefix(KEY_PREFIX): value for key, value in load_file(reader.path).items()}
    had = {name: vars(component)[name] for name in ("peft_config",) if name in vars(component)}
    try:
        with undone_on_failure(component):
            inject_adapter_in_model(config, component, adapter_name)
            result = set_peft_model_state_dict(component, tensors, adapter_name)
            if result.unexpected_keys:
                raise NdLoraValueError(
                    f"{reader.path} holds tensors that {type(component).__name__} has no place for: "
                    f"{listed(result.unexpected_keys)}. Load it on the component that it was trained on."
                )
    except BaseException:
        vars(component).pop("peft_config", None)
        vars(component).update(had)
        raise
    # what diffusers and transformers look at before they touch adapters
    vars(component)["_hf_peft_config_loaded"] = True


def _check_layers(reader: AdapterReader, component: nn.Module) -> None:
    """Hold the names of the adapter's layers against those of a component, before it is changed.

    Raises:
        NdLoraValueError: some are not there.
    """
    there = {name.replace(".base_layer", "") for name, _ in component.named_modules()}
    parameters = {name.replace(".base_layer", "") for name, _ in component.named_parameters()}
    names = [reader.name(layer) for layer in reader.shapes]
    missing = [name for name in names if name not in there and name not in parameters]
    if missing:
        which = "none" if len(missing) == len(names) else f"{len(names) - len(missing)} only"
        raise NdLoraValueError(
            f"The adapter in {reader.directory} has {len(names)} layers, of which {type(component).__name__} has "
            f"{which}: {listed(missing)} are missing. It is the adapter of another component: a text encoder's goes "
            f"onto pipe.text_encoder, a UNet's onto pipe.unet, a transformer's onto pipe.transformer."
        )
