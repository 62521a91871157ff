"""Warnings: entries that match nothing, modes that cost too much, schedules that nobody runs."""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterable

from torch import nn

from ndlora_plugins.errors import LopsidedModesWarning, NdLoraWarning, UnmatchedTargetWarning

from ..configuration.config import NdLoraConfig
from ..layers.layer import NdLoraLayer
from .targets import Planned
from .towers import warn_of_towers

__all__ = ["warn_of_lopsided", "warn_of_penalties", "warn_of_targets"]


def warn_of_targets(
    config: NdLoraConfig, model: nn.Module, asked: str | list[str] | None, names: list[str]
) -> None:
    """One warning for each entry that matches no adapted layer, and for each tower that is adapted by accident.

    Args:
        asked: `target_modules` as the user gave it.
        names: of the adapted layers.
    """
    warn_of_towers(model, asked, names)
    targets = [] if isinstance(config.target_modules, str) else sorted(config.target_modules or [])
    for target in targets:
        if not any(name == target or name.endswith(f".{target}") for name in names):
            _warn_unmatched("target_modules", target, names)
    for option in ("rank_pattern", "alpha_pattern"):
        for key in getattr(config, option):
            _warn_unless_matched(option, key, names)
    if config.modes and not {"in_modes", "out_modes"} & set(config.modes):
        for key in config.modes:
            _warn_unless_matched("modes", key, names)


def _warn_unless_matched(option: str, key: str, names: list[str]) -> None:
    if not any(re.match(rf"(.*\.)?({key})$", name) for name in names):
        _warn_unmatched(option, key, names)


def _warn_unmatched(option: str, entry: str, names: list[str]) -> None:
    known = sorted({name.rpartition(".")[2] for name in names})
    warnings.warn(
        f"{option}: the entry {entry!r} matches no adapted layer, so it does nothing. Layers that are adapted end "
        f"in {known}.",
        UnmatchedTargetWarning,
        stacklevel=2,
    )


def warn_of_lopsided(planned: Iterable[Planned]) -> None:
    """One warning that names the layers, worst first."""
    from ndlora_plugins.structures.base import LOPSIDED_RATIO

    lopsided = sorted(
        (
            (plan.structure.lopsidedness, target.name, plan)
            for target, _, _, plan, _ in planned
            if plan.structure.lopsidedness > LOPSIDED_RATIO
        ),
        key=lambda found: (-found[0], found[1]),
    )
    if not lopsided:
        return
    ratio, name, plan = lopsided[0]
    more = f" (and {len(lopsided) - 1} more layers)" if len(lopsided) > 1 else ""
    in_modes, out_modes = (list(sizes) for sizes in plan.structure.mode_sizes.values())
    warnings.warn(
        f"Layer {name!r}{more}: in_features={plan.layout.in_features} split into {in_modes} and "
        f"out_features={plan.layout.out_features} into {out_modes} take {plan.num_parameters:,} parameters, "
        f"{ratio:.1f} times those of even modes. Set `modes`, exclude the layer, or use a method without modes.",
        LopsidedModesWarning,
        stacklevel=2,
    )


def warn_of_penalties(model: nn.Module) -> None:
    """Warn of schedules that ask for a penalty or a change after each step, while nobody does it."""
    asking = {
        each.schedule.name
        for layer in model.modules()
        if isinstance(layer, NdLoraLayer)
        for chosen in layer.clock.chosen.values()
        for each in chosen
        if each.schedule.penalty is not None or each.schedule.after_step is not None
    }
    if asking:
        warnings.warn(
            f"schedules={sorted(asking)} ask for a penalty or for a change after each step, and nothing does it: pass "
            f"NdLoraCallback to the trainer, or add model.base_model.penalty() to the loss and call "
            f"model.base_model.after_step(optimizer) after each step.",
            NdLoraWarning,
            stacklevel=2,
        )
