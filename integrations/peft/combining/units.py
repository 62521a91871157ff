"""The rank units of an update: what each adds, and the update without some of them.

A unit is one index along all of a structure's `rank_axes`: a singular direction, a Kronecker term, a bond.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ndlora_plugins.adapter import LayerAdapter
from ndlora_plugins.fused import cast_factors
from ndlora_plugins.structures.base import Factors, Structure

__all__ = ["UNRESOLVED", "added_by", "select_units", "subtracts_start"]

# of a unit's start, where this is subtracted: smaller changes are lost in its rounding
UNRESOLVED = 1e-7


def select_units(structure: Structure, factors: Factors, units: Sequence[int]) -> dict[str, Tensor]:
    """The factors, in `structure.cut(len(units))`, of these units alone."""
    selected = dict(factors)
    for name, axes in structure.rank_axes.items():
        for axis in axes if name in selected else ():
            index = torch.tensor(units, device=selected[name].device)
            selected[name] = selected[name].index_select(axis, index)
    return selected


def subtracts_start(plan: LayerAdapter) -> bool:
    """Tell whether a start is subtracted whose units count too: a factor that changes alone is linear in its change."""
    return plan.anchor == "snapshot" and len(plan.trained) > 1


def added_by(
    plan: LayerAdapter, trained: Factors, frozen: Factors, units: Sequence[int]
) -> tuple[float, float]:
    """(||dW - dW without these units||_F, the same of the start that is subtracted), in float64, without scaling.

    The first is exactly 0 where a factor of every product is; with a start it is not resolved below `UNRESOLVED` of the
    second.
    """
    trained, frozen = cast_factors(trained, torch.float64), cast_factors(frozen, torch.float64)
    if not subtracts_start(plan):
        structure, factors = _of_units(plan.structure, {**frozen, **trained}, units)
        return float(structure.norm(factors)), 0.0
    now = {name: value + trained[name] if name in trained else value for name, value in frozen.items()}
    structure, added = _of_units(plan.structure, now, units)
    _, at_start = _of_units(plan.structure, frozen, units)
    first = next(factor.name for factor in structure.factors if factor.indices is None)
    minus = {**at_start, first: -at_start[first]}
    difference = structure.added(2).norm(structure.added(2).add([added, minus]))
    return float(difference), float(structure.norm(at_start))


def _of_units(structure: Structure, factors: Factors, units: Sequence[int]) -> tuple[Structure, Factors]:
    """dW(factors) - dW(factors without the units), by the exact change of a multilinear form."""
    without, change = dict(factors), {}
    for name, axes in structure.rank_axes.items():
        value = factors.get(name)
        if value is None or not axes or not value.is_floating_point():
            continue  # a unit of chosen features goes with its other side
        without[name] = value.clone()
        for axis in axes:
            without[name].index_fill_(axis, torch.tensor(units, device=value.device), 0.0)
        change[name] = value - without[name]
    return structure.changed(frozenset(change)), structure.change(without, change)
