"""The convolution with an update that is never formed, against torch's own with the update as the weight."""

import math

import pytest
import torch
import torch.nn.functional as F

from ndlora_plugins.structures import Chain, Einsum, KroneckerSum, Layout, Structure
from ndlora_plugins.structures.einsum import Equation

# structure of a weight (8, channels, *kernel)
CONVOLVED = {
    "chain": Chain,
    "indexed chain": lambda layout: Chain(layout, indexed=("down",)),
    "modes of the kernel": lambda layout: KroneckerSum(
        layout,
        (layout.in_features // math.prod(layout.trailing), 1, *(k for k in layout.trailing if k > 1)),
        (4, 2, *(1 for k in layout.trailing if k > 1)),
    ),
    "modes across the kernel": lambda layout: KroneckerSum(layout, (1, layout.in_features), (2, 4)),
    "equation": lambda layout: Einsum(
        layout,
        Equation.parse("out r, r in -> out in"),
        (("out", 8), ("in", layout.in_features), ("r", 2)),
        ("up", "down"),
    ),
}
# kernel, groups
CONVOLUTIONS = [((3, 2), 1), ((3, 2), 2), ((3, 3), 8), ((1, 1), 1), ((3, 1), 1), ((3,), 1), ((2, 1, 3), 1)]


@pytest.mark.parametrize("kernel, groups", CONVOLUTIONS, ids=str)
@pytest.mark.parametrize("kind", CONVOLVED)
def test_convolve_and_what_it_is_by_default(kind, kernel, groups):
    function = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}[len(kernel)]

    def convolution(x, weight):
        return function(x, weight, stride=2, padding=1, groups=x.shape[1] // weight.shape[1])

    structure = CONVOLVED[kind](Layout(8 // groups * math.prod(kernel), 8, 2, trailing=kernel))
    factors = {
        factor.name: torch.randn(factor.shape, dtype=torch.float64)
        if factor.indices is None
        else torch.randperm(factor.indices)[: factor.numel]
        for factor in structure.factors
    }
    x = torch.randn(3, 8, *(7, 6, 5)[: len(kernel)], dtype=torch.float64)
    expected = convolution(x, structure.delta(factors).view(8, -1, *kernel))
    assert structure.in_groups(x) == (groups > 1)
    for own in (type(structure), Structure):
        torch.testing.assert_close(own.convolve(structure, factors, x, convolution), expected)
