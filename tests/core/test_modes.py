"""Modes: the balanced split is the one with the smallest sum, and bad ones are named."""

import itertools
import math

import pytest

from ndlora_plugins.errors import NdLoraValueError
from ndlora_plugins.methods.modes import balanced_modes, check_modes, crossed_modes
from ndlora_plugins.structures import KroneckerSum, Layout

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
# in_features, out_features, size -> in_modes, out_modes: the small modes are a common divisor
CROSSED = [
    (576, 1536, 4, (4, 144), (384, 4)),
    (576, 1536, 5, (4, 144), (384, 4)),
    (576, 1536, 1, (1, 576), (1536, 1)),
    (7, 5, 4, (1, 7), (5, 1)),
    (4, 12, 8, (4, 1), (3, 4)),
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


# the last two would search for divisors for minutes, and recurse too deep
@pytest.mark.parametrize("features, num_modes", [(0, 2), (8, 0), (10**18 + 9, 2), (8, 2000)])
def test_impossible_splits_raise(features, num_modes):
    with pytest.raises(NdLoraValueError, match=f"features={features}.*num_modes={num_modes}"):
        balanced_modes(features, num_modes)


@pytest.mark.parametrize("in_features, out_features, size, in_modes, out_modes", CROSSED)
def test_crossed_modes_have_the_parameters_of_a_lora_of_rank_1(
    in_features, out_features, size, in_modes, out_modes
):
    assert crossed_modes(in_features, out_features, size) == (in_modes, out_modes)
    parameters = sum(o * i for o, i in zip(out_modes, in_modes, strict=True))
    assert parameters == in_features + out_features


@pytest.mark.parametrize(
    "features, size, num_modes, modes",
    [
        ((576, 1536), 4, 3, ((4, 4, 36), (96, 4, 4))),
        ((576, 192), 4, 4, ((4, 4, 4, 9), (3, 4, 4, 4))),
        ((30, 42), 4, 3, ((3, 2, 5), (7, 3, 2))),
    ],
)
def test_more_modes_cross_in_turn(features, size, num_modes, modes):
    assert crossed_modes(*features, size, num_modes) == modes


@pytest.mark.parametrize(
    "arguments, message",
    [
        ((8, 8, 0), "crossed_modes=0"),
        ((10**18 + 9, 8, 4), "in_features=1000000000000000009"),
        ((8, 8, 4, 2000), "num_modes=2000"),
    ],
)
def test_impossible_crossings_raise(arguments, message):
    with pytest.raises(NdLoraValueError, match=message):
        crossed_modes(*arguments)


def test_a_large_prime_is_crossed_without_trying_every_number_below_it():
    assert crossed_modes(2**31 - 1, 2**31 - 1, 2**31 - 2) == ((1, 2**31 - 1), (2**31 - 1, 1))


def test_too_many_modes_by_hand():
    with pytest.raises(NdLoraValueError, match="must be 1 to 64 integers"):
        check_modes((1,) * 65, 1, "in_modes")


@pytest.mark.parametrize(
    "modes, message",
    [
        ((4, 5), r"in_modes=\[4, 5\] multiply to 20.*in_features=24.*\[4, 6\]"),
        ((), r"in_modes=\[\] must be 1 to 64 integers of at least 1"),
        ((4, 6.0), r"in_modes=\[4, 6.0\] must be 1 to 64 integers of at least 1"),
        ((-4, -6), r"in_modes=\[-4, -6\] must be 1 to 64 integers of at least 1"),
    ],
)
def test_wrong_modes_are_named_with_a_remedy(modes, message):
    with pytest.raises(NdLoraValueError, match=message):
        check_modes(modes, 24, "in_modes")


# in_modes, out_modes, leading, trailing -> numbers of the factors over those of even modes
LOPSIDED = [
    ((32, 64), (32, 64), (), (), 1.25),
    ((1, 4099), (32, 64), (), (), 45.28),
    ((1, 32, 64), (8, 32, 64), (8,), (), 1.25),  # axes of the weight are no choice of anybody
    ((32, 64, 3), (32, 64, 1), (), (1, 3), 1.25),
    ((8, 256), (2, 1024), (4,), (), 64.0),  # by hand: not the axes of the weight
]


@pytest.mark.parametrize("in_modes, out_modes, leading, trailing, expected", LOPSIDED)
def test_lopsidedness(in_modes, out_modes, leading, trailing, expected):
    layout = Layout(math.prod(in_modes), math.prod(out_modes), 1, leading=leading, trailing=trailing)
    assert KroneckerSum(layout, in_modes, out_modes).lopsidedness == pytest.approx(expected, rel=1e-3)
