"""The built-in methods and initialisers, brought in as a third party would."""

from ndlora_plugins.hookspecs import hookimpl
from ndlora_plugins.initializers import builtin_initializers
from ndlora_plugins.methods.inttune import IntTune
from ndlora_plugins.methods.ndlinear import NdLinear
from ndlora_plugins.methods.nlora import NLora
from ndlora_plugins.methods.slora import SLora


@hookimpl
def ndlora_methods():
    return [NdLinear(), SLora(), NLora(), IntTune()]


@hookimpl
def ndlora_initializers():
    return builtin_initializers
