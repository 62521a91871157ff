"""What is compared: PEFT's field, each in its authors' recipe as far as PEFT has it, and ours."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from peft import PeftConfig, PeftType
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from torch import nn

from benchmarks.runs import Setting

__all__ = ["SEEDS", "peft_config", "settings_for"]

SEEDS = (0, 1, 2, 3, 4)


def _peft(
    name: str, kind: str, lowest: float, ratios: Mapping[str, float] | None = None, **options: Any
) -> Setting:
    return Setting(name, kind, options, lowest, ratios or {}, seeds=SEEDS, neighbours=True)


def _lora(name: str, rank: int, lowest: float, **options: Any) -> Setting:
    return _peft(name, "LORA", lowest, r=rank, lora_alpha=options.pop("lora_alpha", 2 * rank), **options)


def _ours(name: str, lowest: float, **options: Any) -> Setting:
    return Setting(name, "NDLORA", options, lowest, seeds=SEEDS, neighbours=True)


def _field(
    core: Sequence[int],
    psoft: Sequence[int],
    length: Sequence[int],
    waves: Sequence[int],
    values: Sequence[int],
    tiny: Sequence[int],
    blocks: Sequence[int],
    vera: Sequence[int],
    bank: int,
    nola: int,
    directions: Sequence[int],
) -> tuple[Setting, ...]:
    """The whole field, with sizes that fit the model.

    Args:
        core: ranks of methods with a trained matrix between frozen sides.
        psoft, vera: ranks.
        length: of Uni-LoRA's vector.
        waves: coefficients a layer.
        values: singular values a layer.
        tiny: TinyLoRA's numbers a layer.
        blocks: C3A's.
        bank: length of VB-LoRA's vectors.
        nola: bases a side.
        directions: random ones a layer.
    """
    return (
        Setting("head alone", "NONE", {}, 1e-3, seeds=SEEDS),
        # PEFT's
        _lora("LoRA r=8", 8, 1e-3),
        _lora("LoRA r=4", 4, 1e-3),
        _lora("LoRA r=1", 1, 3e-3),
        _lora("DoRA r=1", 1, 3e-3, use_dora=True),
        _lora("rsLoRA r=8", 8, 3e-4, lora_alpha=16, use_rslora=True),
        _lora("PiSSA r=8", 8, 3e-4, lora_alpha=8, init_lora_weights="pissa"),
        _peft("LoKr full", "LOKR", 1e-3, r=1024, alpha=1024, decompose_factor=-1),
        _peft("LoKr factor 4, r=4", "LOKR", 3e-3, r=4, alpha=4, decompose_factor=4),
        _peft("IA3", "IA3", 3e-3),
        _peft("IA3 k, v, down", "IA3", 3e-3, authors=True),
        _peft("RoAd", "ROAD", 3e-3, variant="road_1"),
        _peft("MiSS r=1", "MISS", 1e-3, r=1),
        _peft("MiSS r=4", "MISS", 1e-3, r=4),
        *(_peft(f"VeRA r={r}", "VERA", 1e-2, r=r) for r in vera),
        *(_peft(f"PSOFT r={r}", "PSOFT", 1e-3, r=r, psoft_alpha=r) for r in psoft),
        *(_peft(f"Uni-LoRA d={d}", "UNILORA", 3e-3, r=4, theta_d_length=d) for d in length),
        *(_peft(f"FourierFT n={n}", "FOURIERFT", 1e-2, n_frequency=n, scaling=150.0) for n in waves),
        *(_peft(f"WaveFT n={n}", "WAVEFT", 1e-3, n_frequency=n, scaling=25.0) for n in waves),
        *(_peft(f"C3A b={b}", "C3A", 1e-2, block_size=b) for b in blocks),
        _peft(f"TinyLoRA r=2 u={tiny[0]}", "TINYLORA", 3e-3, r=2, u=tiny[0]),
        _peft(f"TinyLoRA r=8 u={tiny[1]}", "TINYLORA", 3e-3, r=8, u=tiny[1]),
        _peft("VB-LoRA h=30", "VBLORA", 1e-3, {"logits": 10.0}, r=4, num_vectors=30, vector_length=bank, topk=2),
        # ours
        _ours("crossed", 1e-3),
        _ours("crossed, alpha 16", 1e-3, lora_alpha=16),
        _ours("crossed 2", 1e-3, crossed_modes=2),
        _ours("crossed 8", 1e-3, crossed_modes=8),
        _ours("crossed 2 terms", 1e-3, r=2),
        _ours("crossed 8, 2 terms", 1e-3, crossed_modes=8, r=2),
        _ours("crossed 8 terms", 3e-4, r=8),
        _ours("crossed 3 modes", 3e-3, num_modes=3),
        _ours("crossed 3 modes, 2 terms", 3e-3, r=2, num_modes=3),
        _ours("crossed 4 modes", 3e-3, num_modes=4),
        _ours("crossed 4 modes, 2 terms", 3e-3, r=2, num_modes=4),
        _ours("ndlinear even", 1e-3, method="ndlinear"),
        _ours("ndlinear even, 2 terms", 1e-3, method="ndlinear", r=2),
        _ours("ndlinear even, 3 modes", 3e-3, method="ndlinear", num_modes=3),
        # the sizes that CDKA's authors recommend
        _ours("CDKA 2 x 8", 1e-3, method="ndlinear", components=(2, 8)),
        _ours("CDKA 2 x 8, 4 terms", 3e-4, method="ndlinear", r=4, components=(2, 8)),
        _ours("CDKA 2 x 2, 8 terms", 3e-4, method="ndlinear", r=8, components=(2, 2)),
        _ours("shared_crossed", 1e-3, method="shared_crossed"),
        _ours("shared_crossed, alpha 16", 1e-3, method="shared_crossed", lora_alpha=16),
        _ours("shared_core r=4", 3e-3, method="shared_core", r=4),
        _ours("shared_core r=8", 1e-3, method="shared_core", r=8),
        _ours("shared_diagonal r=8", 3e-3, method="shared_diagonal", r=8),
        *(_ours(f"metatt r={r}", 3e-3, method="metatt", r=r) for r in (1, 2, 4)),
        _ours("metatt r=8", 1e-3, method="metatt", r=8),
        _ours("tensor_train r=2", 3e-3, method="tensor_train", r=2),
        _ours("tensor_train r=4", 1e-3, method="tensor_train", r=4),
        *(_ours(f"inttune r={r}", 3e-3, method="inttune", r=r) for r in core),
        *(_ours(f"lora_xs r={r}", 3e-4, method="lora_xs", r=r) for r in core),
        *(_ours(f"lora_sb r={r}", 1e-3, method="lora_sb", r=r) for r in core),
        *(_ours(f"svfit r={r}", 3e-3, method="svfit", r=r) for r in values),
        _ours(f"loldu r={values[0]}", 3e-3, method="loldu", r=values[0]),
        *(_ours(f"random_diagonal r={r}", 1e-3, method="random_diagonal", r=r) for r in directions),
        _ours(f"nola k={nola}", 3e-3, method="nola", options={"bases": nola}),
        _ours("columns r=1", 1e-3, method="columns", r=1),
        _ours("columns r=4", 1e-3, method="columns", r=4),
        _ours("rows r=1", 1e-3, method="rows", r=1),
        _ours("tiled r=1", 1e-3, method="tiled", r=1),
        _ours("ffa_lora r=4", 1e-3, method="ffa_lora", r=4),
        _ours("slora r=1", 3e-3, method="slora", r=1),
        _ours("slora r=8", 1e-3, method="slora", r=8),
        _ours("nlora r=8", 1e-3, method="nlora", r=8),
    )  # fmt: skip


_FIELDS = {
    # layers of 384 and 1536 features, 18 of them
    "sentences": _field(
        core=(8, 16, 32, 48), psoft=(16, 32, 64), length=(1296, 5184, 20736, 41472), waves=(144, 576, 1152, 2304),
        values=(64, 144, 384), tiny=(64, 256), blocks=(384, 128), vera=(256, 1024), bank=128, nola=64,
        directions=(72, 144, 288, 576),
    ),
    # layers of 128 and 512 features, 24 of them
    "images": _field(
        core=(4, 8, 16, 27), psoft=(8, 16, 32), length=(576, 2304, 9216, 18432), waves=(48, 192, 384, 768),
        values=(16, 48, 128), tiny=(24, 96), blocks=(128, 64), vera=(64, 256), bank=64, nola=16,
        directions=(24, 48, 96, 192, 384, 768),
    ),
    # a run takes minutes: two rates, three seeds
    "rl": (
        Setting("no training", "NONE", {}, 1e-3, seeds=(0,)),
        *(
            replace(each, tried=2, seeds=SEEDS[:3], neighbours=False)
            for each in (
                _lora("LoRA r=8", 8, 3e-4),
                _ours("crossed", 3e-4, lora_alpha=16),  # the default then
                _lora("LoRA r=1", 1, 1e-3),
                _ours("lora_xs r=8", 3e-4, method="lora_xs", r=8),
                _ours("inttune r=8", 1e-3, method="inttune", r=8),
            )
        ),
    ),
}  # fmt: skip


def settings_for(track: str) -> tuple[Setting, ...]:
    """What one track compares, in the order in which the queue takes it."""
    return _FIELDS[track]


def peft_config(setting: Setting, model: nn.Module, layers: Sequence[str]) -> PeftConfig | None:
    """The configuration on the given linear layers; None for the head alone."""
    if setting.peft_type == "NONE":
        return None
    options, targets = dict(setting.options), list(layers)
    if "components" in options:  # arXiv 2602.01267: kron of (out / r1, r2) and (r1, in / r2)
        r1, r2 = options.pop("components")
        options["modes"] = {name: _components(model.get_submodule(name), r1, r2) for name in targets}
    if setting.peft_type == "IA3":
        down = [name for name in targets if _is_down(model, name)]
        if options.pop("authors", False):  # keys, values and what the second product of the MLP reads
            targets = [name for name in targets if name.endswith(("key", "value", "k_proj", "v_proj"))] + down
        options["feedforward_modules"] = down
    config = PEFT_TYPE_TO_CONFIG_MAPPING[PeftType[setting.peft_type]]
    return config(target_modules=targets, **options)


def _is_down(model: nn.Module, name: str) -> bool:
    layer = model.get_submodule(name)
    return layer.in_features > layer.out_features


def _components(layer: nn.Module, r1: int, r2: int) -> dict[str, list[int]]:
    assert isinstance(layer, nn.Linear)
    return {
        "in_modes": [r2, layer.in_features // r2],
        "out_modes": [layer.out_features // r1, r1],
    }
