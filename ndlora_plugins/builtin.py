"""What is built in, brought in as a third party would. The first method is the default one."""

from ndlora_plugins.hookspecs import hookimpl
from ndlora_plugins.kernels.switch import switch_on
from ndlora_plugins.methods.base import Method
from ndlora_plugins.methods.contractions import random_tucker, tensor_ring, tensor_train, tucker
from ndlora_plugins.methods.crossed import crossed
from ndlora_plugins.methods.einsum import einsum
from ndlora_plugins.methods.frozen_sides import loldu, lora_sb, lora_xs, random_diagonal, svfit
from ndlora_plugins.methods.inttune import inttune
from ndlora_plugins.methods.ndlinear import ndlinear
from ndlora_plugins.methods.nlora import nlora
from ndlora_plugins.methods.one_side import columns, ffa_lora, mica, rows, sora, tiled
from ndlora_plugins.methods.shared import metatt, nola, shared_core, shared_crossed, shared_diagonal
from ndlora_plugins.methods.slora import slora
from ndlora_plugins.schedules.base import Schedule
from ndlora_plugins.schedules.penalties import group_lasso, keep_close, sparse_ranks
from ndlora_plugins.schedules.ranks import nested_rank, ordered_dropout
from ndlora_plugins.schedules.refactor import anneal_rank, reorthogonalise
from ndlora_plugins.starts import any, chain, contractions, modes, sides
from ndlora_plugins.starts.base import Start

switch_on()


@hookimpl
def ndlora_methods() -> list[Method]:
    return [
        *(crossed, ndlinear, slora, nlora, inttune),
        *(lora_xs, lora_sb, svfit, random_diagonal, loldu, rows, columns, ffa_lora, mica, tiled, sora),
        *(shared_core, shared_diagonal, shared_crossed, metatt, nola),
        *(tensor_train, tensor_ring, tucker, random_tucker, einsum),
    ]


@hookimpl
def ndlora_starts() -> list[Start]:
    return [*modes.starts, *chain.starts, *sides.starts, *contractions.starts, *any.starts]


@hookimpl
def ndlora_schedules() -> list[Schedule]:
    return [
        *(nested_rank, ordered_dropout, anneal_rank),
        *(sparse_ranks, group_lasso, keep_close, reorthogonalise),
    ]
