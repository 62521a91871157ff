"""Group lasso over ranks (as GS-LoRA, arXiv 2403.11530): a penalty on the norm of each rank's row and column."""

from dataclasses import dataclass

from ndlora_plugins import hookimpl
from ndlora_plugins.methods import Method
from ndlora_plugins.schedules import Schedule
from ndlora_plugins.structures import Chain


@dataclass(frozen=True)
class Options:
    strength: float = 1e-2


def plain(layout):
    return Chain(layout, core="none")


def lasso(options, training):
    total = 0
    for layer in training.layers:
        squares = layer.trained["down"].square().sum(1) + layer.trained["up"].square().sum(0)
        total = total + (squares + 1e-12).sqrt().sum()
    return options.strength * total


schedule = Schedule(name="strange_penalty", summary="brings ranks to zero", source="arXiv 2403.11530",
                    Options=Options, penalty=lasso)  # fmt: skip
method = Method(name="strange_lasso", summary="LoRA whose ranks are pruned by training", source="arXiv 2403.11530",
                structure=plain, factors=("down", "up"), start="first_zero",
                schedules=("strange_penalty",))  # fmt: skip


@hookimpl
def ndlora_methods():
    return [method]


@hookimpl
def ndlora_schedules():
    return [schedule]
