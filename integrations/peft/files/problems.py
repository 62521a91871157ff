"""What is wrong with an adapter's file: found here once, for the check, the exports and the merge."""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Iterator
from itertools import accumulate
from typing import NamedTuple

import torch
from peft.tuners.tuners_utils import BaseTuner
from torch import Tensor

from ndlora_plugins.errors import NdLoraError, NdLoraValueError, NdLoraWarning

from ..configuration.config import NdLoraConfig
from ..layers.shared import index_problem
from ..tuner.targets import plan_model
from .adapter import AdapterReader, listed
from .base import BaseFiles
from .format import FROZEN, KEY_PREFIX, TOKEN_ROWS

__all__ = ["Problem", "check_sound", "find_problems"]

# PEFT saves a resized or adapted embedding with the adapter, whatever the options say
_INPUT_EMBEDDINGS = ("wte", "embed_tokens", "embed_in", "word_embeddings")
_EMBEDDINGS = (*_INPUT_EMBEDDINGS, "shared", "lm_head", "embed_out")


class Problem(NamedTuple):
    """A fault in an adapter.

    Attributes:
        sentence: what is wrong, and where.
        path: the layer, as the file names it, that cannot be used for it; None if no single one.
    """

    sentence: str
    path: str | None = None


def check_sound(reader: AdapterReader, base: BaseFiles | None) -> None:
    """Raise unless an adapter is whole: before anything is written of it.

    Raises:
        NdLoraValueError: the first problem, and how many there are.
    """
    problems = find_problems(reader, base)
    if problems:
        more = f" There are {len(problems)} such problems: `ndlora check` lists them." if problems[1:] else ""
        raise NdLoraValueError(f"{problems[0].sentence}{more}")


def find_problems(reader: AdapterReader, base: BaseFiles | None) -> list[Problem]:
    """Everything that makes an adapter unfit for use, but for the base model's weights (`AdapterReader.check_base`).

    Reads every tensor of the file, one layer at a time.

    Args:
        base: the base model; without it, what its layers are is known from the adapter alone.
    """
    found = [Problem(sentence) for sentence in (*_layers(reader, base), *_beside(reader, base))]
    dtypes = set()
    for path in reader.shapes:
        tensors = reader.tensors(path)
        dtypes |= {tensor.dtype for tensor in tensors.values() if tensor.is_floating_point()}
        found += [Problem(sentence, path) for sentence in _of_layer(reader, path, tensors, base)]
    if len(dtypes) > 1:
        found.append(
            Problem(
                f"The adapter's tensors are of several dtypes, {sorted(map(str, dtypes))}: cast them to one."
            )
        )
    return found


def _layers(reader: AdapterReader, base: BaseFiles | None) -> Iterator[str]:
    """Of the layers as a whole: those of the file against those that the configuration adapts."""
    names = [reader.name(path) for path in reader.shapes]
    twice = [name for name, count in Counter(names).items() if count > 1]
    if twice:
        yield f"Several layers of {reader.path} have the same name: {listed(twice)}. Save the adapter again."
    if not names:
        yield f"{reader.path} holds no layer of an NDLORA adapter. Save the adapter again."
    try:
        missing, strange = _unmatched(reader, names, base)
    except (NdLoraError, ValueError) as error:  # PEFT's, where nothing matches
        yield str(error)
        return
    if missing:
        yield (
            f"{len(missing)} layers have no tensor in {reader.path}, but by its configuration they should: "
            f"{listed(missing)}. Save the adapter again."
        )
    if strange:
        yield (
            f"{len(strange)} layers in {reader.path} are not among those that its configuration adapts: "
            f"{listed(strange)}. Save the adapter again."
        )


def _unmatched(
    reader: AdapterReader, names: list[str], base: BaseFiles | None
) -> tuple[list[str], list[str]]:
    """(missing in the file, not in the configuration). Without the base model only those that are known."""
    known = [*(reader.config.base_fingerprint or ()), *(name for name, _ in reader.forms.values())]
    missing = [name for name in dict.fromkeys(known) if name not in names]
    if base is None:
        targets = reader.config.target_modules
        if not targets or targets == "all-linear":
            return missing, []
        parameters = {reader.name(path) for path in reader.shapes if reader.is_parameter(path)}
        matched = BaseTuner._check_target_module_exists
        return missing, [
            name for name in names if name not in parameters and not matched(reader.config, name)
        ]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", NdLoraWarning)
        expected = [name for name, _ in plan_model(base.model, reader.config)]
    full = [base.full_name(name) for name in names]
    # by both: a name of the fingerprint may be one without the model's head
    missing = {base.full_name(name): None for name in missing} | dict.fromkeys(
        name for name in expected if name not in full
    )
    return list(missing), [name for name in full if name not in expected]


def _of_layer(
    reader: AdapterReader, path: str, tensors: dict[str, Tensor], base: BaseFiles | None
) -> Iterator[str]:
    form = reader.form(path)
    if (form is None or form.kind == "linear") and path.rpartition(".")[2] in _INPUT_EMBEDDINGS:
        yield (
            f"{path!r} in {reader.path} is an embedding by its name, but its configuration does not say so. Save the "
            f"adapter again."
        )
        return
    chosen = {}
    try:
        factors = reader.plan(path, base).frozen
        chosen = {
            f"{FROZEN}.{factor.name}": factor.indices for factor in factors if factor.indices is not None
        }
    except NdLoraError as error:
        yield str(error)
    for name in chosen.keys() & tensors.keys():
        problem = index_problem(f"{path}.{name}", tensors[name], chosen[name])
        if problem:
            yield problem
    yield from _values({f"{path}.{name}": value for name, value in tensors.items() if name not in chosen})


def _beside(reader: AdapterReader, base: BaseFiles | None) -> Iterator[str]:
    """Of the tensors beside the layers: `modules_to_save`, token rows, biases, embeddings."""
    config = reader.config
    names = {key: key.removeprefix(KEY_PREFIX).replace(".base_layer.", ".") for key in reader.others}
    rows = {key for key in names if key.endswith(TOKEN_ROWS)}
    unknown = []
    for key, name in names.items():
        if key in rows:
            try:
                reader.token_indices(key)
            except NdLoraError as error:
                yield str(error)
        elif not key.startswith(KEY_PREFIX) or not _is_accounted_for(name, config):
            unknown.append(name)
        yield from _values({key: reader.tensor(key)})
    if unknown:
        yield f"{len(unknown)} tensors belong to nothing in the configuration: {listed(unknown)}."
    twice = [name for name, count in Counter(names.values()).items() if count > 1]
    if twice:
        yield f"{reader.path} holds {listed(twice)} twice, once as that of a base layer."
    for module in config.modules_to_save or ():
        if not any(_is_inside(name, module) for name in names.values()):
            yield f"modules_to_save names {module!r}, of which the file holds no tensor."
    if config.trainable_token_indices and not rows:
        yield "trainable_token_indices is set, but the file holds no token rows."
    if base is not None:
        yield from _against(
            base, {name: reader.others[key] for key, name in names.items() if key not in rows}
        )
    missing = [] if base is None else _missing(reader, base, set(names.values()))
    if missing:
        yield f"{len(missing)} tensors that the configuration trains are missing in {reader.path}: {listed(missing)}."


def _is_accounted_for(name: str, config: NdLoraConfig) -> bool:
    layer, _, last = name.rpartition(".")
    return (
        any(_is_inside(name, module) for module in config.modules_to_save or ())
        or (config.bias != "none" and last == "bias")
        or (last in ("weight", "bias") and layer.rpartition(".")[2] in _EMBEDDINGS)
    )


def _is_inside(name: str, module: str) -> bool:
    """Whether a tensor belongs to a module of that ending, as PEFT matches `modules_to_save`."""
    return any(path.endswith(module) for path in accumulate(name.split(".")[:-1], "{}.{}".format))


def _against(base: BaseFiles, shapes: dict[str, tuple[int, ...]]) -> Iterator[str]:
    """Whole tensors that could not take the place of the base model's. A resized vocabulary has other rows."""
    for name, shape in shapes.items():
        expected = base.parameter_shape(name)
        if expected is not None and (len(shape) != len(expected) or shape[1:] != expected[1:]):
            yield f"{name!r} has shape {list(shape)}; the base model's is {list(expected)}. Save the adapter again."


def _missing(reader: AdapterReader, base: BaseFiles, names: set[str]) -> list[str]:
    """Parameters of the base model that are trained in full, and that the file does not hold under any name."""
    config = reader.config
    found = {alias for name in names for alias in base.same_tensor(name)}
    adapted = {base.full_name(reader.name(path)) for path in reader.shapes}
    return [
        name
        for name, _ in base.model.named_parameters()
        if name not in found
        and (
            any(_is_inside(name, module) for module in config.modules_to_save or ())
            or (config.bias == "all" and name.endswith(".bias"))
            or (config.bias == "ndlora_only" and name.removesuffix(".bias") in adapted)
        )
    ]


def _values(tensors: dict[str, Tensor]) -> Iterator[str]:
    """Of dtypes and numbers. What is no parameter, as a counter of batches, may be of integers."""
    for name, tensor in tensors.items():
        kind = str(tensor.dtype).removeprefix("torch.")
        is_float = tensor.dtype.is_floating_point and tensor.dtype.itemsize > 1
        if not is_float and ("ndlora_" in name or name.endswith((".weight", ".bias", TOKEN_ROWS))):
            yield f"{name!r} is of dtype {kind}: it must be stored in 16, 32 or 64 bit."
        elif is_float and not torch.isfinite(tensor).all():
            yield f"{name!r} holds NaN or infinity."
