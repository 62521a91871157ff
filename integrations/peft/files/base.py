"""A base model as its safetensors files: one weight at a time, the whole never in memory."""

from __future__ import annotations

import math
from collections.abc import Iterable
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion

from ndlora_plugins.errors import NdLoraValueError

from ..layers.weights import WeightForm, weight_form
from ..skeleton import component_on_meta, config_of_model, model_on_meta
from .directories import local_directory
from .json_files import read_object, read_shards
from .tensors import open_tensors

__all__ = ["INDEX_FILE", "BaseFiles", "NotInFilesError"]

INDEX_FILE = "model.safetensors.index.json"
SINGLE_FILE = "model.safetensors"
# of a component of a diffusers pipeline
COMPONENT_FILE = "diffusion_pytorch_model.safetensors"


class NotInFilesError(NdLoraValueError):
    """Work on the files is not possible; on the loaded model it is."""


class BaseFiles:
    """A directory of transformers' making, or the component of a pipeline of diffusers': pipeline/unet.

    Attributes:
        directory: where it is.
        shards: tensor name -> file name.
        model: the model without its weights, on the "meta" device.
    """

    def __init__(self, directory: Path, *, trust_remote_code: bool = False):
        self.directory = Path(directory)
        self.shards = _shards(self.directory)
        self.model = _skeleton(self.directory, trust_remote_code)
        self._head_prefix = getattr(self.model, "base_model_prefix", "")
        self._aliases: dict[str, list[str]] = {}
        groups: dict[int, list[str]] = {}
        for name, parameter in self.model.named_parameters(remove_duplicate=False):
            group = groups.setdefault(id(parameter), [])
            group.append(name)
            self._aliases[name] = group

    @classmethod
    def open(
        cls, name: str, *, revision: str | None = None, download: bool = True, trust_remote_code: bool = False
    ) -> BaseFiles:
        """Open a directory, or a model of the hub.

        Args:
            download: whether a model that is not on this machine is fetched.

        Raises:
            NdLoraValueError: it is not there, has no whole safetensors files, or is no model of transformers.
            OSError: a file may not be read.
        """
        directory = local_directory(name, "config.json", revision=revision, download=download)
        return cls(directory, trust_remote_code=trust_remote_code)

    def full_name(self, name: str) -> str:
        """The name of a module or parameter in `model`, of one that was adapted without the model's head, say."""
        with_head = f"{self._head_prefix}.{name}"
        try:
            self.model.get_submodule(
                with_head.rpartition(".")[0] if with_head in self._aliases else with_head
            )
        except AttributeError:
            return name
        return with_head

    def module(self, layer: str) -> nn.Module | None:
        """The layer without its weights, or None if the model has none of that name."""
        try:
            return self.model.get_submodule(self.full_name(layer))
        except AttributeError:
            return None

    def form(self, name: str) -> WeightForm | None:
        """The form of a layer's weight, or of a bare parameter; None for what cannot be adapted, or is not there."""
        module, parameter_name = self._locate(name)
        return None if module is None else weight_form(module, parameter_name)

    def parameter(self, name: str) -> str:
        """The full name of the parameter that adapting `name`, a layer or a bare parameter, changes."""
        return name if self._locate(name)[1] is not None else f"{name}.weight"

    def _locate(self, name: str) -> tuple[nn.Module | None, str | None]:
        """(layer, parameter_name), the second None for a layer's weight."""
        module = self.module(name)
        if module is not None:
            return module, None
        parent, _, parameter_name = name.rpartition(".")
        module = self.module(parent) if parent else None
        found = isinstance(getattr(module, parameter_name, None), nn.Parameter)
        return (module, parameter_name) if found else (None, None)

    def parameter_shape(self, name: str) -> tuple[int, ...] | None:
        """The shape of a parameter of the model; None if it has none of that name."""
        try:
            return tuple(self.model.get_parameter(self.full_name(name)).shape)
        except AttributeError:
            return None

    def same_tensor(self, parameter: str) -> list[str]:
        """All names of a parameter: more than one where weights are tied."""
        parameter = self.full_name(parameter)
        return self._aliases.get(parameter, [parameter])

    def stored_name(self, parameter: str) -> str:
        """The one name under which the files hold a parameter of the model.

        Raises:
            NotInFilesError: under none that is known, or in parts.
        """
        stored = self.whole_name(parameter)
        if stored is None:
            raise self._not_in_files(parameter)
        return stored

    def whole_name(self, parameter: str) -> str | None:
        """The name that `stored_name` gives, and None where it raises."""
        for name in self.same_tensor(parameter):
            # some checkpoints hold the model without its head, and so without the prefix
            for candidate in (name, name.removeprefix(f"{self._head_prefix}.")):
                if candidate in self.shards:
                    return candidate
        return None

    def as_stored(self, parameter: str, value: Tensor) -> dict[str, Tensor]:
        """A tensor of a parameter's shape as the files hold it: name -> tensor, several for experts one by one.

        Raises:
            NotInFilesError: the files hold the parameter under no name that is known.
        """
        whole = self.whole_name(parameter)
        if whole is not None:
            return {whole: value}
        if not isinstance(self.model, PreTrainedModel):  # diffusers' are stored as they are
            raise self._not_in_files(parameter)
        try:
            parts = revert_weight_conversion(self.model, {self.full_name(parameter): value})
        except (AttributeError, IndexError, KeyError, RuntimeError, ValueError) as error:
            # one that is made of several, say: it cannot be turned back alone
            raise self._not_in_files(parameter) from error
        if not parts.keys() <= self.shards.keys() or sum(map(Tensor.numel, parts.values())) != value.numel():
            raise self._not_in_files(parameter)
        return parts

    def parts(self, parameter: str) -> dict[str, Tensor]:
        """The tensors in which the files hold a parameter: name -> one without numbers, on the "meta" device.

        Raises:
            NotInFilesError: as `as_stored`.
        """
        return self.as_stored(parameter, self.model.get_parameter(self.full_name(parameter)))

    def _not_in_files(self, parameter: str) -> NotInFilesError:
        return NotInFilesError(
            f"{self.directory} holds no tensor {parameter!r}, or under a name that transformers changes "
            f"when it loads the model. Load the model with its adapter and call merge_and_unload() instead."
        )

    def weight(self, name: str) -> Tensor:
        """The stored weight of a layer, or a bare parameter, as (out_features, in_features)."""
        parameter, form = self.parameter(name), self.form(name)
        if form is None:
            raise self._not_in_files(parameter)
        whole = self.whole_name(parameter)
        if whole is not None:
            weight = self._read(whole)
            self.check_plain(name, weight, form.shape)
            return form.matrix(weight)
        places = self.as_stored(parameter, torch.arange(math.prod(form.shape)).view(form.shape))
        parts = {key: self._read(key) for key in places}
        weight = next(iter(parts.values())).new_empty(math.prod(form.shape))
        for key, stored in parts.items():
            self.check_plain(name, stored, places[key].shape)
            weight[places[key].flatten()] = stored.flatten()
        return form.matrix(weight.view(form.shape))

    def _read(self, key: str) -> Tensor:
        with open_tensors(self.directory / self.shards[key]) as file:
            if key not in file.keys():
                raise self.broken_index(key)
            return file.get_tensor(key)

    def storage(self, name: str) -> str:
        """The dtype in which the weight of a layer, or a bare parameter, is stored: "float32"."""
        key = next(iter(self.parts(self.parameter(name))))
        with open_tensors(self.directory / self.shards[key]) as file:
            return str(file.get_slice(key)[:0].dtype).removeprefix("torch.")

    def broken_index(self, *keys: str) -> NdLoraValueError:
        """The error for tensors that are not in the file that the index names."""
        return NdLoraValueError(
            f"{self.directory / INDEX_FILE} says that {self.shards[keys[0]]!r} holds {list(keys)}, which it does not: "
            f"take the model from its source again."
        )

    def check_plain(self, name: str, stored: Tensor, expected: Iterable[int]) -> None:
        """Raise unless what is stored of a weight is floating and as large as expected: quantised ones are neither."""
        dtype = stored.dtype
        if stored.shape != tuple(expected) or not dtype.is_floating_point or dtype.itemsize < 2:
            raise NotInFilesError(
                f"The weight of layer {name!r} is stored as {dtype} {list(stored.shape)} in {self.directory}, "
                f"not as {list(expected)} in 16 or 32 bit. Of a quantised model, name the one that it was made from; "
                f"of one that joins several layers in a tensor, load it with its adapter and call merge_and_unload()."
            )


def _shards(directory: Path) -> dict[str, str]:
    for single in (SINGLE_FILE, COMPONENT_FILE):
        index = directory / f"{single}.index.json"
        if index.is_file():
            return read_shards(index)
        if (directory / single).is_file():
            with open_tensors(directory / single) as file:
                return dict.fromkeys(file.keys(), single)
    raise NotInFilesError(
        f"{directory} has neither {SINGLE_FILE} nor {INDEX_FILE}. Save the model as safetensors: "
        f"AutoModelForCausalLM.from_pretrained(...).save_pretrained(...)."
    )


def _skeleton(directory: Path, trust_remote_code: bool) -> nn.Module:
    """The model class that the directory was saved from, without weights."""
    component = _component(directory)
    if component is not None:
        return component
    config = config_of_model(str(directory), trust_remote_code=trust_remote_code)
    if getattr(config, "quantization_config", None):
        raise NotInFilesError(
            f"The base model in {directory} is stored quantised. Name the model in 16 or 32 bit that it "
            f"was made from."
        )
    return model_on_meta(config, trust_remote_code=trust_remote_code)


def _component(directory: Path) -> nn.Module | None:
    """The component of a diffusers pipeline without weights; None if the directory is none.

    Raises:
        NdLoraValueError: diffusers is not installed, or does not know it.
    """
    if not (directory / "config.json").is_file():
        return None
    config = read_object(directory / "config.json")
    if "_class_name" not in config:
        return None
    try:
        return component_on_meta(config)
    except (ImportError, AttributeError) as error:
        raise NdLoraValueError(
            f"{directory} holds a {config['_class_name']} of diffusers {config.get('_diffusers_version', '')}, which "
            f"this environment cannot make ({error}): pip install -U diffusers."
        ) from error
