"""Added in place, with gradients of their own, the updates are what plain autograd makes of the materialised dW."""

import itertools
from contextlib import nullcontext
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch.autograd import forward_ad
from torch.func import grad, jacrev, jvp, vmap
from torch.utils.checkpoint import checkpoint

from ndlora_plugins import fused
from ndlora_plugins.adapter import plan_layer
from ndlora_plugins.errors import NdLoraValueError
from ndlora_plugins.kernels.modes import mode_product
from ndlora_plugins.options import adapter_options
from ndlora_plugins.starts import Seen

# method, init_lora_weights, anchor
STARTS = [
    ("ndlinear", "zero_mode", "none"),
    ("ndlinear", "ndlinear", "snapshot"),
    ("slora", "s_lora", "none"),
    ("nlora", "n_lora", "none"),
    ("nlora", "n_lora", "snapshot"),
    ("inttune", "n_lora", "none"),
    ("inttune", "n_lora", "snapshot"),
]
# in_features, out_features, options
SHAPES = [
    (24, 18, {"rank": 1}),  # modes (4, 6) -> (3, 6): the last mode first
    (24, 18, {"in_modes": (6, 4), "out_modes": (9, 2), "rank": 1}),  # the first mode first
    (24, 18, {"rank": 3}),
    (24, 18, {"in_modes": (6, 4), "out_modes": (9, 2), "rank": 3}),
    (24, 18, {"num_modes": 3, "rank": 1}),
    (24, 18, {"num_modes": 3, "rank": 3}),
    (13, 30, {"in_modes": (1, 13), "out_modes": (30, 1), "rank": 2}),
    (24, 36, {"crossed_modes": 4, "rank": 1}),  # (4, 6) -> (9, 4): an axis of few numbers last
    (36, 24, {"in_modes": (9, 4), "out_modes": (4, 6), "rank": 2}),  # the same, the first mode first
    (24, 36, {"crossed_modes": 2, "num_modes": 3, "rank": 1}),  # (2, 2, 6) -> (9, 2, 2)
]
CASES = [
    (start, shape)
    for start, shape in itertools.product(STARTS, SHAPES)
    if start[0] == "ndlinear" or set(shape[2]) == {"rank"}  # methods without modes have no other shapes
]
WAYS = ["linear", "linear with a bias", "in place", "out of place"]
# dtype of base, x and output; of the factors; error against float64 relative to the largest entry
DTYPES = [
    (torch.float64, torch.float64, 1e-12),
    (torch.float32, torch.float32, 3e-6),
    (torch.bfloat16, torch.bfloat16, 4e-2),
    (torch.bfloat16, torch.float32, 4e-2),  # PEFT's float32 adapters on a bfloat16 base
    (torch.float16, torch.float32, 4e-3),
]
SCALING = 0.5


class Layer:
    """A frozen linear layer with an adapter that has moved; everything in float64 until `cast`."""

    def __init__(self, start, shape, bias=False):
        method, init, anchor = start
        self.in_features, self.out_features, options = shape
        modes = {name: value for name, value in options.items() if name != "rank"}
        chosen = adapter_options(method, init, options.get("rank"), anchor=anchor, options=modes)
        self.plan = plan_layer(chosen, *shape[:2], "q")
        self.weight = torch.randn(self.out_features, self.in_features, dtype=torch.float64)
        self.bias = torch.randn(self.out_features, dtype=torch.float64) if bias else None
        trained, frozen = self.plan.initialize(Seen(weight=self.weight))
        self.frozen = {name: value.double() for name, value in frozen.items()}
        self.trained = {
            name: value.double() + 0.3 * torch.randn(value.shape, dtype=torch.float64)
            for name, value in trained.items()
        }

    def cast(self, base, factors):
        self.weight = self.weight.to(base)
        self.bias = None if self.bias is None else self.bias.to(base)
        self.frozen = {name: value.to(factors) for name, value in self.frozen.items()}
        self.trained = {name: value.to(factors).requires_grad_() for name, value in self.trained.items()}
        return self

    def __call__(self, x, way="linear"):
        if way.startswith("linear"):
            return self.plan.linear(self.weight, self.bias, self.trained, self.frozen, x, SCALING)
        output = F.linear(x, self.weight, self.bias)
        return self.plan.add_update(output, self.trained, self.frozen, x, SCALING, in_place=way == "in place")

    def reference(self, x):
        """base x + scaling * dW x by plain autograd, with dW materialised."""
        return F.linear(x, self.weight + SCALING * self.plan.delta(self.trained, self.frozen), self.bias)


def gradients(y, x, layer):
    """Of x and the trained factors, for a gradient of y that is not uniform."""
    weights = torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view(y.shape)
    return torch.autograd.grad(y, [x, *layer.trained.values()], weights)


def assert_close(found, expected, tolerance):
    torch.testing.assert_close(
        found.double(), expected, rtol=tolerance, atol=tolerance * expected.abs().max().item()
    )


@pytest.mark.parametrize("base, factors, tolerance", DTYPES, ids=str)
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("start, shape", CASES, ids=str)
def test_output_and_gradients_are_those_of_the_materialised_delta(
    start, shape, way, base, factors, tolerance
):
    layer = Layer(start, shape, bias="bias" in way).cast(base, factors)
    x = torch.randn(2, 7, shape[0], dtype=base, requires_grad=True)
    y = layer(x, way)
    wide, wide_x = Layer(start, shape, bias="bias" in way), x.detach().double().requires_grad_()
    wide.weight, wide.bias = layer.weight.double(), None if layer.bias is None else layer.bias.double()
    wide.frozen = {name: value.double() for name, value in layer.frozen.items()}
    wide.trained = {name: value.detach().double().requires_grad_() for name, value in layer.trained.items()}
    expected = wide.reference(wide_x)
    assert_close(y, expected, tolerance)
    found = gradients(y, x, layer)
    assert [g.dtype for g in found] == [base] + [factors] * len(layer.trained)
    for gradient, wanted in zip(found, gradients(expected, wide_x, wide), strict=True):
        assert_close(gradient, wanted, tolerance)


@pytest.mark.parametrize("way", ["linear", "in place"])
@pytest.mark.parametrize("start, shape", CASES, ids=str)
def test_gradcheck(start, shape, way):
    layer = Layer(start, shape).cast(torch.float64, torch.float64)
    names = list(layer.trained)
    x = torch.randn(3, shape[0], dtype=torch.float64, requires_grad=True)

    def function(x, *tensors):
        layer.trained = dict(zip(names, tensors, strict=True))
        return layer(x, way)

    assert torch.autograd.gradcheck(function, (x, *layer.trained.values()))


@pytest.mark.parametrize("needs_x", [True, False])
@pytest.mark.parametrize("way", ["linear", "in place", "out of place"])
@pytest.mark.parametrize("start, shape", CASES, ids=str)
def test_any_of_the_factors_may_be_frozen(start, shape, way, needs_x):
    layer = Layer(start, shape).cast(torch.float64, torch.float64)
    x = torch.randn(3, shape[0], dtype=torch.float64, requires_grad=needs_x)
    for trainable in itertools.product([True, False], repeat=len(layer.trained)):
        wanted = [x] * needs_x
        for tensor, needed in zip(layer.trained.values(), trainable, strict=True):
            tensor.requires_grad_(needed)
            wanted += [tensor] * needed
        if wanted:
            found = torch.autograd.grad(layer(x, way).square().sum(), wanted)
            expected = torch.autograd.grad(layer.reference(x).square().sum(), wanted)
            torch.testing.assert_close(found, expected)


# method, init, anchor, which factors train (None: all) -> numbers kept for a token (in 24, out 18, rank 4)
KEPT = [
    ("ndlinear", "zero_mode", "none", None, 24),
    ("ndlinear", "zero_mode", "none", ["mode_1"], 24),  # (4, 6) -> (4, 6) by the last mode, then the first
    ("ndlinear", "ndlinear", "snapshot", None, 24),
    ("slora", "s_lora", "none", None, 24 + 4),
    ("nlora", "n_lora", "snapshot", None, 24 + 4),
    ("nlora", "n_lora", "snapshot", ["core"], 4),
    ("inttune", "n_lora", "snapshot", None, 4),
    ("inttune", "n_lora", "none", None, 4),
    ("slora", "s_lora", "none", [], 0),
]


@pytest.mark.parametrize("way", ["linear", "in place", "out of place"])
@pytest.mark.parametrize("method, init, anchor, trainable, expected", KEPT, ids=str)
def test_what_is_kept_for_backward(method, init, anchor, trainable, expected, way):
    rank = 1 if method == "ndlinear" else 4
    layer = Layer((method, init, anchor), (24, 18, {"rank": rank})).cast(torch.bfloat16, torch.float32)
    for name, tensor in layer.trained.items():
        tensor.requires_grad_(trainable is None or name in trainable)
    x = torch.randn(1000, 24, dtype=torch.bfloat16, requires_grad=True)
    storages = {}

    def pack(tensor):
        storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        y = layer(x, way)
    per_token = sum(size for size in storages.values() if size >= 1000) // 2 // 1000
    assert y.requires_grad and per_token == expected


def test_in_place_takes_the_memory_of_the_output():
    layer = Layer(STARTS[0], SHAPES[0]).cast(torch.float32, torch.float32)
    x = torch.randn(5, 24)
    output = F.linear(x, layer.weight)
    y = layer.plan.add_update(output, layer.trained, layer.frozen, x, SCALING, in_place=True)
    assert y.data_ptr() == output.data_ptr()
    torch.testing.assert_close(y, layer.reference(x))


@pytest.mark.parametrize("shape_of_x", [(24,), (5, 24), (2, 3, 24), (2, 2, 3, 24)])
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("start", STARTS, ids=str)
def test_the_output_may_be_changed_in_place(start, way, shape_of_x):
    layer = Layer(start, SHAPES[0], bias="bias" in way).cast(torch.float64, torch.float64)
    x = torch.randn(shape_of_x, dtype=torch.float64, requires_grad=True)
    y, expected = layer(x, way).relu_(), layer.reference(x).relu()
    torch.testing.assert_close(y, expected)
    torch.testing.assert_close(gradients(y, x, layer), gradients(expected, x, layer))


@pytest.mark.parametrize("create_graph", [False, True])
@pytest.mark.parametrize("start, shape", CASES, ids=str)
def test_an_output_gets_its_gradient_through_a_frozen_adapter(start, shape, create_graph):
    layer = Layer(start, shape)
    x, output = torch.randn(5, shape[0]).double(), torch.randn(5, shape[1]).double().requires_grad_()
    y = layer.plan.add_update(output * 2, layer.trained, layer.frozen, x, SCALING, in_place=True)
    (found,) = torch.autograd.grad(y.sum(), output, create_graph=create_graph)
    torch.testing.assert_close(found.detach(), torch.full((5, shape[1]), 2.0).double())


# why not -> an output (5, 18) for an x of float32
NOT_IN_PLACE = {
    "a leaf that needs a gradient": lambda: torch.randn(5, 18, requires_grad=True),
    "a view": lambda: (torch.randn(5, 18, requires_grad=True) * 1).view(5, 18),
    "not contiguous": lambda: torch.randn(18, 5).T,
    "another dtype": lambda: torch.randn(5, 18, dtype=torch.float16),
}


@pytest.mark.parametrize("why", NOT_IN_PLACE)
def test_an_output_that_must_not_be_changed_is_not(why):
    layer = Layer(STARTS[0], SHAPES[0]).cast(torch.float32, torch.float32)
    x, output = torch.randn(5, 24), NOT_IN_PLACE[why]()
    before = output.detach().clone()
    y = layer.plan.add_update(output, layer.trained, layer.frozen, x, SCALING, in_place=True)
    assert torch.equal(output, before)
    expected = before + layer.reference(x) - F.linear(x, layer.weight)
    torch.testing.assert_close(y, expected.to(before.dtype))


def test_autograd_notices_an_output_that_backward_needs():
    layer = Layer(STARTS[0], SHAPES[0]).cast(torch.float32, torch.float32)
    x = torch.randn(5, 24, requires_grad=True)
    output = F.linear(x, layer.weight).exp()  # exp keeps its output
    y = layer.plan.add_update(output, layer.trained, layer.frozen, x, SCALING, in_place=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


@pytest.mark.parametrize("shape_of_x", [(24,), (0, 24), (2, 3, 4, 24)])
@pytest.mark.parametrize("start", STARTS, ids=str)
def test_any_leading_axes(start, shape_of_x):
    layer = Layer(start, SHAPES[0]).cast(torch.float64, torch.float64)
    x = torch.randn(shape_of_x, dtype=torch.float64, requires_grad=True)
    y = layer(x)
    torch.testing.assert_close(y, layer.reference(x))
    y.sum().backward()  # a gradient without memory of its own
    assert x.grad.shape == x.shape


@pytest.mark.parametrize("way", [*WAYS, "plain"])
@pytest.mark.parametrize("shape_of_x", [(0,), (2, 0)])
@pytest.mark.parametrize("start, shape", CASES, ids=str)
def test_no_tokens(start, shape, shape_of_x, way):
    layer = Layer(start, shape, bias="bias" in way).cast(torch.float32, torch.float32)
    x = torch.empty(*shape_of_x, shape[0], requires_grad=True)
    with fused.plain_autograd() if way == "plain" else nullcontext():
        with torch.no_grad():
            assert layer(x, way).shape == (*shape_of_x, shape[1])
        y = layer(x, way)
    assert y.shape == (*shape_of_x, shape[1])
    assert not any(gradient.any() for gradient in gradients(y, x, layer))


@pytest.mark.parametrize("way", ["linear", "in place"])
def test_non_contiguous_input(way):
    layer = Layer(STARTS[0], SHAPES[0]).cast(torch.float64, torch.float64)
    x = torch.randn(24, 7, 2, dtype=torch.float64).permute(2, 1, 0).requires_grad_()
    y = layer(x, way)
    torch.testing.assert_close(gradients(y, x, layer), gradients(layer.reference(x), x, layer))


@pytest.mark.parametrize("way", ["linear", "in place", "out of place"])
@pytest.mark.parametrize("start", STARTS[:5], ids=str)
def test_second_derivatives(start, way):
    layer = Layer(start, SHAPES[0]).cast(torch.float64, torch.float64)
    x = torch.randn(2, 24, dtype=torch.float64, requires_grad=True)
    names = list(layer.trained)

    def function(x, *tensors):
        layer.trained = dict(zip(names, tensors, strict=True))
        return layer(x, way)

    assert torch.autograd.gradgradcheck(function, (x, *layer.trained.values()))


def test_second_derivatives_where_the_kept_product_is_shaped_as_x():
    layer = Layer(("slora", "s_lora", "none"), (24, 18, {"rank": 24})).cast(torch.float64, torch.float64)
    x = torch.randn(2, 24, dtype=torch.float64, requires_grad=True)
    (found,) = torch.autograd.grad(layer(x).square().sum(), x, create_graph=True)
    (expected,) = torch.autograd.grad(layer.reference(x).square().sum(), x, create_graph=True)
    torch.testing.assert_close(found, expected)


def test_second_derivatives_with_down_frozen_are_refused_and_possible():
    layer = Layer(("inttune", "n_lora", "snapshot"), SHAPES[0]).cast(torch.float64, torch.float64)
    x = torch.randn(2, 24, dtype=torch.float64, requires_grad=True)
    with pytest.raises(NdLoraValueError, match="create_graph=True.*fused.plain_autograd"):
        torch.autograd.grad(layer(x).square().sum(), x, create_graph=True)
    with fused.plain_autograd():
        (found,) = torch.autograd.grad(layer(x).square().sum(), x, create_graph=True)
    torch.autograd.grad(found.sum(), layer.trained["core"])


# what of torch.func is taken of a loss (factors, x), for x (4, 3, in) with tangents
TRANSFORMS = {
    "gradients of each sample": lambda loss, factors, x, tangent: vmap(grad(loss), (None, 0))(factors, x),
    "jvp": lambda loss, factors, x, tangent: jvp(lambda x: loss(factors, x), (x,), (tangent,)),
    "jacrev": lambda loss, factors, x, tangent: jacrev(lambda x: vmap(loss, (None, 0))(factors, x))(x),
    "hessian vector product": lambda loss, factors, x, tangent: jvp(
        lambda x: grad(loss, argnums=1)(factors, x), (x,), (tangent,)
    ),
}


@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("start, shape", CASES, ids=str)
def test_transforms_see_through(start, shape, way, transform):
    layer = Layer(start, shape, bias="bias" in way).cast(torch.float64, torch.float64)
    x, tangent = torch.randn(2, 4, 3, shape[0], dtype=torch.float64)
    factors = {name: value.detach() for name, value in layer.trained.items()}

    def loss(called, factors, x):
        layer.trained = factors
        return called(x).square().sum()

    found, expected = (
        TRANSFORMS[transform](partial(loss, called), factors, x, tangent)
        for called in (partial(layer, way=way), layer.reference)
    )
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("start, shape", CASES, ids=str)
def test_forward_mode(start, shape, way):
    layer = Layer(start, shape, bias="bias" in way).cast(torch.float64, torch.float64)
    x, tangent = torch.randn(2, 3, shape[0], dtype=torch.float64)
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(x, tangent)
        found, expected = (
            forward_ad.unpack_dual(y).tangent for y in (layer(dual, way), layer.reference(dual))
        )
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("start, shape", CASES, ids=str)
def test_many_gradients_in_one_backward(start, shape, way):
    layer = Layer(start, shape, bias="bias" in way).cast(torch.float64, torch.float64)
    x = torch.randn(2, 3, shape[0], dtype=torch.float64, requires_grad=True)
    inputs, weights = [x, *layer.trained.values()], torch.randn(4, 2, 3, shape[1], dtype=torch.float64)
    found = torch.autograd.grad(layer(x, way), inputs, weights, is_grads_batched=True)
    y = layer.reference(x)
    expected = [torch.autograd.grad(y, inputs, weight, retain_graph=True) for weight in weights]
    for gradient, *each in zip(found, *expected, strict=True):
        torch.testing.assert_close(gradient, torch.stack(each))


@pytest.mark.parametrize("use_reentrant", [True, False])
@pytest.mark.parametrize("way", ["linear", "in place"])
@pytest.mark.parametrize("start", STARTS, ids=str)
def test_gradient_checkpointing(start, way, use_reentrant):
    layer = Layer(start, SHAPES[0]).cast(torch.float64, torch.float64)
    x = torch.randn(3, 24, dtype=torch.float64, requires_grad=True)
    checkpoint(layer, x, way, use_reentrant=use_reentrant).square().sum().backward()
    inputs = [x, *layer.trained.values()]
    expected = torch.autograd.grad(layer.reference(x).square().sum(), inputs)
    torch.testing.assert_close([tensor.grad for tensor in inputs], list(expected))


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("start", STARTS, ids=str)
def test_autocast_computes_in_its_dtype_and_keeps_no_float32(start, way):
    layer = Layer(start, SHAPES[0], bias="bias" in way).cast(torch.float32, torch.float32)
    x = torch.randn(50, 24, requires_grad=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = layer(x, way)
        assert y.dtype == torch.bfloat16
        gradients(y, x, layer)  # backward inside and outside
    expected = layer.reference(x)
    assert_close(y, expected.double(), 4e-2)
    for found, wanted in zip(gradients(layer(x, way), x, layer), gradients(expected, x, layer), strict=True):
        assert found.dtype == torch.float32
        assert_close(found, wanted.double(), 4e-2)


@pytest.mark.parametrize("base", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tokens", [1, 5, 100])
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("start, shape", CASES, ids=str)
def test_without_gradients_the_output_is_the_same(start, shape, way, tokens, base):
    layer = Layer(start, shape, bias="bias" in way).cast(base, torch.float32)
    x = torch.randn(tokens, shape[0], dtype=base)
    expected = layer(x, way)
    tolerance = 4e-2 if base == torch.bfloat16 else 1e-6  # a few bfloat16 tokens are computed in float32
    with torch.no_grad():
        found = layer(x, way)
    assert found.dtype == expected.dtype and not found.requires_grad
    assert_close(found, expected.double(), tolerance)
    with torch.inference_mode():
        assert_close(layer(x, way), expected.double(), tolerance)


def test_a_bias_that_trains_gets_its_gradient():
    layer = Layer(STARTS[0], SHAPES[0], bias=True).cast(torch.float64, torch.float64)
    layer.bias.requires_grad_()
    layer(torch.randn(5, 24, dtype=torch.float64)).sum().backward()
    torch.testing.assert_close(layer.bias.grad, torch.full((18,), 5.0, dtype=torch.float64))


@pytest.mark.parametrize("start, shape", CASES[:6], ids=str)
def test_many_tokens_are_taken_in_parts(start, shape, monkeypatch):
    monkeypatch.setattr("ndlora_plugins.kernels.modes._NUMBERS_AT_A_TIME", 200)
    monkeypatch.setattr("ndlora_plugins.kernels.modes._FEW_ROWS", 8)
    mode_product.cache_clear()
    layer = Layer(start, shape).cast(torch.float64, torch.float64)
    x = torch.randn(30, shape[0], dtype=torch.float64, requires_grad=True)
    y = layer(x)
    torch.testing.assert_close(y, layer.reference(x))
    torch.testing.assert_close(gradients(y, x, layer), gradients(layer.reference(x), x, layer))
    mode_product.cache_clear()


@pytest.mark.slow
@pytest.mark.parametrize("way", ["linear", "in place"])
@pytest.mark.parametrize("start", [STARTS[0], STARTS[4], STARTS[6]], ids=str)
def test_compiles_as_one_graph(start, way):
    layer = Layer(start, SHAPES[0]).cast(torch.float32, torch.float32)
    x = torch.randn(3, 24, requires_grad=True)
    compiled = torch.compile(lambda x: layer(x, way), fullgraph=True, backend="aot_eager")
    y, expected = compiled(x), layer.reference(x)
    torch.testing.assert_close(y, expected)
    torch.testing.assert_close(gradients(y, x, layer), gradients(expected, x, layer))
