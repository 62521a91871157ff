"""Two sides of which one trains; the other is random from a seed, a choice of features, or tiles.

Sources: LoRA-FA, arXiv 2308.03303, and FFA-LoRA, arXiv 2403.12313; S2FT, arXiv 2412.06289 (Infini-AI-Lab/S2FT); MiSS,
arXiv 2409.15371; MiCA, arXiv 2604.01694; SoRA, arXiv 2311.11696 (TsinghuaC3I/SoRA), where a gate lies between them.
"""

from dataclasses import replace
from functools import partial

from ndlora_plugins.methods.base import Method
from ndlora_plugins.structures import Chain

__all__ = ["columns", "ffa_lora", "mica", "rows", "sora", "tiled"]

ffa_lora = Method(
    name="ffa_lora",
    summary="LoRA whose down stays random, made again from a seed: half of the numbers",
    source="arXiv 2403.12313",
    structure=partial(Chain, core="none"),
    factors=("down", "up"),
    trains=("up",),
    start="seeded",
)
mica = replace(
    ffa_lora,
    name="mica",
    summary="LoRA whose up stays at the smallest singular vectors of the weight",
    source="arXiv 2604.01694",
    trains=("down",),
    start="smallest_singular",
)
tiled = replace(
    ffa_lora,
    name="tiled",
    summary="LoRA whose down adds up every r-th feature (MiSS)",
    source="arXiv 2409.15371",
    start="tiles",
)
rows = Method(
    name="rows",
    summary="trains r whole rows of the weight: output features",
    source="arXiv 2412.06289",
    structure=partial(Chain, core="none", indexed=("up",)),
    factors=("down", "rows"),
    trains=("down",),
    start="random_rows",
)
columns = replace(
    rows,
    name="columns",
    summary="trains r whole columns of the weight: input features",
    structure=partial(Chain, core="none", indexed=("down",)),
    factors=("columns", "up"),
    trains=("up",),
    start="random_columns",
)
sora = Method(
    name="sora",
    summary="LoRA with a trained gate for each rank, to be pruned by the schedule sparse_ranks",
    source="arXiv 2311.11696",
    structure=partial(Chain, core="diagonal"),
    factors=("down", "core", "up"),
    start="open_gates",
    schedules=("sparse_ranks",),
)
