"""Features to modes: how a dimension is split into the axes of a tensor."""

from __future__ import annotations

import math
from functools import cache

from ndlora_plugins.errors import NdLoraValueError

__all__ = ["MAX_FEATURES", "MAX_MODES", "balanced_modes", "check_modes", "crossed_modes"]

# No layer is larger: what is, stands in a broken file, and its divisors would be searched for years.
MAX_FEATURES = 2**31
# 2**31 has 31 prime factors: of more modes, some have the size 1.
MAX_MODES = 64


@cache
def balanced_modes(features: int, num_modes: int = 2) -> tuple[int, ...]:
    """Split `features` into `num_modes` integer factors, as even as they come, the smaller first.

    Two modes are the pair of divisors closest to the square root, as in the reference
    (https://github.com/ensemble-core/NdLinear-LoRA, `find_factors`); more minimise their sum.

    Args:
        features: the dimension, 1 to `MAX_FEATURES`.
        num_modes: the number of modes, 1 to `MAX_MODES`.

    Raises:
        NdLoraValueError: if either is out of range.

    >>> balanced_modes(576), balanced_modes(4096, 3), balanced_modes(7)
    ((24, 24), (16, 16, 16), (1, 7))
    """
    _check_range(num_modes, features=features)
    return _smallest_sum(features, num_modes, 1) or ()  # 1 divides all: there is one


def _check_range(num_modes: int, **dimensions: int) -> None:
    values = dimensions.values()
    if not 1 <= num_modes <= MAX_MODES or min(values) < 1 or max(values) > MAX_FEATURES:
        named = " and ".join(f"{name}={value}" for name, value in dimensions.items())
        raise NdLoraValueError(
            f"{named} cannot be split into num_modes={num_modes}: a dimension can be from 1 to {MAX_FEATURES}, the "
            f"number of modes from 1 to {MAX_MODES}."
        )


def _smallest_sum(features: int, num_modes: int, at_least: int) -> tuple[int, ...] | None:
    """The ascending factorisation of `features` whose sum is smallest; none if no factor >= `at_least` is left."""
    if num_modes == 1:
        return (features,) if features >= at_least else None
    best = None
    # the first factor of an ascending factorisation is at most the num_modes-th root
    for first in range(_integer_root(features, num_modes), at_least - 1, -1):
        if features % first:
            continue
        rest = _smallest_sum(features // first, num_modes - 1, first)
        if rest is not None and (best is None or first + sum(rest) < sum(best)):
            best = (first, *rest)
        if num_modes == 2 and best is not None:
            break  # the divisor nearest below the root has the smallest sum
    return best


def _integer_root(value: int, degree: int) -> int:
    if degree == 2:
        return math.isqrt(value)
    root = round(value ** (1 / degree))
    while root**degree > value:
        root -= 1
    return root


def crossed_modes(
    in_features: int, out_features: int, size: int, num_modes: int = 2
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """in_modes = (n, in / n) and out_modes = (out / n, n), with n the largest common divisor up to `size`.

    A Kronecker term of such modes has in + out parameters, as LoRA with r=1. Since kron(A, B) = kron(A, I) kron(I, B)
    with an inner dimension of n * n, it is LoRA with r=1 for n = 1, and an exact LoRA with r = n * n else.
    More modes split the large ones again: (n, m, in / nm) and (out / nm, n, m), with in / n + nm + out / m parameters
    and an inner dimension of nm min(n, m).

    Raises:
        NdLoraValueError: if any is out of range.

    >>> crossed_modes(576, 1536, 4), crossed_modes(7, 5, 4), crossed_modes(576, 1536, 4, 3)
    (((4, 144), (384, 4)), ((1, 7), (5, 1)), ((4, 4, 36), (96, 4, 4)))
    """
    _check_range(num_modes, in_features=in_features, out_features=out_features)
    if size < 1:
        raise NdLoraValueError(f"crossed_modes={size}: choose an integer of at least 1.")
    small = []
    for _ in range(num_modes - 1):
        small.append(_largest_divisor(math.gcd(in_features, out_features), size))
        in_features, out_features = in_features // small[-1], out_features // small[-1]
    return (*small, in_features), (out_features, *small)


def _largest_divisor(value: int, at_most: int) -> int:
    """Divisors come in pairs, one of each up to the square root."""
    below = [divisor for divisor in range(1, math.isqrt(value) + 1) if value % divisor == 0]
    return max(d for divisor in below for d in (divisor, value // divisor) if d <= at_most)


def check_modes(modes: tuple[int, ...], features: int, side: str) -> tuple[int, ...]:
    """Return `modes` if they multiply to `features`, else raise.

    Args:
        modes: the modes set by hand.
        features: the dimension that they split.
        side: "in_modes" or "out_modes", for the message.
    """
    if not 1 <= len(modes) <= MAX_MODES or any(not isinstance(mode, int) or mode < 1 for mode in modes):
        raise NdLoraValueError(f"{side}={list(modes)} must be 1 to {MAX_MODES} integers of at least 1.")
    if math.prod(modes) != features:
        raise NdLoraValueError(
            f"{side}={list(modes)} multiply to {math.prod(modes)}, but the layer has "
            f"{side.removesuffix('_modes')}_features={features}. Give modes whose product is {features}, for "
            f"example {list(balanced_modes(features, len(modes)))}, or leave them out."
        )
    return tuple(modes)
