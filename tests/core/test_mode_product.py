"""The mode-wise product equals the Kronecker matrix, in any order, and its plan counts what it does."""

import itertools
import math

import pytest
import torch

from ndlora_plugins.kernels.modes import mode_product, plan_contraction
from ndlora_plugins.structures.kronecker import kronecker

# in modes, out modes
SHAPES = [
    ((4, 6), (3, 5)),  # the last mode first
    ((6, 4), (12, 2)),  # the first mode first
    ((1, 7), (5, 1)),
    ((2, 3, 4), (5, 2, 3)),
    ((3, 2, 2, 2), (2, 2, 3, 4)),
]


def apply_modes(x, factors):
    terms, out_modes, in_modes = zip(*(factor.shape for factor in factors), strict=True)
    return mode_product(in_modes, out_modes, terms[0]).plain(x, factors)


def random_factors(in_modes, out_modes, terms):
    return [torch.randn(terms, o, i, dtype=torch.float64) for i, o in zip(in_modes, out_modes, strict=True)]


@pytest.mark.parametrize("terms", [1, 4])
@pytest.mark.parametrize("in_modes, out_modes", SHAPES)
def test_equals_torch_kron(in_modes, out_modes, terms):
    factors = random_factors(in_modes, out_modes, terms)
    x = torch.randn(2, 3, math.prod(in_modes), dtype=torch.float64)
    # arXiv 2503.17353: dW = sum_t kron(W_1[t], ..., W_N[t]), row-major
    expected = sum(
        x @ torch.kron(torch.kron(*[f[t] for f in factors[:2]]), kron_of([f[t] for f in factors[2:]])).T
        for t in range(terms)
    )
    torch.testing.assert_close(apply_modes(x, factors), expected)
    torch.testing.assert_close(x @ kronecker(factors).T, expected)


def kron_of(matrices):
    result = torch.ones(1, 1, dtype=torch.float64)
    for matrix in matrices:
        result = torch.kron(result, matrix)
    return result


@pytest.mark.parametrize("terms", [1, 3])
@pytest.mark.parametrize("in_modes, out_modes", SHAPES)
def test_gradients(in_modes, out_modes, terms):
    factors = [f.requires_grad_() for f in random_factors(in_modes, out_modes, terms)]
    x = torch.randn(2, math.prod(in_modes), dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x, *f: apply_modes(x, f), (x, *factors))


@pytest.mark.parametrize("in_modes, out_modes", SHAPES)
def test_the_planned_order_is_the_cheapest(in_modes, out_modes):
    def cost(order):
        sizes, total = list(in_modes), 0
        for k in order:
            total += math.prod(sizes) * out_modes[k]
            sizes[k] = out_modes[k]
        return total

    plan = plan_contraction(in_modes, out_modes)
    assert plan.multiply_adds == cost(plan.order)
    assert plan.multiply_adds == min(cost(order) for order in itertools.permutations(range(len(in_modes))))


def test_non_contiguous_input():
    factors = random_factors((4, 6), (3, 5), 2)
    x = torch.randn(24, 7, dtype=torch.float64).T
    torch.testing.assert_close(apply_modes(x, factors), apply_modes(x.contiguous(), factors))
