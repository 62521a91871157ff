"""dW = up @ core @ down: cosines of random frequencies on both sides, and their coefficients, which train."""

import torch

from ndlora_plugins import hookimpl
from ndlora_plugins.methods import Method
from ndlora_plugins.starts import Start
from ndlora_plugins.structures import Chain

FACTORS = ("down", "core", "up")
SOURCE = "after FourierFT, arXiv 2405.03003"


def cosines(size, rank, generator):
    """(rank, size): orthonormal rows of the discrete cosine transform."""
    frequencies = torch.randperm(size, generator=generator)[:rank].double()
    rows = torch.cos(torch.pi / size * frequencies[:, None] * (torch.arange(size) + 0.5))
    return (rows / rows.norm(dim=1, keepdim=True)).float()


def draw_sides(structure, trains, seen, generator):
    layout = structure.layout
    down = cosines(layout.in_features, layout.rank, seen.draw("down"))
    up = cosines(layout.out_features, layout.rank, seen.draw("up")).T
    return {"down": down, "core": torch.zeros(layout.rank, layout.rank), "up": up}


def smaller_side(structure):
    return min(structure.layout.in_features, structure.layout.out_features)


start = Start(name="cosine_sides", summary="random cosines, a core of zeros", source=SOURCE, function=draw_sides,
              gives=FACTORS, zero=("core",), reads=frozenset({"seed"}),
              max_rank=smaller_side)  # fmt: skip
method = Method(name="cosine", summary="coefficients of the update at random cosines: rank x rank numbers a layer",
                source=SOURCE, structure=Chain, factors=FACTORS, trains=("core",), start="cosine_sides",
                rank=16)  # fmt: skip


@hookimpl
def ndlora_methods():
    return [method]


@hookimpl
def ndlora_starts():
    return [start]
