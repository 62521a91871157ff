"""Modes: the balanced split is the one with the smallest sum, and bad ones are named."""

import itertools
import math

import pytest

from ndlora_plugins.errors import NdLoraValueError
from ndlora_plugins.modes import balanced_modes, check_modes, lopsidedness

# features, number of modes, expected: the reference's pairs, smaller first
BALANCED = [
    (576, 2, (24, 24)),
    (1536, 2, (32, 48)),
    (2048, 2, (32, 64)),
    (14336, 2, (112, 128)),
    (4096, 3, (16, 16, 16)),
    (7, 2, (1, 7)),
    (1, 2, (1, 1)),
    (12, 4, (1, 2, 2, 3)),
]


@pytest.mark.parametrize("features, num_modes, expected", BALANCED)
def test_known_splits(features, num_modes, expected):
    assert balanced_modes(features, num_modes) == expected


@pytest.mark.parametrize("num_modes", [2, 3, 4])
@pytest.mark.parametrize("features", [24, 60, 97, 128, 210])
def test_no_split_has_a_smaller_sum(features, num_modes):
    divisors = [d for d in range(1, features + 1) if features % d == 0]
    all_splits = (s for s in itertools.product(divisors, repeat=num_modes) if math.prod(s) == features)
    assert sum(balanced_modes(features, num_modes)) == min(sum(s) for s in all_splits)


@pytest.mark.parametrize("features, num_modes", [(0, 2), (8, 0)])
def test_impossible_splits_raise(features, num_modes):
    with pytest.raises(NdLoraValueError, match=f"features={features}.*num_modes={num_modes}"):
        balanced_modes(features, num_modes)


def test_wrong_product_names_the_layer_both_numbers_and_a_remedy():
    with pytest.raises(
        NdLoraValueError,
        match=r"in_modes=\[4, 5\] of layer 'q_proj' multiply to 20.*in_features=24.*\[4, 6\]",
    ):
        check_modes((4, 5), 24, "in_modes", "q_proj")


def test_lopsidedness():
    assert lopsidedness((32, 64), (32, 64)) == pytest.approx(1.25)
    assert lopsidedness((1, 4099), (32, 64)) > 40
