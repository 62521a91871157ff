"""What is compared: one line a setting, in the order in which the queue takes them."""

from __future__ import annotations

from typing import Any

from peft import PeftConfig, PeftType
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING

from benchmarks.runs import Setting

__all__ = ["LONG", "SETTINGS", "peft_config", "settings_for"]


def _lora(rank: int, **options: Any) -> dict[str, Any]:
    return {"r": rank, "lora_alpha": 2 * rank, **options}


def _ndlinear(name: str, terms: int, lowest: float, **options: Any) -> Setting:
    """Kronecker terms; with the default start these runs have twice the alpha that is the default now."""
    alpha = {} if "init_lora_weights" in options else {"lora_alpha": 16}
    return Setting(name, "NDLORA", {"method": "ndlinear", "r": terms, **options, **alpha}, lowest)


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
    _core("nlora", 8, 1e-3, "nlora-r8-pivots", init_lora_weights="n_lora_pivots"),
    _core("inttune", 64, 1e-3),
    _ndlinear("ndlinear-3modes-6terms", 6, 1e-3, num_modes=3),
    Setting("lokr-full", "LOKR", {"r": 1024, "alpha": 1024, "decompose_factor": -1}, 3e-3),
    _ndlinear("ndlinear-crossed4", 1, 1e-3, crossed_modes=4),
    _ndlinear("ndlinear-crossed4-2terms", 2, 1e-3, crossed_modes=4),
    _ndlinear("ndlinear-crossed4-4terms", 4, 1e-3, crossed_modes=4),
    _ndlinear("ndlinear-crossed2", 1, 1e-3, crossed_modes=2),
    _ndlinear("ndlinear-crossed8", 1, 1e-3, crossed_modes=8),
    _ndlinear("ndlinear-crossed4-3modes", 1, 1e-3, crossed_modes=4, num_modes=3),
    _ndlinear("ndlinear-crossed4-3modes-2terms", 2, 1e-3, crossed_modes=4, num_modes=3),
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
    Setting("lokr-factor4", "LOKR", {"r": 32, "alpha": 32, "decompose_factor": 4}, 3e-3),
    Setting("pissa-r8", "LORA", _lora(8, init_lora_weights="pissa"), 3e-5),
    Setting("vera-r256", "VERA", {"r": 256}, 1e-2),
    _core("random_diagonal", 256, 1e-3),
    _core("svfit", 192, 1e-3),
    _core("random_diagonal", 64, 1e-3),
    _core("crossed", 1, 3e-3, "crossed", lora_alpha=8),
    _core("crossed", 1, 3e-3, "crossed-a4", lora_alpha=4),
    _core("crossed", 2, 3e-3, "crossed-3modes-2terms", num_modes=3, lora_alpha=8),
    _core("crossed", 2, 3e-3, "crossed-2terms", lora_alpha=8),
    _core("metatt", 16, 1e-3),
    _core("lora_xs", 16, 3e-4),
    _core("lora_sb", 8, 1e-3),
    _core("lora_sb", 16, 1e-3),
    *(Setting(f"fourierft-n{n}", "FOURIERFT", {"n_frequency": n, "scaling": 150.0}, 1e-2) for n in (64, 256)),
    *(Setting(f"unilora-d{d}", "UNILORA", {"r": 4, "theta_d_length": d}, 1e-2) for d in (2688, 10752)),
)

# of the training of all blocks, the most telling first: two rates, that the short task suggests (of lora-r8 and crossed
# 0.0055 too), and two seeds
LONG = tuple(
    Setting(name, peft_type, options, lowest, tried=2, seeds=(0, 1))
    for name, peft_type, options, lowest in (
        ("lora-r8", "LORA", _lora(8), 1e-3),
        ("crossed", "NDLORA", {"method": "crossed", "lora_alpha": 8}, 3e-3),
        ("crossed-a16", "NDLORA", {"method": "crossed", "lora_alpha": 16}, 1e-3),
        ("metatt-r16", "NDLORA", {"method": "metatt", "r": 16}, 3e-3),
        ("lora-r1", "LORA", _lora(1), 3e-3),
        ("metatt-r8", "NDLORA", {"method": "metatt", "r": 8}, 3e-3),
        (
            "crossed-3modes-2terms-a16",
            "NDLORA",
            {"method": "crossed", "num_modes": 3, "r": 2, "lora_alpha": 16},
            3e-3,
        ),
        ("lora_sb-r17", "NDLORA", {"method": "lora_sb", "r": 17}, 3e-3),
        ("shared_crossed", "NDLORA", {"method": "shared_crossed"}, 1e-3),
    )
)


def settings_for(task: str) -> tuple[Setting, ...]:
    """What a task compares."""
    return LONG if task == "gsm8k-long" else SETTINGS


def peft_config(setting: Setting, task_type: str = "CAUSAL_LM") -> PeftConfig:
    """The configuration on all linear layers of a model but the output layer."""
    config = PEFT_TYPE_TO_CONFIG_MAPPING[PeftType[setting.peft_type]]
    return config(**{"target_modules": "all-linear", "task_type": task_type, **setting.options})
