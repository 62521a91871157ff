"""The methods that tests of PEFT's, TRL's and transformers' features take: of each mechanism one.

Every method is held to the laws (tests/core/test_methods.py) and goes through the matrix (tests/peft/test_support.py);
of kinds of layers that are alike there, through one.
"""

from importlib.util import find_spec

REPRESENTATIVE = [
    *("crossed", "ndlinear", "slora", "nlora", "inttune", "einsum"),
    "lora_xs",  # sides read from the weight
    "columns",  # integers
    "ffa_lora",  # a factor from a seed
    "shared_core",  # shared factors beside a layer's own
    "metatt",  # all shared
    "nola",  # shared, from a seed
]
# Beside Axolotl our code is the same, and PEFT, transformers and TRL are others: of the tensors that they see each kind
SEEN_BY_PEFT = [
    "crossed",  # factors of a layer's own
    "nlora",  # and a copy of the start, read from the weight
    "columns",  # integers
    "shared_core",  # shared factors beside a layer's own
    "nola",  # shared, from a seed
]
BESIDE_AXOLOTL = find_spec("axolotl") is not None
if BESIDE_AXOLOTL:
    REPRESENTATIVE = SEEN_BY_PEFT


def each(names):
    """All of `names`, or beside Axolotl the methods that stand for them."""
    return [name for name in names if name in SEEN_BY_PEFT] if BESIDE_AXOLOTL else list(names)
