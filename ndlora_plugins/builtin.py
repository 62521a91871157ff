"""The built-in methods and starts, brought in as a third party would. The first method is the default one."""

from ndlora_plugins.hookspecs import hookimpl
from ndlora_plugins.kernels.switch import switch_on
from ndlora_plugins.methods.crossed import crossed
from ndlora_plugins.methods.einsum import einsum
from ndlora_plugins.methods.inttune import inttune
from ndlora_plugins.methods.ndlinear import ndlinear
from ndlora_plugins.methods.nlora import nlora
from ndlora_plugins.methods.slora import slora
from ndlora_plugins.starts import any, chain, modes

switch_on()


@hookimpl
def ndlora_methods():
    return [crossed, ndlinear, slora, nlora, inttune, einsum]


@hookimpl
def ndlora_starts():
    return [*modes.starts, *chain.starts, *any.starts]
