"""LoRA-SB (arXiv 2411.19557): frozen sides and a core from the singular vectors of the first gradients."""

import torch

from ndlora_plugins import hookimpl
from ndlora_plugins.methods import Method
from ndlora_plugins.starts import Start
from ndlora_plugins.starts.singular import largest_singular_vectors
from ndlora_plugins.structures import Chain

FACTORS = ("down", "core", "up")
FIRST_STEP = 1e-3


def first_step(structure, trains, seen, generator):
    step = -FIRST_STEP * seen.gradient.float().sign()
    left, values, right = largest_singular_vectors(step, structure.layout.rank)
    return {"down": right, "core": torch.diag(values), "up": left.T}


start = Start(name="first_gradient", summary="the best low-rank form of a first step", source="arXiv 2411.19557",
              gives=FACTORS, reads=frozenset({"gradient"}), recomputable=False, function=first_step)  # fmt: skip
method = Method(name="strange_sb", summary="a core between the first gradient's sides", source="arXiv 2411.19557",
                structure=Chain, factors=FACTORS, trains=("core",), start="first_gradient")  # fmt: skip


@hookimpl
def ndlora_methods():
    return [method]


@hookimpl
def ndlora_starts():
    return [start]
