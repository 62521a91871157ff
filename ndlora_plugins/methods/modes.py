"""Features to modes: how a dimension is split into the axes of a tensor."""

from __future__ import annotations

import math
from functools import cache

from ndlora_plugins.errors import NdLoraValueError

__all__ = ["balanced_modes", "check_modes", "crossed_modes"]


@cache
def balanced_modes(features: int, num_modes: int = 2) -> tuple[int, ...]:
    """Split `features` into `num_modes` integer factors, as even as they come, the smaller first.

    Two modes are the pair of divisors closest to the square root, as in the reference
    (https://github.com/ensemble-core/NdLinear-LoRA, `find_factors`); more minimise their sum.

    Args:
        features: the dimension, at least 1.
        num_modes: the number of modes, at least 1.

    Raises:
        NdLoraValueError: if either is below 1.

    >>> balanced_modes(576), balanced_modes(4096, 3), balanced_modes(7)
    ((24, 24), (16, 16, 16), (1, 7))
    """
    if features < 1 or num_modes < 1:
        raise NdLoraValueError(
            f"features={features} cannot be split into num_modes={num_modes}: both must be at least 1."
        )
    return _smallest_sum(features, num_modes, 1)


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
        NdLoraValueError: if any of the first three is below 1.

    >>> crossed_modes(576, 1536, 4), crossed_modes(7, 5, 4), crossed_modes(576, 1536, 4, 3)
    (((4, 144), (384, 4)), ((1, 7), (5, 1)), ((4, 4, 36), (96, 4, 4)))
    """
    if min(in_features, out_features, size) < 1:
        raise NdLoraValueError(
            f"in_features={in_features} and out_features={out_features} cannot be split with crossed_modes={size}: "
            f"all must be at least 1."
        )
    small = []
    for _ in range(num_modes - 1):
        common = math.gcd(in_features, out_features)
        small.append(next(n for n in range(min(size, common), 0, -1) if common % n == 0))
        in_features, out_features = in_features // small[-1], out_features // small[-1]
    return (*small, in_features), (out_features, *small)


def check_modes(modes: tuple[int, ...], features: int, side: str) -> tuple[int, ...]:
    """Return `modes` if they multiply to `features`, else raise.

    Args:
        modes: the modes set by hand.
        features: the dimension that they split.
        side: "in_modes" or "out_modes", for the message.
    """
    if not modes or any(not isinstance(mode, int) or mode < 1 for mode in modes):
        raise NdLoraValueError(f"{side}={list(modes)} must be integers of at least 1.")
    if math.prod(modes) != features:
        raise NdLoraValueError(
            f"{side}={list(modes)} multiply to {math.prod(modes)}, but the layer has "
            f"{side.removesuffix('_modes')}_features={features}. Give modes whose product is {features}, for "
            f"example {list(balanced_modes(features, len(modes)))}, or leave them out."
        )
    return tuple(modes)
