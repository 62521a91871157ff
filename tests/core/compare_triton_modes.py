"""The Triton kernels against the other form in float64: in Triton's interpreter on the CPU, without it on a GPU.

`test_triton_modes.py` runs this file in processes of their own: TRITON_INTERPRET=1 must be there before triton is
imported, and then holds for the whole process.
"""

import os
from math import prod

import pytest
import torch
import torch.nn.functional as F
from triton.runtime import interpreter

from ndlora_plugins.adapter import plan_layer
from ndlora_plugins.kernels import modes, triton_modes
from ndlora_plugins.kernels.triton_modes import triton_mode_product
from ndlora_plugins.options import adapter_options
from ndlora_plugins.starts import Seen
from ndlora_plugins.structures import KroneckerSum, Layout

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cpu" if INTERPRETED else "cuda"

# in modes, out modes, terms
MODES = [
    ((16, 16), (16, 16), 1),  # nothing is padded
    ((4, 6), (3, 6), 1),  # the second mode first
    ((6, 4), (9, 2), 1),  # the first mode first
    ((24, 24), (12, 16), 2),
    ((6, 4), (9, 2), 3),
    ((1, 13), (30, 1), 1),
    ((32, 64), (64, 96), 1),  # Qwen3-1.7B: a block is one token in float32
]
# dtype -> error relative to the largest entry: four units in the last place, for the roundings of factor, intermediate,
# sum and result (the interpreter cuts bfloat16 off). A GPU multiplies float32 as TF32, with float16's digits.
DTYPES = {
    torch.float32: 4 * 2**-23 if INTERPRETED else 4 * 2**-10,
    torch.bfloat16: 4 * 2**-7,
    torch.float16: 4 * 2**-10,
}
NEEDS = [(True, True), (True, False), (False, True), (False, False)]
TOKENS = [0, 1, 41]  # 41: several blocks for each of two programs, the last block not full
SCALING = 0.5

torch.backends.cuda.matmul.allow_tf32 = True


@pytest.fixture(autouse=True)
def _setting(monkeypatch):
    torch.manual_seed(0)
    monkeypatch.setattr(triton_modes, "_PROGRAMS", 2)
    create_dot = interpreter.InterpreterBuilder.create_dot

    def wide(handle):
        bits = (handle.data.astype("uint32") << 16).view("float32")
        return interpreter.TensorHandle(bits, interpreter.tl.float32)

    def dot(self, a, b, *rest):
        if a.dtype.scalar == interpreter.tl.bfloat16:
            a, b = wide(a), wide(b)
        return create_dot(self, a, b, *rest)

    # the interpreter multiplies the bits of bfloat16: https://github.com/triton-lang/triton/issues/11584
    monkeypatch.setattr(interpreter.InterpreterBuilder, "create_dot", dot)


def random(*shape, dtype=torch.float32):
    return torch.randn(shape, device=DEVICE).to(dtype)


def forward_and_backward(product, x, factors, grad, needs, result, grad_x):
    """The result, the gradient of x, those of the factors."""
    result, kept = product.forward(x, factors, needs, result, SCALING)
    return result, *product.backward(kept, factors, grad, needs, True, grad_x, SCALING)


def assert_close(found, expected, tolerance):
    torch.testing.assert_close(
        found.double(),
        expected,
        rtol=0,
        atol=tolerance * (expected.abs().max().item() if expected.numel() else 0),
    )


@pytest.mark.parametrize("tokens", TOKENS)
@pytest.mark.parametrize("dtype, tolerance", DTYPES.items(), ids=str)
@pytest.mark.parametrize("in_modes, out_modes, terms", MODES, ids=str)
def test_result_and_gradients_are_those_of_float64(in_modes, out_modes, terms, dtype, tolerance, tokens):
    product = triton_mode_product(in_modes, out_modes, terms)
    factors = [random(terms, o, i) / i**0.5 for o, i in zip(out_modes, in_modes, strict=True)]
    x, grad_x = random(2, tokens, product.in_features, dtype=dtype)
    grad, result = random(2, tokens, product.out_features, dtype=dtype)
    assert product._takes(x)
    wide = [tensor.double() for tensor in (x, grad, result, grad_x)]
    expected = forward_and_backward(
        product.otherwise, wide[0], [f.double() for f in factors], wide[1], (True, True), *wide[2:]
    )
    found = forward_and_backward(product, x, factors, grad, (True, True), result, grad_x)
    assert found[0] is result and found[1] is grad_x  # changed in place
    assert [gradient.dtype for gradient in found[2]] == [torch.float32] * 2
    for one, other in zip((*found[:2], *found[2]), (*expected[:2], *expected[2]), strict=True):
        assert_close(one, other, tolerance)


@pytest.mark.parametrize("needs", NEEDS, ids=str)
def test_frozen_factors_get_no_gradient_and_new_tensors_start_at_zero(needs):
    product = triton_mode_product((6, 4), (9, 2), 3)
    factors = [random(3, 9, 6), random(3, 2, 4)]
    x, grad = random(5, 24), random(5, 18)
    found = forward_and_backward(product, x, factors, grad, needs, None, None)
    expected = forward_and_backward(product.otherwise, x, factors, grad, needs, None, None)
    assert len(product.forward(x, factors, needs, None, SCALING)[1]) == any(needs)  # x alone is kept
    torch.testing.assert_close(found, expected, rtol=5e-3, atol=5e-3)


def test_sums_are_the_same_every_time():
    product = triton_mode_product((24, 24), (24, 24), 1)
    factors, x, grad = [random(1, 24, 24), random(1, 24, 24)], random(41, 576), random(41, 576)
    first, second = (
        product.backward((x,), factors, grad, (True, True), True, None, SCALING) for _ in range(2)
    )
    torch.testing.assert_close(first, second, rtol=0, atol=0)


# why -> in modes, out modes, dtype of x
LEFT_TO_THE_OTHER_FORM = {
    "float64": ((4, 6), (3, 6), torch.float64),
    "a mode above 128": ((2, 129), (3, 6), torch.float32),
    "a token above 40 KiB": ((128, 128), (64, 64), torch.float32),
    "three modes": ((2, 3, 4), (3, 3, 2), torch.float32),
}


@pytest.mark.parametrize(
    "in_modes, out_modes, dtype", LEFT_TO_THE_OTHER_FORM.values(), ids=LEFT_TO_THE_OTHER_FORM
)
def test_what_the_kernels_do_not_do_is_left_to_the_other_form(in_modes, out_modes, dtype, monkeypatch):
    monkeypatch.setattr(triton_modes, "add_product", None)
    monkeypatch.setattr(triton_modes, "factor_gradients", None)
    structure = KroneckerSum(Layout(prod(in_modes), prod(out_modes), 1), in_modes, out_modes)
    values = {factor.name: random(*factor.shape, dtype=dtype) for factor in structure.factors}
    other, factors = structure.product(values)
    monkeypatch.setattr(modes, "others", [triton_mode_product])
    product, _ = structure.product(values)
    x, grad = random(3, other.in_features, dtype=dtype), random(3, other.out_features, dtype=dtype)
    found, expected = (
        forward_and_backward(p, x, factors, grad, (True,) * len(factors), None, None)
        for p in (product, other)
    )
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("anchor", ["none", "snapshot"])
@pytest.mark.parametrize("way", ["linear", "in place", "out of place"])
def test_a_layer_takes_the_kernels(way, anchor, monkeypatch):
    monkeypatch.setattr(modes, "others", [triton_mode_product])
    plan = plan_layer(adapter_options("ndlinear", init_lora_weights="ndlinear", anchor=anchor), 24, 18, "q")
    weight = random(18, 24)
    trained, frozen = plan.initialize(Seen(weight=weight))
    trained = {
        name: (value + 0.3 * torch.randn_like(value)).requires_grad_() for name, value in trained.items()
    }
    x = random(24, 7, 2).permute(2, 1, 0).requires_grad_()  # not contiguous
    assert isinstance(plan._product(trained, frozen, None)[0], triton_modes.TritonModeProduct)
    if way == "linear":
        y = plan.linear(weight, None, trained, frozen, x, SCALING)
    else:
        y = plan.add_update(F.linear(x, weight), trained, frozen, x, SCALING, in_place=way == "in place")
    expected = F.linear(x, weight + SCALING * plan.delta(trained, frozen))
    torch.testing.assert_close(y, expected, rtol=5e-3, atol=5e-3)
    inputs = [x, *trained.values()]
    found = torch.autograd.grad(y.square().sum(), inputs)
    torch.testing.assert_close(
        found, torch.autograd.grad(expected.square().sum(), inputs), rtol=5e-3, atol=5e-2
    )
