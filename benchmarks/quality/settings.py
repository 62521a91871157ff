"""What is compared: one line a setting, in the order in which the queue takes them."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import torch
from peft import LoKrConfig, LoraConfig, PeftConfig, VeraConfig

from ndlora_plugins import NdLoraConfig

__all__ = ["GRID", "SETTINGS", "Setting", "modes_of", "peft_config"]

# learning rates, a factor of about 3 apart
GRID = (1e-5, 3e-5, 1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1, 3e-1, 1.0, 3.0)

_CONFIGS = {"LORA": LoraConfig, "LOKR": LoKrConfig, "VERA": VeraConfig, "NDLORA": NdLoraConfig}


@dataclass(frozen=True)
class Setting:
    """One adapter configuration.

    Attributes:
        name: of its folder among the results.
        peft_type: LORA, LOKR, VERA or NDLORA.
        options: of that type's PeftConfig.
        lowest: the lowest learning rate of the sweep's first four; it goes on from there as the results ask.
        modes: how the dimensions are split where it is not evenly: see `modes_of`.
    """

    name: str
    peft_type: str
    options: dict[str, Any] = field(hash=False)
    lowest: float
    modes: tuple[str, int] | None = None

    @property
    def first_rates(self) -> tuple[float, ...]:
        """The four rates that every sweep begins with."""
        start = GRID.index(self.lowest)
        return GRID[start : start + 4]


def _lora(rank: int, **options: Any) -> dict[str, Any]:
    return {"r": rank, "lora_alpha": 2 * rank, **options}


def _ndlinear(
    name: str, terms: int, lowest: float, modes: tuple[str, int] | None = None, **options: Any
) -> Setting:
    return Setting(name, "NDLORA", {"method": "ndlinear", "r": terms, **options}, lowest, modes)


def _core(method: str, rank: int, lowest: float, name: str | None = None, **options: Any) -> Setting:
    return Setting(name or f"{method}-r{rank}", "NDLORA", {"method": method, "r": rank, **options}, lowest)


SETTINGS = (
    Setting("lora-r8", "LORA", _lora(8), 3e-4),
    _ndlinear("ndlinear-1term", 1, 1e-3),
    Setting("lora-r1", "LORA", _lora(1), 1e-3),
    _ndlinear("ndlinear-4terms", 4, 1e-3),
    Setting("lora-r4", "LORA", _lora(4), 1e-3),
    _core("slora", 8, 1e-3),
    _core("slora", 8, 1e-3, "slora-r8-alpha16", lora_alpha=16),
    _core("nlora", 8, 1e-3, "nlora-r8-step", init_lora_weights="n_lora_step", lora_alpha=16),
    _core("inttune", 64, 1e-3),
    _ndlinear("ndlinear-3modes-6terms", 6, 1e-3, num_modes=3),
    Setting("lokr-full", "LOKR", {"r": 1024, "alpha": 1024, "decompose_factor": -1}, 3e-3),
    _ndlinear("ndlinear-crossed4", 1, 1e-3, ("crossed", 4)),
    _ndlinear("ndlinear-crossed8", 1, 1e-3, ("crossed", 8)),
    _ndlinear("ndlinear-kronecker", 1, 1e-3, init_lora_weights="kronecker"),
    _core("inttune", 8, 1e-3),
    _core("nlora", 8, 3e-4),
    _ndlinear("ndlinear-2terms", 2, 1e-3),
    _ndlinear("ndlinear-zero-mode", 1, 3e-3, init_lora_weights="zero_mode"),
    _ndlinear("ndlinear-random-anchored", 1, 1e-3, init_lora_weights="ndlinear", lora_alpha=4),
    _core("inttune", 32, 1e-3),
    _core("inttune", 128, 1e-3),
    _core("inttune", 64, 3e-5, "inttune-r64-slices", init_lora_weights="n_lora"),
    _core("nlora", 8, 3e-4, "nlora-r8-no-anchor", anchor="none"),
    _ndlinear("ndlinear-3modes", 1, 1e-3, num_modes=3),
    _ndlinear("ndlinear-3modes-4terms", 4, 1e-3, num_modes=3),
    _ndlinear("ndlinear-first12", 1, 1e-3, ("first", 12)),
    Setting("lokr-factor4", "LOKR", {"r": 32, "alpha": 32, "decompose_factor": 4}, 3e-3),
    Setting("pissa-r8", "LORA", _lora(8, init_lora_weights="pissa"), 3e-5),
    Setting("vera-r256", "VERA", {"r": 256}, 1e-2),
)


def peft_config(setting: Setting, model: torch.nn.Module) -> PeftConfig:
    """The configuration on all linear layers of `model` but the output layer."""
    options = dict(setting.options)
    if setting.modes is not None:
        options["modes"] = {
            name.rpartition(".")[2]: modes_of(setting.modes, layer.in_features, layer.out_features)
            for name, layer in model.named_modules()
            if isinstance(layer, torch.nn.Linear) and layer is not model.get_output_embeddings()
        }
    return _CONFIGS[setting.peft_type](target_modules="all-linear", task_type="CAUSAL_LM", **options)


def modes_of(kind: tuple[str, int], in_features: int, out_features: int) -> dict[str, list[int]]:
    """Two modes that are not even.

    ("first", n): the first mode of both dimensions is n, or the largest divisor below it.
    ("crossed", n): in = (n, in/n), out = (out/n, n), n the largest common divisor up to it: a term has LoRA r=1's
    number of parameters, in + out, and rank up to n * n instead of 1. With n = 1 it is LoRA.
    """
    shape, wanted = kind
    common = math.gcd(in_features, out_features)
    first = next(n for n in range(wanted, 0, -1) if common % n == 0)
    out_modes = [first, out_features // first]
    return {
        "in_modes": [first, in_features // first],
        "out_modes": out_modes if shape == "first" else out_modes[::-1],
    }
