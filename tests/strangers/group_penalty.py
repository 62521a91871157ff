"""Group lasso over ranks (as GS-LoRA, arXiv 2403.11530): a penalty on the norm of each rank's row and column."""

from ndlora_plugins import hookimpl
from ndlora_plugins.methods import Method
from ndlora_plugins.structures import Chain

STRENGTH = 1e-2


def plain(layout):
    return Chain(layout, core="none")


def group_lasso(structure, factors):
    squares = factors["down"].square().sum(1) + factors["up"].square().sum(0)
    return STRENGTH * (squares + 1e-12).sqrt().sum()


method = Method(name="strange_lasso", summary="LoRA whose ranks are pruned by training", source="arXiv 2403.11530",
                structure=plain, factors=("down", "up"), start="first_zero", penalty=group_lasso)  # fmt: skip


@hookimpl
def ndlora_methods():
    return [method]
