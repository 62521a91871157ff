"""DyLoRA (arXiv 2210.07558): each training step uses the first b ranks, b drawn anew for all layers."""

from ndlora_plugins import hookimpl
from ndlora_plugins.methods import Method
from ndlora_plugins.structures import Chain


def nested(structure, factors, moment):
    rank = 1 + moment.draw(structure.layout.rank)
    return structure.cut(rank), structure.cut_factors(factors, rank)


def plain(layout):
    return Chain(layout, core="none")


method = Method(name="strange_dylora", summary="LoRA whose every smaller rank is a LoRA", source="arXiv 2210.07558",
                structure=plain, factors=("down", "up"), start="first_zero", visible=nested)  # fmt: skip


@hookimpl
def ndlora_methods():
    return [method]
