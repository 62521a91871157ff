"""Adapter directories read layer by layer, without the base model where a method does not read its weights."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

import torch
from peft import PeftConfig
from safetensors import safe_open
from torch import Tensor

from ndlora_plugins.adapter import LayerAdapter
from ndlora_plugins.errors import NdLoraValueError
from ndlora_plugins.fused import cast_factors
from ndlora_plugins.options import AdapterOptions
from ndlora_plugins.starts.base import Seen
from ndlora_plugins.structures.base import Factor

from ..configuration.config import NdLoraConfig
from ..configuration.validation import shorten
from ..layers.weights import WeightForm
from ..names import NAME
from ..tuner.fingerprint import FingerprintedLayer, compare_checksum, compare_fingerprint
from ..tuner.targets import largest, plan_form
from .base import BaseFiles, NotInFilesError
from .directories import local_directory
from .format import (
    FACTORS,
    FROZEN,
    KEY_PREFIX,
    TOKEN_ROWS,
    layer_forms,
    split_key,
    tensor_key,
)
from .json_files import check_fingerprint, read_object
from .tensors import ADAPTER_FILE, check_adapter_file

__all__ = ["AdapterReader", "ReadLayer", "listed"]


class ReadLayer(NamedTuple):
    """One layer of an adapter: its name in the model, and what `LayerAdapter` works on."""

    name: str
    plan: LayerAdapter
    trained: dict[str, Tensor]
    frozen: dict[str, Tensor]


class AdapterReader:
    """An adapter directory. Opening it reads its configuration and the header of its file, no tensor.

    Attributes:
        directory: where it is.
        config: its `NdLoraConfig`.
        forms: layer, as the file names it -> its name in the model and the form of its weight.
        shared: key of a tensor that layers share, as it stands in the file -> shape.
        shapes: layer, as the file names it -> "ndlora_factors.down" and the like -> shape.
        others: every other key (`modules_to_save`, token rows, biases), as it stands in the file -> shape.
    """

    def __init__(self, adapter: str | Path):
        self.directory = local_directory(str(adapter), "adapter_config.json")
        self.config = _read_config(self.directory)
        check_adapter_file(str(self.directory))
        self.path = self.directory / ADAPTER_FILE
        self.shapes: dict[str, dict[str, tuple[int, ...]]] = {}
        self.shared: dict[str, tuple[int, ...]] = {}
        self.others: dict[str, tuple[int, ...]] = {}
        with safe_open(self.path, framework="pt") as file:
            for key in file.keys():
                shape = tuple(file.get_slice(key).get_shape())
                layer, tensor = split_key(key)
                if layer is None:
                    self.others[key] = shape
                elif not layer:
                    self.shared[key] = shape
                else:
                    self.shapes.setdefault(layer, {})[tensor] = shape
        self.forms = layer_forms(self.config, self.shapes)
        if self.config.resolved().method.shared is not None:  # a layer may have no tensor of its own
            self.shapes = {path: self.shapes.get(path, {}) for path in self.forms}

    @cached_property
    def reads_base(self) -> bool:
        """Tell whether factors are recomputed from the base weights."""
        return self._resolved.reads_base

    def name(self, path: str) -> str:
        """The name of a layer, as the file has it, or that of the parameter that is adapted in its place."""
        return self.forms[path][0]

    def form(self, path: str) -> WeightForm | None:
        """The form of the base weight; None where the configuration does not list it and the tensors do not tell it."""
        return self.forms[path][1]

    def is_parameter(self, path: str) -> bool:
        """Tell whether a bare parameter is adapted, not a layer's weight."""
        form = self.form(path)
        return form is not None and form.kind == "parameter"

    def known_form(self, path: str, base: BaseFiles | None = None) -> WeightForm:
        """The form of the base weight, of the base model's own if it is given.

        Raises:
            NdLoraValueError: the base model has no such layer, or neither it nor the tensors tell the form.
        """
        name, form = self.forms[path]
        if self.config.layers is not None and form is None:
            raise NdLoraValueError(
                f"{self.path} holds tensors of layer {path!r}, which its configuration does not list under `layers`. "
                f"Save the adapter again."
            )
        if base is not None:
            found = base.form(name)
            kind = form.kind if form else "linear"
            # an old file says nothing of its linear layers but their names
            told = form if self.config.layers is not None or kind != "linear" else None
            if found is None or found.kind != kind or (told and found.matrix_shape != told.matrix_shape):
                raise NdLoraValueError(
                    f"The base model in {base.directory} has no {form.kind if form else 'linear'} layer {name!r}"
                    f"{f' of shape {list(form.shape)}' if form else ''}, which the adapter has. Name the model that "
                    f"the adapter was trained on ({self.config.base_model_name_or_path})."
                )
            form = found
        if form is None:
            raise NdLoraValueError(
                f"The tensors of layer {name!r} in {self.path} ({', '.join(self.shapes[path])}) do not "
                f"say how wide the layer is. Name the base model."
            )
        return form

    def plan(self, path: str, base: BaseFiles | None = None) -> LayerAdapter:
        """The plan of one layer, of the base model's own weight if it is given.

        Raises:
            NdLoraValueError: as `known_form`, or a factor is missing, unknown or of another shape.
        """
        name, form = self.name(path), self.known_form(path, base)
        plan = plan_form(self.config.options_for(name, self._resolved), name, form, self.largest)
        shared = dict(plan.shared)
        expected = {tensor_key(FACTORS, factor.name, shared): factor.shape for factor in plan.trained}
        if not plan.recomputed:
            expected |= {tensor_key(FROZEN, factor.name, shared): factor.shape for factor in plan.frozen}
        found = self.shapes[path] | {key: self.shared[key] for key in expected if key in self.shared}
        for tensor in sorted({*expected, *found}, key=[*expected, *found].index):
            if expected.get(tensor) != found.get(tensor):
                needs = "has no such tensor" if tensor not in expected else f"needs {list(expected[tensor])}"
                holds = "has none" if tensor not in found else f"has shape {list(found[tensor])}"
                raise NdLoraValueError(
                    f"{tensor!r} of layer {name!r} {holds} in {self.path}; the adapter's configuration "
                    f"{needs}. Save the adapter again."
                )
        return plan

    @cached_property
    def largest(self) -> tuple[int, int]:
        """(in features, out features), the most that any of its layers has."""
        return largest(form for _, form in self.forms.values() if form is not None)

    @cached_property
    def _resolved(self) -> AdapterOptions:
        return self.config.resolved()

    def read(self, path: str, base: BaseFiles | None = None) -> ReadLayer:
        """Plan and tensors of one layer.

        Args:
            base: only for an adapter whose start is read from the base weights (`reads_base`).

        Raises:
            NdLoraValueError: as `plan` and `made_again`, or a frozen factor comes out as another one than in training.
        """
        plan, name = self.plan(path, base), self.name(path)
        tensors, shared = self.tensors(path), dict(plan.shared)

        def take(group: str, factors: Sequence[Factor]) -> dict[str, Tensor]:
            keys = {factor.name: tensor_key(group, factor.name, shared) for factor in factors}
            return {name: tensors[key] if key in tensors else self.tensor(key) for name, key in keys.items()}

        trained = take(FACTORS, plan.trained)
        if not plan.recomputed:
            return ReadLayer(name, plan, trained, take(FROZEN, plan.frozen))
        frozen = self.made_again(plan, name, next(iter(trained.values())).dtype, base)
        # without one storage for all weights they were quantised in training, and are not here
        exact = "weight" not in plan.start.reads or self._trained_storage() is not None
        compare_checksum(self.config.checksums, name, frozen, exact)
        return ReadLayer(name, plan, trained, frozen)

    def made_again(
        self, plan: LayerAdapter, name: str, dtype: torch.dtype, base: BaseFiles | None = None
    ) -> dict[str, Tensor]:
        """The frozen factors that the start of layer `name` gives, in `dtype`.

        Raises:
            NdLoraValueError: the start reads the base weight, and there is no base.
        """
        weight, storage = None, self._trained_storage()
        if base is not None:
            weight = base.weight(name)
            weight = weight.to(storage or weight.dtype)
        elif "weight" in plan.start.reads:
            raise NdLoraValueError(
                f"method={plan.method.name!r} with anchor={plan.anchor!r} recomputes its start from the "
                f"base weights: name the base model (--base)."
            )
        frozen = plan.initialize(Seen(weight, seed=self.config.random_seed or 0, layer=name))[1]
        # as in a model, which rounds them to the dtype of its weights first
        return cast_factors(cast_factors(frozen, storage or torch.float32), dtype)

    def _trained_storage(self) -> torch.dtype | None:
        """The dtype that the base weights had in training; None where they were quantised, or nobody
        knows.
        """
        kinds = {entry["storage"] for entry in (self.config.base_fingerprint or {}).values()}
        dtypes = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
        return dtypes.get(kinds.pop()) if len(kinds) == 1 else None

    def tensors(self, path: str) -> dict[str, Tensor]:
        """The tensors that the file holds of one layer: "ndlora_factors.down" and the like."""
        with safe_open(self.path, framework="pt") as file:
            return {name: file.get_tensor(f"{KEY_PREFIX}{path}.{name}") for name in self.shapes[path]}

    def tensor(self, key: str) -> Tensor:
        """One tensor, by its name in the file."""
        with safe_open(self.path, framework="pt") as file:
            return file.get_tensor(key)

    def other_tensors(self) -> dict[str, Tensor]:
        """The tensors that are not ours, as it stands in the file."""
        return {key: self.tensor(key) for key in self.others}

    def token_indices(self, key: str) -> list[int]:
        """The rows of the embedding that the trained rows under `key` are.

        Raises:
            NdLoraValueError: `trainable_token_indices` does not say it.
        """
        indices = self.config.trainable_token_indices
        if isinstance(indices, dict):
            module = key.removeprefix(KEY_PREFIX).removesuffix(TOKEN_ROWS)
            matching = [
                rows for name, rows in indices.items() if module == name or module.endswith(f".{name}")
            ]
            indices = matching[0] if matching else None
        shape, rows = self.others[key], set(indices or ())
        if len(shape) != 2 or not len(rows) == len(indices or ()) == shape[0] or min(rows, default=-1) < 0:
            raise NdLoraValueError(
                f"{key!r} in {self.path} has shape {list(shape)}, and trainable_token_indices="
                f"{shorten(self.config.trainable_token_indices)} does not say which row of the embedding each of its "
                f"rows is. Save the adapter again."
            )
        return indices or []

    def check_base(self, base: BaseFiles) -> None:
        """Hold a base model against the adapter's fingerprint; what its files do not hold plainly is passed over.

        Raises:
            NdLoraValueError: it is another one.
        """
        saved = dict(self.config.base_fingerprint or {})
        layers = []
        for name in tuple(saved):
            if base.form(name) is not None:
                try:
                    weight = base.weight(name)
                except NotInFilesError:  # whoever needs the weight raises it
                    del saved[name]
                    continue
                kind = str(weight.dtype).removeprefix("torch.")
                layers.append(FingerprintedLayer(name, (weight.shape[0], weight.shape[1]), weight, kind))
        base_name = self.config.base_model_name_or_path
        compare_fingerprint(saved, layers, reads_weight=self.reads_base, base_name=base_name)

    def open_base(self, base: str | None, trust_remote_code: bool = False) -> BaseFiles:
        """The base model `base`, else the one that the configuration names if it is on this machine; checked.

        Raises:
            NdLoraValueError: neither can be found, or it is another model than the adapter's.
        """
        name = base or self.config.base_model_name_or_path
        if not name:
            raise NdLoraValueError(
                f"{self.directory} does not say which model it was trained on: name it (--base)."
            )
        revision = None if base else self.config.revision
        try:
            found = BaseFiles.open(
                name, revision=revision, download=base is not None, trust_remote_code=trust_remote_code
            )
        except NdLoraValueError as error:
            if base:
                raise
            raise NdLoraValueError(f"The adapter's base model: {error} Name it yourself (--base).") from error
        self.check_base(found)
        return found


def _read_config(directory: Path) -> NdLoraConfig:
    """The configuration of an adapter, down to what `NdLoraConfig` takes as it stands."""
    kind = read_object(directory / "adapter_config.json").get("peft_type")
    if kind != NAME:
        raise NdLoraValueError(
            f"{directory} holds an adapter of type {kind}, not {NAME}: PEFT reads it by itself."
        )
    config = PeftConfig.from_pretrained(str(directory))
    assert isinstance(config, NdLoraConfig), f"peft_type {NAME} is registered for it"
    if config.base_fingerprint is not None:
        check_fingerprint(config.base_fingerprint)
    return config


def listed(names: list[str], most: int = 4) -> str:
    """The first few names, and how many more there are, for a message."""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(repr(name) for name in names[:most]) + more
