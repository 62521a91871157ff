"""The methods that tests of PEFT's, TRL's and transformers' features take: of each mechanism one.

Every method is held to the laws (tests/core/test_methods.py) and goes through the matrix (tests/peft/test_support.py).
"""

REPRESENTATIVE = [
    *("crossed", "ndlinear", "slora", "nlora", "inttune", "einsum"),
    "lora_xs",  # sides read from the weight
    "columns",  # integers
    "ffa_lora",  # a factor from a seed
    "shared_core",  # shared factors beside a layer's own
    "metatt",  # all shared
    "nola",  # shared, from a seed
]
