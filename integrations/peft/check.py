"""An adapter directory looked over: is everything there, is it sound, and does it do anything?"""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from ndlora_plugins.adapter import LayerAdapter
from ndlora_plugins.errors import NdLoraError, NdLoraWarning
from ndlora_plugins.integrations.peft.base_files import BaseFiles
from ndlora_plugins.integrations.peft.directories import local_directory
from ndlora_plugins.integrations.peft.reading import KEY_PREFIX, AdapterReader, listed

__all__ = ["CheckReport", "CheckedLayer", "check_adapter"]


@dataclass(frozen=True)
class CheckedLayer:
    """One layer of an adapter.

    Attributes:
        numbers: in the adapter file.
        trainable: those of them that train.
        norm: ||scaling dW|| (Frobenius); None where the base weights are needed to know it.
        idle: the layer does nothing: its update is zero.
    """

    name: str
    numbers: int
    trainable: int
    norm: float | None
    idle: bool


@dataclass(frozen=True)
class CheckReport:
    """What `check_adapter` found.

    Attributes:
        problems: what makes the adapter unfit for use, a sentence each.
        remarks: what does not.
        layers: those that could be read.
        dtypes: of the adapter's own tensors.
        bytes: of all tensors in the file.
        others: keys that are not ours: `modules_to_save`, token rows, biases.
    """

    directory: Path
    method: str
    problems: tuple[str, ...]
    remarks: tuple[str, ...]
    layers: tuple[CheckedLayer, ...] = ()
    dtypes: tuple[torch.dtype, ...] = ()
    bytes: int = 0
    others: tuple[str, ...] = ()

    @property
    def ok(self) -> bool:
        """Whether there is no problem."""
        return not self.problems

    @property
    def trainable(self) -> int:
        """Trainable numbers of the method, all layers."""
        return sum(layer.trainable for layer in self.layers)

    @property
    def idle(self) -> tuple[str, ...]:
        """The layers that do nothing."""
        return tuple(layer.name for layer in self.layers if layer.idle)


def check_adapter(
    adapter: str | Path, base: str | None = None, *, trust_remote_code: bool = False
) -> CheckReport:
    """Look over an adapter; what is wrong with it is in the report.

    Args:
        adapter: its directory, or its name on the hub.
        base: directory or hub name of the base model. Without it the shapes are held against each other and
            against the configuration; which layers there should be, and whether the base is the right one, is
            then not known, nor the size of updates that are recomputed from its weights.

    Raises:
        NdLoraValueError: there is no adapter, or no base model.
    """
    directory = local_directory(str(adapter), "adapter_config.json")
    files = None if base is None else BaseFiles.open(base, trust_remote_code=trust_remote_code)
    try:
        reader = AdapterReader(directory)
    except (NdLoraError, ValueError, TypeError, KeyError) as error:  # PEFT's and json's errors are among them
        return CheckReport(directory, "?", (str(error),), ())
    problems, remarks = [], []
    if files is not None:
        _check_base(reader, files, problems, remarks)
    try:
        reader.check_complete(files)
    except NdLoraError as error:
        problems.append(str(error))
    layers, dtypes, data = [], [], 0
    for path in reader.shapes:
        tensors = reader.tensors(path)
        dtypes += [tensor.dtype for tensor in tensors.values()]
        data += sum(tensor.nbytes for tensor in tensors.values())
        sound = _check_finite(problems, {f"{path}.{tensor}": value for tensor, value in tensors.items()})
        try:
            plan = reader.plan(path, files)
        except NdLoraError as error:
            problems.append(str(error))
            continue
        layers.append(_layer(path, reader, plan, tensors, files, sound))
    for key in reader.others:
        tensor = reader.tensor(key)
        data += tensor.nbytes
        _check_finite(problems, {key: tensor})
    problems += _unknown_names(reader, files)
    problems += _check_dtypes(dtypes)
    idle = [layer.name for layer in layers if layer.idle]
    if idle and len(idle) == len(layers):
        problems.append(
            "No layer does anything: every update is zero. Was the adapter trained, and saved after it?"
        )
    elif idle:
        remarks.append(f"{len(idle)} of {len(layers)} layers do nothing: {listed(idle)}.")
    return CheckReport(
        directory,
        reader.config.method,
        tuple(problems),
        tuple(remarks),
        tuple(layers),
        tuple(dict.fromkeys(dtypes)),
        data,
        tuple(reader.others),
    )


def _layer(
    path: str,
    reader: AdapterReader,
    plan: LayerAdapter,
    tensors: dict[str, Tensor],
    files: BaseFiles | None,
    sound: bool,
) -> CheckedLayer:
    norm = None
    if sound and (files is not None or not plan.recomputed):
        read = reader.read(path, files)
        norm = plan.scaling * plan.delta_norm(read.trained, read.frozen)
    # without the weights: no change since the start, or a core of zeros
    idle = norm == 0 if norm is not None else not any(tensor.count_nonzero() for tensor in tensors.values())
    return CheckedLayer(
        reader.name(path), sum(tensor.numel() for tensor in tensors.values()), plan.num_parameters, norm, idle
    )


def _check_base(reader: AdapterReader, files: BaseFiles, problems: list[str], remarks: list[str]) -> None:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            reader.check_base(files)
        except NdLoraError as error:
            problems.append(str(error))
    remarks += [str(entry.message) for entry in caught if issubclass(entry.category, NdLoraWarning)]


def _unknown_names(reader: AdapterReader, files: BaseFiles | None) -> list[str]:
    """Tensors that nothing accounts for, and options whose tensors are not there."""
    config, problems = reader.config, []
    names = [key.removeprefix(KEY_PREFIX).replace(".base_layer.", ".") for key in reader.others]
    rows = [name for name in names if ".token_adapter." in name]
    for key in reader.others:
        if ".token_adapter." in key:
            try:
                reader.token_indices(key)
            except NdLoraError as error:
                problems.append(str(error))
    saved = [f".{module}." for module in config.modules_to_save or ()]
    # PEFT saves a resized or adapted embedding with the adapter, whatever the options say
    embeddings = (".embed_tokens.weight", ".lm_head.weight", ".wte.weight")
    unknown = [
        name
        for name in names
        if name not in rows
        and not any(module in f".{name}" for module in saved)
        and not (config.bias != "none" and name.endswith(".bias"))
        and not f".{name}".endswith(embeddings)
    ]
    if unknown:
        problems.append(f"{len(unknown)} tensors belong to nothing in the configuration: {listed(unknown)}.")
    for module in saved:
        if not any(module in f".{name}" for name in names):
            problems.append(
                f"modules_to_save names {module.strip('.')!r}, of which the file holds no tensor."
            )
    if config.trainable_token_indices and not rows:
        problems.append("trainable_token_indices is set, but the file holds no token rows.")
    return problems


def _check_finite(problems: list[str], tensors: dict[str, Tensor]) -> bool:
    broken = [name for name, tensor in tensors.items() if not torch.isfinite(tensor).all()]
    problems += [f"{name!r} holds NaN or infinity." for name in broken]
    return not broken


def _check_dtypes(dtypes: Iterable[torch.dtype]) -> list[str]:
    kinds = list(dict.fromkeys(dtypes))
    names = [str(kind).removeprefix("torch.") for kind in kinds]
    if len(kinds) > 1:
        return [f"The adapter's tensors are of several dtypes, {names}: cast them to one."]
    return (
        []
        if all(kind.is_floating_point for kind in kinds)
        else [f"The adapter's tensors are of dtype {names[0]}."]
    )
