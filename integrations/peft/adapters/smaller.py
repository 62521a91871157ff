"""An adapter made smaller by whole rank units, without an SVD: its first ones, or those that are not zero."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from ndlora_plugins.adapter import LayerAdapter
from ndlora_plugins.errors import NdLoraValueError
from ndlora_plugins.fused import cast_factors
from ndlora_plugins.options import AdapterOptions
from ndlora_plugins.schedules.base import Ranks
from ndlora_plugins.schedules.choose import chosen_schedules

from ..combining.units import UNRESOLVED, added_by, select_units
from ..configuration.config import NdLoraConfig
from ..configuration.training_fields import as_schedules
from ..files.adapter import AdapterReader, ReadLayer
from ..files.base import BaseFiles
from ..files.directories import check_new, new_directory
from ..files.problems import check_sound
from ..files.write import NewLayer, write_adapter
from ..tuner.targets import plan_form

__all__ = ["SmallerLayer", "SmallerReport", "cut_adapter", "prune_adapter"]

# of a layer: its path in the file -> the units that stay; none: the layer goes
Kept = dict[str, list[int]]


@dataclass(frozen=True)
class SmallerLayer:
    """One layer.

    Attributes:
        rank_before, rank: of the adapter and of what was written; 0 where the layer was left out.
        parameters: numbers written of its own.
        error: ||written - dW|| / ||dW|| (Frobenius).
    """

    name: str
    rank_before: int
    rank: int
    parameters: int
    error: float


@dataclass(frozen=True)
class SmallerReport:
    """The smaller adapter that was written.

    Attributes:
        numbers: in the file, those that layers share counted once.
    """

    directory: Path
    layers: tuple[SmallerLayer, ...]
    numbers: int

    @property
    def largest_error(self) -> float:
        """The largest relative error of a layer."""
        return max(layer.error for layer in self.layers)


def cut_adapter(
    adapter: str | Path,
    output: str | Path,
    rank: int,
    *,
    base: str | None = None,
    trust_remote_code: bool = False,
) -> SmallerReport:
    """Write the first `rank` units of every layer as an adapter of that rank: what nested ranks are trained for.

    The answers are those of the adapter with only these units. The scaling of each layer stays as it is, unless the
    adapter was trained with a schedule that has one for each number of ranks.

    Args:
        adapter: directory of the adapter, or its name on the hub.
        output: a directory that does not exist yet, or an empty one; it appears when it is whole.
        base: the base model, where the start is made again from its weights and the configuration names none.

    Raises:
        NdLoraValueError: the method has no rank axis, or no layer has a larger rank.
        OSError: a file cannot be read or written.
    """
    if isinstance(rank, bool) or not isinstance(rank, int) or rank < 1:
        raise NdLoraValueError(f"rank={rank!r}: choose an integer of at least 1.")
    check_new(output)
    reader, files = _open(adapter, base, trust_remote_code)
    ranks = {path: reader.plan(path, files).layout.rank for path in reader.shapes}
    if rank >= max(ranks.values()):
        raise NdLoraValueError(
            f"rank={rank}: the adapter has at most rank {max(ranks.values())}, there is nothing to cut."
        )
    kept = {path: list(range(min(rank, own))) for path, own in ranks.items()}
    chosen = chosen_schedules(as_schedules(reader.config.schedules or {}))
    scales = {
        path: math.prod(each.scale(own, len(kept[path])) for each in chosen) for path, own in ranks.items()
    }
    return _write(reader, files, output, kept, scales)


def prune_adapter(
    adapter: str | Path,
    output: str | Path,
    tolerance: float = 0.0,
    *,
    base: str | None = None,
    trust_remote_code: bool = False,
) -> SmallerReport:
    """Write the adapter without the rank units that are zero: closed gates, groups that a penalty brought to zero.

    Each layer gets the rank that it needs (`rank_pattern`), and a layer without any unit is left out.

    Args:
        adapter: directory of the adapter, or its name on the hub.
        output: a directory that does not exist yet, or an empty one; it appears when it is whole.
        tolerance: units go too that add at most this share of the norm of their layer's update, each.
        base: the base model, where the start is made again from its weights and the configuration names none.

    Raises:
        NdLoraValueError: the method has no rank axis, or nothing would be left.
        OSError: a file cannot be read or written.
    """
    if not 0.0 <= tolerance < 1.0:
        raise NdLoraValueError(f"tolerance={tolerance!r}: choose a share from 0 to below 1, such as 0.01.")
    check_new(output)
    reader, files = _open(adapter, base, trust_remote_code)
    kept: Kept = {}
    with torch.no_grad():
        for path in reader.shapes:
            kept[path] = _used_units(reader.read(path, files), tolerance)
    if not any(kept.values()):
        raise NdLoraValueError(
            f"Every rank unit of {reader.directory} is zero: the adapter does nothing, and nothing would be left of it."
        )
    plans = {path: reader.plan(path, files) for path in reader.shapes}
    if any(plan.shared for plan in plans.values()):
        if len({plan.layout.rank for plan in plans.values()}) > 1:
            raise NdLoraValueError(
                f"method={reader.config.method!r} shares factors between layers of several ranks: its units cannot be "
                f"dropped."
            )
        used = sorted(set().union(*kept.values()))  # one tensor for all of them
        kept = dict.fromkeys(kept, used)
    for path, units in kept.items():
        if not units and reader.is_parameter(path):
            units.append(0)  # PEFT finds its tensors by the parameters beside it
    return _write(reader, files, output, kept)


def _open(
    adapter: str | Path, base: str | None, trust_remote_code: bool
) -> tuple[AdapterReader, BaseFiles | None]:
    reader = AdapterReader(adapter)
    files = reader.open_base(base, trust_remote_code) if reader.reads_base or base is not None else None
    check_sound(reader, files)
    for path in reader.shapes:
        structure = reader.plan(path, files).structure
        if not any(structure.rank_axes.values()):
            raise NdLoraValueError(
                f"method={reader.config.method!r} has no rank axis: its update is no sum of rank units that could be "
                f"taken out. Export it to='lora' with a rank instead."
            )
    return reader, files


def _used_units(layer: ReadLayer, tolerance: float) -> list[int]:
    rank = layer.plan.layout.rank
    total = layer.plan.delta_norm(layer.trained, layer.frozen)
    used = []
    for unit in range(rank):
        size, start = added_by(layer.plan, layer.trained, layer.frozen, [unit])
        if size > tolerance * total + UNRESOLVED * start:
            used.append(unit)
    return used


def _write(
    reader: AdapterReader,
    files: BaseFiles | None,
    output: str | Path,
    kept: Kept,
    scales: Mapping[str, float] | None = None,
) -> SmallerReport:
    scales = scales or dict.fromkeys(kept, 1.0)
    config = _smaller_config(reader, files, kept, scales)
    with torch.no_grad():
        layers, same_start = _select(reader, files, config, kept)
        if not same_start:  # a start of the smaller rank is another one: the old one is kept in the file
            config = replace(config, save_frozen=True)
            resolved = config.resolved()
            layers = [layer._replace(plan=_plan(reader, config, resolved, layer)) for layer in layers]
        written = {layer.path: layer for layer in layers}
        report = []
        for path, units in kept.items():
            layer = reader.read(path, files)
            rank = layer.plan.layout.rank
            lost = [unit for unit in range(rank) if unit not in units]
            numbers = written[path].plan.num_saved if units else 0
            error = _error(layer, lost, scales[path]) if lost else 0.0
            report.append(SmallerLayer(layer.name, rank, len(units), numbers, error))
    with new_directory(output) as directory:
        numbers = write_adapter(directory, config, layers, reader.other_tensors())
    return SmallerReport(Path(output), tuple(report), numbers)


def _error(layer: ReadLayer, lost: Sequence[int], scale: float) -> float:
    if scale != 1:  # of the first units alone
        trained, frozen = (cast_factors(group, torch.float64) for group in (layer.trained, layer.frozen))
        whole = layer.plan.delta(trained, frozen)
        part = layer.plan.delta(trained, frozen, Ranks(layer.plan.layout.rank - len(lost), scale=scale))
        return float((whole - part).norm() / whole.norm().clamp(min=1e-300))
    total = layer.plan.delta_norm(layer.trained, layer.frozen)
    size, start = added_by(layer.plan, layer.trained, layer.frozen, lost)
    return 0.0 if total == 0 or size <= UNRESOLVED * start else size / total


def _smaller_config(
    reader: AdapterReader, files: BaseFiles | None, kept: Kept, scales: Mapping[str, float]
) -> NdLoraConfig:
    """The adapter's configuration with each layer's new rank, and an alpha that gives its scaling times its scale."""
    ranks, alphas = {}, {}
    for path, units in kept.items():
        if units:
            key = f"^{re.escape(reader.name(path))}"
            ranks[key] = len(units)
            alphas[key] = reader.plan(path, files).scaling * scales[path] * len(units)
    largest, alpha = max(ranks.values()), max(alphas.values())
    fields = {
        "r": largest,
        "lora_alpha": alpha,
        "use_rslora": False,
        "rank_pattern": {key: rank for key, rank in ranks.items() if rank != largest},
        "alpha_pattern": {key: value for key, value in alphas.items() if not math.isclose(value, alpha)},
    }
    if not all(kept.values()):
        names = [reader.name(path) for path, units in kept.items() if units and not reader.is_parameter(path)]
        gone = {reader.name(path) for path, units in kept.items() if not units}
        fields |= {
            "target_modules": "|".join(map(re.escape, names)) or None,
            "exclude_modules": None,
            "layers_to_transform": None,
            "layers_pattern": None,
            "base_fingerprint": {
                name: entry
                for name, entry in (reader.config.base_fingerprint or {}).items()
                if name not in gone
            }
            or None,
        }
    return replace(reader.config, layers=None, checksums=None, **fields)


def _plan(
    reader: AdapterReader, config: NdLoraConfig, resolved: AdapterOptions, layer: NewLayer
) -> LayerAdapter:
    return plan_form(config.options_for(layer.name, resolved), layer.name, layer.form, reader.largest)


def _select(
    reader: AdapterReader, files: BaseFiles | None, config: NdLoraConfig, kept: Kept
) -> tuple[list[NewLayer], bool]:
    """The layers with their units selected, and whether their frozen factors can be made again as they are."""
    resolved, layers, same = config.resolved(), [], True
    for path, units in kept.items():
        if not units:
            continue
        old = reader.read(path, files)
        form = reader.known_form(path, files)
        trained, frozen = (
            select_units(old.plan.structure, factors, units) for factors in (old.trained, old.frozen)
        )
        layer = NewLayer(path, old.name, form, old.plan, trained, frozen)
        layer = layer._replace(plan=_plan(reader, config, resolved, layer))
        if same and layer.plan.recomputed:
            same = _made_again(layer, reader, files)
        layers.append(layer)
    return layers, same


def _made_again(layer: NewLayer, reader: AdapterReader, files: BaseFiles | None) -> bool:
    """Whether the start of the new rank gives these frozen factors."""
    again = reader.made_again(layer.plan, layer.name, next(iter(layer.trained.values())).dtype, files)
    return all(
        torch.allclose(again[name].double(), value.double(), rtol=1e-4, atol=1e-6)
        for name, value in layer.frozen.items()
    )
