"""For every method: what it computes, materialises, anchors and converts to is one and the same dW."""

import pytest
import torch

from ndlora_plugins.adapter import AdapterOptions, plan_layer
from ndlora_plugins.registry import methods

METHODS = ["ndlinear", "slora", "nlora", "inttune"]
# in_features, out_features, options
CASES = [
    (24, 18, {"num_modes": 2, "rank": 1}),
    (24, 18, {"num_modes": 3, "rank": 1}),
    (24, 18, {"num_modes": 2, "rank": 4}),
    (24, 18, {"num_modes": 3, "rank": 4}),
    (13, 30, {"num_modes": 2, "rank": 4}),
    (60, 48, {"crossed_modes": 4, "rank": 1}),
    (60, 48, {"crossed_modes": 2, "rank": 3}),
    (60, 48, {"crossed_modes": 2, "num_modes": 3, "rank": 2}),
]
# in_features, out_features, options -> by anchor the rank of the product of crossed modes, or of mirrored ones
CROSSED = [
    (240, 192, {"crossed_modes": 4}, {"none": 16, "snapshot": 32}),
    (240, 192, {"crossed_modes": 2, "rank": 3}, {"none": 12, "snapshot": 24}),
    (240, 192, {"crossed_modes": 2, "num_modes": 3, "rank": 2}, {"none": 16, "snapshot": 48}),
    (240, 192, {"crossed_modes": 2, "num_modes": 4}, {"none": 16, "snapshot": 64}),
    (240, 192, {"in_modes": (120, 2), "out_modes": (3, 64), "rank": 2}, {"none": 12, "snapshot": 24}),
]
# dtype -> tolerance, relative to the largest entry
TOLERANCE = {torch.float64: 1e-12, torch.float32: 2e-6, torch.bfloat16: 5e-2}
# method -> the initialisers that can start it, with every anchor
STARTS = [
    ("ndlinear", "zero_mode"),
    ("ndlinear", "ndlinear"),
    ("slora", "s_lora"),
    ("slora", "n_lora"),
    ("nlora", "n_lora"),
    ("inttune", "n_lora"),
    ("ndlinear", False),
    ("slora", False),
    ("nlora", False),
    ("inttune", False),
]


def make(method, init, anchor, case, dtype=torch.float64):
    """A plan with trained factors that have moved, as (plan, weight, trained, frozen)."""
    in_features, out_features, options = case
    plan = plan_layer(
        AdapterOptions(method=method, init_lora_weights=init, anchor=anchor, **options),
        in_features,
        out_features,
        "q",
    )
    weight = torch.randn(out_features, in_features, dtype=torch.float64)
    trained, frozen = plan.initialize(weight)
    trained = {
        name: value.double() + 0.3 * torch.randn(value.shape, dtype=torch.float64)
        for name, value in trained.items()
    }
    return (
        plan,
        weight,
        {name: value.to(dtype) for name, value in trained.items()},
        {name: value.to(dtype) for name, value in frozen.items()},
    )


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("anchor", ["none", "snapshot"])
@pytest.mark.parametrize("method, init", STARTS)
def test_forward_equals_the_materialised_delta(method, init, anchor, case, dtype):
    plan, _, trained, frozen = make(method, init, anchor, case, dtype)
    x = torch.randn(2, 5, case[0], dtype=dtype)
    expected = x @ plan.delta(trained, frozen).T
    torch.testing.assert_close(
        plan.apply(trained, frozen, x),
        expected,
        rtol=TOLERANCE[dtype],
        atol=TOLERANCE[dtype] * expected.abs().max().item(),
    )


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("method, init", STARTS)
def test_the_snapshot_anchor_subtracts_the_start(method, init, case):
    plan, weight, trained, frozen = make(method, init, "snapshot", case)
    unanchored = plan_layer(
        AdapterOptions(method=method, init_lora_weights=init, anchor="none", **case[2]), case[0], case[1], "q"
    )
    start = {
        factor.name: frozen.get(factor.name, torch.zeros(factor.shape).double())
        for factor in plan.method.factors(plan.layout)
    }
    if method == "inttune":  # its core's start is not kept: it cancels
        start["core"] = weight[:4, :4] if init == "n_lora" else torch.randn(4, 4).double()
        start["core"] = start["core"][: case[2]["rank"], : case[2]["rank"]]
    now = {name: value + trained.get(name, 0) for name, value in start.items()}
    expected = unanchored.method.delta(unanchored.layout, now) - unanchored.method.delta(
        unanchored.layout, start
    )
    torch.testing.assert_close(plan.delta(trained, frozen), expected)


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("method, init", STARTS)
def test_an_anchored_start_is_exactly_zero(method, init, case):
    plan, weight, _, _ = make(method, init, "snapshot", case)
    trained, frozen = plan.initialize(weight)
    x = torch.randn(3, case[0], dtype=next(iter(frozen.values())).dtype)
    trained = {name: value.to(x.dtype) for name, value in trained.items()}
    assert torch.count_nonzero(plan.apply(trained, frozen, x)) == 0


@pytest.mark.parametrize("method", METHODS)
def test_the_own_start_leaves_the_function_and_random_does_not(method):
    own = plan_layer(AdapterOptions(method=method), 24, 18, "q")
    weight = torch.randn(18, 24)
    assert torch.count_nonzero(own.delta(*own.initialize(weight))) == 0
    random = plan_layer(AdapterOptions(method=method, init_lora_weights=False), 24, 18, "q")
    assert torch.count_nonzero(random.delta(*random.initialize(weight))) > 0


@pytest.mark.parametrize("anchor, rank_factor", [("none", 1), ("snapshot", 2)])
@pytest.mark.parametrize("method", ["slora", "nlora"])
def test_low_rank_form_is_exact(method, anchor, rank_factor):
    plan, _, trained, frozen = make(method, "n_lora", anchor, (24, 18, {"rank": 4}))
    down, up = plan.low_rank(trained, frozen)
    assert down.shape == (4 * rank_factor, 24) and up.shape == (18, 4 * rank_factor)
    torch.testing.assert_close(up @ down, plan.delta(trained, frozen))


@pytest.mark.parametrize("anchor", ["none", "snapshot"])
@pytest.mark.parametrize("in_features, out_features, options, ranks", CROSSED, ids=str)
def test_crossed_modes_are_an_exact_lora(in_features, out_features, options, ranks, anchor):
    plan, _, trained, frozen = make("ndlinear", "ndlinear", anchor, (in_features, out_features, options))
    down, up = plan.low_rank(trained, frozen)
    assert down.shape == (ranks[anchor], in_features)
    torch.testing.assert_close(up @ down, plan.delta(trained, frozen))


def test_balanced_modes_have_no_low_rank_form():
    plan, _, trained, frozen = make("ndlinear", "ndlinear", "none", (576, 576, {}))
    assert plan.low_rank(trained, frozen) is None


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("anchor", ["none", "snapshot"])
def test_gradients_reach_every_trained_factor(method, anchor):
    plan, _, trained, frozen = make(method, True, anchor, (24, 18, {"rank": 4}))
    leaves = {name: value.requires_grad_() for name, value in trained.items()}
    plan.apply(leaves, frozen, torch.randn(5, 24, dtype=torch.float64)).square().sum().backward()
    assert all(value.grad.abs().sum() > 0 for value in leaves.values())


def test_n_lora_takes_the_references_slices():
    # https://github.com/TracyGuo2001/NLoRA nlora_init: A = W[:r, :], B = W[:, :r], N = W[:r, :r]
    plan = plan_layer(AdapterOptions(init_lora_weights="n_lora", anchor="none", rank=4), 24, 18, "q")
    weight = torch.randn(18, 24, dtype=torch.float64)
    trained, frozen = plan.initialize(weight)
    assert not frozen
    torch.testing.assert_close(trained["down"], weight[:4, :], rtol=0, atol=0)
    torch.testing.assert_close(trained["up"], weight[:, :4], rtol=0, atol=0)
    torch.testing.assert_close(trained["core"], weight[:4, :4], rtol=0, atol=0)
    torch.testing.assert_close(plan.delta(trained, frozen), weight[:, :4] @ weight[:4, :4] @ weight[:4, :])


@pytest.mark.parametrize(
    "rank, alpha, rslora, expected", [(4, 8, False, 2.0), (4, 8, True, 4.0), (4, None, False, 1.0)]
)
def test_scaling(rank, alpha, rslora, expected):
    plan = plan_layer(AdapterOptions(method="slora", rank=rank, alpha=alpha, use_rslora=rslora), 24, 18, "q")
    assert plan.scaling == expected


def test_a_multiply_adds_formula_for_every_method():
    for name, found in methods().items():
        plan = plan_layer(AdapterOptions(method=name, rank=2), 24, 18, "q")
        assert found.value.multiply_adds(plan.layout) > 0
