"""An adapter merged into the base model's files, one shard in memory at a time."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from ndlora_plugins.errors import NdLoraValueError

from ..files.adapter import AdapterReader
from ..files.base import INDEX_FILE, BaseFiles, NotInFilesError
from ..files.format import KEY_PREFIX, TOKEN_ROWS
from ..files.tensors import open_tensors, save_tensors
from ..layers.merging import add_and_round, scaled_delta

__all__ = ["MergedLayer", "merge_files"]

# weights in whatever form; what the index names is written anew, the rest would still be the base model
_WEIGHTS = {".safetensors", ".bin", ".pt", ".pth", ".gguf", ".h5", ".msgpack", ".onnx"}

Change = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class MergedLayer:
    """One merged layer.

    Attributes:
        parameters: numbers of its weight.
        lost: what rounding the merged weight leaves out of dW, relative (Frobenius).
    """

    name: str
    parameters: int
    lost: float


@dataclass
class _Plan:
    """What is written. Keys of `changes` are names in the files.

    Attributes:
        changes: stored tensor -> what is done with it, in turn.
        untied: new tensor -> the stored one that it is made of, for weights that were tied and no longer are.
    """

    changes: dict[str, list[Change]] = field(default_factory=dict)
    untied: dict[str, str] = field(default_factory=dict)
    merged: list[MergedLayer] = field(default_factory=list)


def merge_files(reader: AdapterReader, base: BaseFiles, directory: Path) -> list[MergedLayer]:
    """Write the base model with the adapter merged in: the same shards, dtypes, tokenizer and configuration.

    A weight that was tied to one that now differs gets a tensor of its own, and `tie_word_embeddings` becomes
    false.

    Args:
        base: as `reader.open_base` checked it.
        directory: an empty one, as `new_directory` makes it.

    Raises:
        NotInFilesError: something has no place in the files; nothing was written.
        NdLoraValueError: a factor is missing, a merged weight not finite, or a file of the base model cut off.
        OSError: a file cannot be read or written; the error names it.
    """
    plan = _plan(reader, base)
    _copy_other_files(base.directory, directory)
    sizes = 0
    for shard in sorted(set(base.shards.values())):
        with open_tensors(base.directory / shard) as file:
            tensors = {key: file.get_tensor(key) for key in file.keys()}
            metadata = file.metadata()
        lost = [key for key, file in base.shards.items() if file == shard and key not in tensors]
        if lost:
            raise base.broken_index(*lost)
        for new, stored in plan.untied.items():
            if stored in tensors:
                tensors[new] = tensors[stored].clone()
        for key in tensors.keys() & plan.changes.keys():
            for change in plan.changes[key]:
                tensors[key] = change(tensors[key])
            if not torch.isfinite(tensors[key]).all():
                raise NdLoraValueError(
                    f"The merged {key!r} holds NaN or infinity: its dtype {tensors[key].dtype} is too narrow for "
                    f"the adapter, or the base model is broken. Nothing was written."
                )
        sizes += sum(tensor.nbytes for tensor in tensors.values())
        (directory / shard).parent.mkdir(parents=True, exist_ok=True)
        tensors = {key: tensor.contiguous() for key, tensor in tensors.items()}
        save_tensors(tensors, directory / shard, metadata)
        del tensors
    if plan.untied:
        _write_untied(plan, base, directory, sizes)
    order = [reader.name(path) for path in reader.shapes]
    return sorted(plan.merged, key=lambda layer: order.index(layer.name))


def _plan(reader: AdapterReader, base: BaseFiles) -> _Plan:
    """Which stored tensors change, and how. Reads no tensor; raises for what has no place in the files."""
    plan = _Plan()
    own = []  # (parameter, change) of this one and not of those tied to it
    shared = []  # of all
    for key, shape in reader.others.items():  # first: what is brought whole may be updated too
        name = key.removeprefix(KEY_PREFIX)
        if name.endswith(TOKEN_ROWS):
            parameter = f"{name.removesuffix(TOKEN_ROWS)}.weight"
            _check_rows(base, parameter, reader.token_indices(key), shape)
            # PEFT ties the rows where the weights are tied
            shared.append((parameter, _rows(reader, key)))
            continue
        parameter = name.replace(".base_layer.", ".")
        _check_counterpart(base, parameter, shape)
        # tied in training too (`ensure_weight_tying`): then each name has the same tensor in the adapter
        twins = [f"{KEY_PREFIX}{alias}" for alias in base.same_tensor(parameter)]
        tied = all(
            twin in reader.others and torch.equal(reader.tensor(twin), reader.tensor(key)) for twin in twins
        )
        (shared if tied else own).append((parameter, _replacement(reader, key)))
    for path in reader.shapes:
        reader.plan(path, base)
        parameter = base.parameter(reader.name(path))
        update = _Update(reader, base, path, plan.merged)
        whole = base.whole_name(parameter)
        if whole is not None:
            own.append((parameter, partial(update.add, whole)))
        else:
            plan.changes |= {name: [partial(update.add, name)] for name in base.parts(parameter)}
    for parameter, _ in own:
        _untie(base.full_name(parameter), base, plan)
    for parameter, change in shared:
        for name in {_written_name(alias, base, plan) for alias in base.same_tensor(parameter)}:
            plan.changes.setdefault(name, []).append(change)
    for parameter, change in own:
        plan.changes.setdefault(_written_name(base.full_name(parameter), base, plan), []).append(change)
    return plan


def _untie(parameter: str, base: BaseFiles, plan: _Plan) -> None:
    """Give every name of a tied parameter a tensor of its own."""
    names = base.same_tensor(parameter)
    stored = base.stored_name(parameter)
    if len(names) == 1 or stored in plan.untied.values():
        return
    if not getattr(base.model.config, "tie_word_embeddings", False) or stored not in names:
        raise NotInFilesError(
            f"{parameter!r} is one tensor with {[name for name in names if name != parameter]} in this "
            f"model, and no option of its configuration separates them. Load the model with its adapter and call "
            f"merge_and_unload()."
        )
    plan.untied.update({name: stored for name in names if name != stored})


def _written_name(parameter: str, base: BaseFiles, plan: _Plan) -> str:
    return parameter if parameter in plan.untied else base.stored_name(parameter)


class _Update:
    """W + scaling dW of one layer, added in at least float32 and rounded once, as `NdLoraLayer.merge` does.

    The files may hold the weight in parts, as experts one by one: dW is formed at the first and kept until the last.
    """

    def __init__(self, reader: AdapterReader, base: BaseFiles, path: str, merged: list[MergedLayer]):
        self.reader, self.base, self.path, self.merged = reader, base, path, merged
        self.name, self.form = reader.name(path), reader.known_form(path, base)
        self.left: dict[str, Tensor] = {}  # stored tensor -> its part of dW
        self.lost = self.norm = 0.0  # squared

    def add(self, part: str, stored: Tensor) -> Tensor:
        """What the files hold under `part` from now on."""
        if not self.left:
            self.left = self.base.as_stored(self.base.parameter(self.name), self._delta())
        delta = self.left.pop(part)
        self.base.check_plain(self.name, stored, delta.shape)
        result = add_and_round(stored, delta)
        dtype = delta.dtype
        self.lost += float((result.to(dtype) - stored.to(dtype) - delta).norm()) ** 2
        self.norm += float(delta.norm()) ** 2
        if not self.left:
            lost = math.sqrt(self.lost / max(self.norm, torch.finfo(dtype).tiny))
            self.merged.append(MergedLayer(self.name, math.prod(self.form.shape), lost))
        return result

    def _delta(self) -> Tensor:
        layer = self.reader.read(self.path, self.base)
        return self.form.stored(scaled_delta(layer.plan, layer.trained, layer.frozen, layer.plan.scaling))


def _replacement(reader: AdapterReader, key: str) -> Change:
    return lambda stored: reader.tensor(key).to(stored.dtype)


def _rows(reader: AdapterReader, key: str) -> Change:
    """The trained rows of an embedding in their places."""
    indices = reader.token_indices(key)

    def change(stored: Tensor) -> Tensor:
        result = stored.clone()
        result[torch.tensor(indices)] = reader.tensor(key).to(stored.dtype)
        return result

    return change


def _check_counterpart(base: BaseFiles, parameter: str, shape: tuple[int, ...]) -> None:
    """The model has a parameter of that name and shape, and the files hold it."""
    found = base.parameter_shape(parameter)
    if found != shape:
        raise NotInFilesError(
            f"The adapter brings a whole tensor {parameter!r} {list(shape)}; the base model's is "
            f"{'not there' if found is None else list(found)}: a head for another task, or a resized "
            f"vocabulary? Load the model with its adapter and call merge_and_unload()."
        )
    base.stored_name(parameter)


def _check_rows(base: BaseFiles, parameter: str, indices: list[int], shape: tuple[int, ...]) -> None:
    """The model has an embedding of that name with these rows, as wide as those of the adapter."""
    found = base.parameter_shape(parameter)
    if found is None or len(found) != 2 or found[1] != shape[1] or max(indices) >= found[0]:
        raise NotInFilesError(
            f"The adapter brings rows up to {max(indices)} of {parameter!r}, {shape[1]} wide; the base model's is "
            f"{'not there' if found is None else list(found)}: a resized vocabulary? Load the model with its adapter "
            f"and call merge_and_unload()."
        )


def _copy_other_files(source: Path, target: Path) -> None:
    """Everything but weights, hidden files and links to directories: configuration, tokenizer, code, licence."""

    def left_out(directory: str, names: list[str]) -> list[str]:
        return [
            n
            for n in names
            if n.startswith(".")
            or Path(n).suffix in _WEIGHTS
            or n.endswith(".bin.index.json")
            or (Path(directory, n).is_dir() and Path(directory, n).is_symlink())
        ]

    shutil.copytree(source, target, ignore=left_out, dirs_exist_ok=True)


def _write_untied(plan: _Plan, base: BaseFiles, directory: Path, total_size: int) -> None:
    config_file = directory / "config.json"
    config = json.loads(config_file.read_text(encoding="utf-8"))
    config["tie_word_embeddings"] = False
    if isinstance(config.get("text_config"), dict):
        config["text_config"]["tie_word_embeddings"] = False
    config_file.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    index_file = directory / INDEX_FILE
    if index_file.is_file():
        index = json.loads(index_file.read_text(encoding="utf-8"))
        index["weight_map"] |= {new: base.shards[stored] for new, stored in plan.untied.items()}
        index.setdefault("metadata", {})["total_size"] = total_size
        index_file.write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
