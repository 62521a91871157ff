"""LoRA-XS (arXiv 2405.17604): frozen singular vectors of the weight, a trained rank x rank core between them."""

import torch

from ndlora_plugins import hookimpl
from ndlora_plugins.methods import Method
from ndlora_plugins.starts import Start
from ndlora_plugins.starts.singular import largest_singular_vectors
from ndlora_plugins.structures import Chain

FACTORS = ("down", "core", "up")


def svd_sides(structure, trains, seen, generator):
    rank = structure.layout.rank
    left, values, right = largest_singular_vectors(seen.weight.float(), rank)
    return {"down": values[:, None] * right, "core": torch.zeros(rank, rank), "up": left.T}


start = Start(name="svd_sides", summary="sides of the SVD, a core of zeros", source="arXiv 2405.17604",
              gives=FACTORS, zero=("core",), reads=frozenset({"weight"}), function=svd_sides)  # fmt: skip
method = Method(name="strange_xs", summary="a core between frozen singular vectors", source="arXiv 2405.17604",
                structure=Chain, factors=FACTORS, trains=("core",), start="svd_sides")  # fmt: skip


@hookimpl
def ndlora_methods():
    return [method]


@hookimpl
def ndlora_starts():
    return [start]
