"""An adapter directory looked over: is everything there, is it sound, and does it do anything?"""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from ndlora_plugins.errors import NdLoraError, NdLoraWarning

from ..files.adapter import AdapterReader, listed
from ..files.base import BaseFiles
from ..files.directories import local_directory
from ..files.problems import find_problems

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
    """The findings of `check_adapter`.

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
        """True if there is no problem."""
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
    except NdLoraError as error:
        return CheckReport(directory, "?", (str(error),), ())
    problems, remarks = [], []
    if files is not None:
        _check_base(reader, files, problems, remarks)
    found = find_problems(reader, files)
    problems += [problem.sentence for problem in found]
    broken = {problem.path for problem in found}
    layers, dtypes, data = [], [], 0
    for path in reader.shapes:
        tensors = reader.tensors(path)
        dtypes += [tensor.dtype for tensor in tensors.values()]
        data += sum(tensor.nbytes for tensor in tensors.values())
        if path not in broken:
            try:
                layers.append(_layer(path, reader, tensors, files))
            except NdLoraError as error:  # its weight cannot be read from the base model
                problems.append(str(error))
    data += sum(reader.tensor(key).nbytes for key in reader.others)
    idle = [layer.name for layer in layers if layer.idle]
    if idle and len(idle) == len(layers):
        problems.append(
            "No layer does anything: every update is zero. Was the adapter trained, and saved after it?"
        )
    elif idle:
        remarks.append(f"{len(idle)} of {len(layers)} layers do nothing: {listed(idle)}.")
    return CheckReport(
        directory,
        reader.config.resolved().method.name,
        tuple(problems),
        tuple(remarks),
        tuple(layers),
        tuple(dict.fromkeys(dtypes)),
        data,
        tuple(reader.others),
    )


def _layer(
    path: str, reader: AdapterReader, tensors: dict[str, Tensor], files: BaseFiles | None
) -> CheckedLayer:
    plan, norm = reader.plan(path, files), None
    if files is not None or not reader.reads_base:
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
