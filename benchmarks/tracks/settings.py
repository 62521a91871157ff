"""The field: PEFT's methods in their authors' recipes, and ours; one line a setting, in the order of the queue."""

from __future__ import annotations

from benchmarks.quality.settings import Setting

__all__ = ["SETTINGS"]


def _peft(name: str, peft_type: str, lowest: float, **options: object) -> Setting:
    return Setting(name, peft_type, options, lowest)


def _lora(name: str, rank: int, lowest: float = 3e-4, **options: object) -> Setting:
    return _peft(name, "LORA", lowest, r=rank, lora_alpha=2 * rank, **options)


def _ours(name: str, method: str, rank: int, lowest: float = 1e-3, **options: object) -> Setting:
    return _peft(name, "NDLORA", lowest, method=method, r=rank, **options)


SETTINGS = (
    _lora("LoRA r=8", 8),
    _ours("crossed n=4", "crossed", 1),
    _lora("LoRA r=1", 1, 1e-3),
    _ours("metatt r=8", "metatt", 8),
    _ours("shared_core r=16", "shared_core", 16),
    _ours("lora_xs r=32", "lora_xs", 32),
    _peft("VeRA r=256", "VERA", 3e-3, r=256),
    _peft("LoKr factor 4", "LOKR", 1e-3, r=32, alpha=32, decompose_factor=4),
    _ours("crossed n=8", "crossed", 1, options={"crossed_modes": 8}),
    _ours("ndlinear", "ndlinear", 1),
    _peft("PSOFT r=32", "PSOFT", 1e-3, r=32),
    _peft("TinyLoRA r=2 u=64", "TINYLORA", 1e-3, r=2, u=64, weight_tying=0.0),
    _ours("metatt r=4", "metatt", 4),
    _ours("metatt r=16", "metatt", 16),
    _peft("MiSS r=2", "MISS", 3e-4, r=2),
    _peft(
        "IA3",
        "IA3",
        1e-3,
        target_modules=["key", "value", "output.dense"],
        feedforward_modules=["output.dense"],
    ),
    _peft("C3A block 48", "C3A", 1e-2, block_size=48),
    _ours("crossed n=4, 2 terms", "crossed", 2),
    _ours("shared_core r=8", "shared_core", 8),
    _ours("shared_core r=32", "shared_core", 32),
    _ours("lora_xs r=8", "lora_xs", 8),
    _ours("lora_xs r=16", "lora_xs", 16),
    _ours("svfit r=64", "svfit", 64),
    _peft("FourierFT n=300", "FOURIERFT", 3e-3, n_frequency=300, scaling=150.0),
    _peft("VB-LoRA", "VBLORA", 1e-3, r=4, num_vectors=64, vector_length=96, topk=2),
    _peft("Uni-LoRA", "UNILORA", 3e-3),
    _peft("RoAd", "ROAD", 1e-3),
    _lora("rsLoRA r=8", 8, 1e-4, use_rslora=True),
    _lora("DoRA r=8", 8, use_dora=True),
    _lora("PiSSA r=8", 8, 3e-5, init_lora_weights="pissa"),
    _lora("LoRA r=4", 4),
    _peft("LoKr full", "LOKR", 1e-3, r=1024, alpha=1024, decompose_factor=-1),
    _ours("shared_crossed", "shared_crossed", 1),
    _ours("shared_diagonal r=32", "shared_diagonal", 32),
    _ours("crossed, 3 modes", "crossed", 1, options={"num_modes": 3}),
    _ours("inttune r=8", "inttune", 8),
    _ours("inttune r=32", "inttune", 32),
    _ours("inttune r=16 from pivots", "inttune", 16, init_lora_weights="n_lora_pivots"),
    _ours("lora_sb r=16", "lora_sb", 16),
    _ours("slora r=8", "slora", 8),
    _ours("nlora r=8 from pivots", "nlora", 8, init_lora_weights="n_lora_pivots"),
    _ours("columns r=1", "columns", 1),
    _ours("tiled r=2", "tiled", 2),
    _ours("ffa_lora r=2", "ffa_lora", 2),
    _ours("tensor_train r=4", "tensor_train", 4),
    _ours("nola", "nola", 8),
)
