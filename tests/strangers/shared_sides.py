"""LoTR (arXiv 2402.01376): all layers of one shape share the two sides, each has a core of its own."""

from ndlora_plugins import hookimpl
from ndlora_plugins.methods import Method
from ndlora_plugins.starts import Start
from ndlora_plugins.starts.base import random_but_zero
from ndlora_plugins.structures import Chain

FACTORS = ("down", "core", "up")


def share_sides(factor, layer, layout):
    return None if factor.name == "core" else f"{factor.name}_{layout.out_features}x{layout.in_features}"


start = Start(name="zero_core", summary="a core of zeros between random sides", source="arXiv 2402.01376",
              gives=FACTORS, zero=("core",), function=random_but_zero("core"))  # fmt: skip
method = Method(name="strange_shared", summary="shared sides, a core a layer", source="arXiv 2402.01376",
                structure=Chain, factors=FACTORS, start="zero_core", shared=share_sides)  # fmt: skip


@hookimpl
def ndlora_methods():
    return [method]


@hookimpl
def ndlora_starts():
    return [start]
