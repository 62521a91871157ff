"""DyLoRA (arXiv 2210.07558), its scaling left as it is: each step uses the first b ranks, b drawn for all layers."""

from ndlora_plugins import hookimpl
from ndlora_plugins.methods import Method
from ndlora_plugins.schedules import Ranks, Schedule
from ndlora_plugins.structures import Chain


def nested(options, moment, place):
    return Ranks(1 + moment.draw(place.rank))


def plain(layout):
    return Chain(layout, core="none")


schedule = Schedule(name="strange_ranks", summary="every smaller rank is a LoRA", source="arXiv 2210.07558",
                    ranks=nested)  # fmt: skip
method = Method(name="strange_dylora", summary="LoRA whose every smaller rank is a LoRA", source="arXiv 2210.07558",
                structure=plain, factors=("down", "up"), start="first_zero", schedules=("strange_ranks",))  # fmt: skip


@hookimpl
def ndlora_methods():
    return [method]


@hookimpl
def ndlora_schedules():
    return [schedule]
