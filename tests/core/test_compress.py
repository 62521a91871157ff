"""The low-rank forms against torch.linalg.svd of the whole matrix, in float64."""

import pytest
import torch

from ndlora_plugins.adapter import plan_layer
from ndlora_plugins.errors import NdLoraValueError
from ndlora_plugins.integrations.peft.exports.compress import (
    RankTarget,
    low_rank_form,
    product_low_rank,
    relative_error,
)
from ndlora_plugins.options import adapter_options
from ndlora_plugins.starts import Seen

# in_features, out_features, options of an update without an exact low-rank form
KRONECKER = {
    "one-term": (24, 60, {"method": "ndlinear"}),
    "one-term-3-modes": (24, 60, {"method": "ndlinear", "options": {"num_modes": 3}}),
    "one-term-prime": (13, 30, {"method": "ndlinear"}),
    "four-terms": (24, 60, {"method": "ndlinear", "rank": 4}),
    "four-terms-3-modes": (60, 24, {"method": "ndlinear", "rank": 4, "options": {"num_modes": 3}}),
    "snapshot": (24, 60, {"init_lora_weights": "ndlinear"}),
}
# large enough not to be taken whole
WIDE = (400, 324, {"method": "ndlinear", "rank": 3})
# arguments, what the message must say
WRONG = [
    ({}, "give one of the three, not none"),
    ({"rank": 4, "energy": 0.9}, "give one of the three, not {'rank': 4, 'energy': 0.9}"),
    ({"rank": 0}, "rank=0: choose an integer"),
    ({"energy": 1.5}, "energy=1.5: choose a share"),
    ({"max_error": 1.0}, "max_error=1.0: choose a value"),
]


def make(in_features, out_features, options):
    """(plan, trained, frozen, dW) with factors that have moved."""
    plan = plan_layer(adapter_options(**options), in_features, out_features, "q")
    trained, frozen = plan.initialize(Seen(weight=torch.randn(out_features, in_features)))
    trained = {name: value.double() + torch.randn(value.shape).double() for name, value in trained.items()}
    frozen = {name: value.double() for name, value in frozen.items()}
    return plan, trained, frozen, plan.delta(trained, frozen)


def best_error(delta, rank):
    values = torch.linalg.svdvals(delta)
    return float(values[rank:].norm() / values.norm())


@pytest.mark.parametrize("rank", [1, 5, 12])
@pytest.mark.parametrize("case", KRONECKER)
def test_the_chosen_rank_gives_the_best_error(case, rank):
    plan, trained, frozen, delta = make(*KRONECKER[case])
    down, up = low_rank_form(plan, trained, frozen, RankTarget(rank=rank))
    assert down.shape[0] == up.shape[1] == min(rank, int(torch.linalg.matrix_rank(delta)))
    expected = best_error(delta, rank)
    assert float((delta - up @ down).norm() / delta.norm()) == pytest.approx(expected, abs=1e-7)
    assert relative_error(plan, trained, frozen, down, up) == pytest.approx(expected, abs=1e-7)


@pytest.mark.parametrize("case", KRONECKER)
@pytest.mark.parametrize(
    "target, error",
    [
        (RankTarget(max_error=0.3), 0.3),
        (RankTarget(energy=0.91), 0.3),
        (RankTarget(max_error=0), 1e-7),
        (RankTarget(energy=1), 1e-7),
    ],
)
def test_the_smallest_rank_that_keeps_to_the_error(case, target, error):
    plan, trained, frozen, delta = make(*KRONECKER[case])
    down, up = low_rank_form(plan, trained, frozen, target)
    assert float((delta - up @ down).norm() / delta.norm()) <= error
    assert len(down) == 1 or best_error(delta, len(down) - 1) > error


@pytest.mark.parametrize("target", [RankTarget(rank=8), RankTarget(rank=30), RankTarget(max_error=0.5)])
def test_the_randomised_form_is_near_the_best(target):
    plan, trained, frozen, delta = make(*WIDE)
    down, up = low_rank_form(plan, trained, frozen, target)
    error = float((delta - up @ down).norm() / delta.norm())
    assert best_error(delta, len(down)) <= error <= 1.02 * best_error(delta, len(down))
    assert error <= (target.max_error or 1)


def test_the_randomised_form_is_reproducible():
    plan, trained, frozen, _ = make(*WIDE)
    first, again = (low_rank_form(plan, trained, frozen, RankTarget(rank=8)) for _ in range(2))
    assert torch.equal(first[0], again[0]) and torch.equal(first[1], again[1])


@pytest.mark.parametrize("anchor", ["none", "snapshot"])
@pytest.mark.parametrize("method", ["slora", "nlora", "inttune"])
def test_low_rank_methods_are_exact_and_can_be_made_smaller(method, anchor):
    plan, trained, frozen, delta = make(
        24,
        60,
        {
            "method": method,
            "rank": 4,
            "init_lora_weights": "n_lora" if method == "inttune" else True,
            "anchor": anchor,
        },
    )
    down, up = low_rank_form(plan, trained, frozen)
    torch.testing.assert_close(up @ down, delta)
    assert low_rank_form(plan, trained, frozen, RankTarget(rank=64))[0].shape == down.shape
    smaller_down, smaller_up = low_rank_form(plan, trained, frozen, RankTarget(rank=2))
    assert len(smaller_down) == 2
    assert float((delta - smaller_up @ smaller_down).norm() / delta.norm()) == pytest.approx(
        best_error(delta, 2)
    )


def test_a_product_of_a_rank_above_its_smaller_side():
    down, up = torch.randn(30, 12).double(), torch.randn(20, 30).double()
    smaller = product_low_rank(down, up, RankTarget(max_error=0))
    assert len(smaller[0]) == 12
    torch.testing.assert_close(smaller[1] @ smaller[0], up @ down)


@pytest.mark.parametrize("case", KRONECKER)
def test_no_update_is_rank_one_and_no_error(case):
    plan, trained, frozen, _ = make(*KRONECKER[case])
    trained = {name: torch.zeros_like(value) for name, value in trained.items()}
    down, up = low_rank_form(plan, trained, frozen, RankTarget(energy=0.9))
    assert len(down) == 1 and relative_error(plan, trained, frozen, down, up) == 0


def test_scaling_and_rounding_count_as_error():
    plan, trained, frozen, _ = make(24, 60, {"method": "slora", "rank": 4})
    down, up = low_rank_form(plan, trained, frozen)
    assert relative_error(plan, trained, frozen, down, 3 * up, 3.0) < 1e-7
    assert 1e-4 < relative_error(plan, trained, frozen, down.bfloat16(), (3 * up).bfloat16(), 3.0) < 1e-2


def test_without_a_target_kronecker_terms_are_refused():
    plan, trained, frozen, _ = make(*KRONECKER["one-term"])
    with pytest.raises(NdLoraValueError, match="'ndlinear' has no exact form"):
        low_rank_form(plan, trained, frozen)


@pytest.mark.parametrize("arguments, message", WRONG)
def test_wrong_targets(arguments, message):
    with pytest.raises(NdLoraValueError) as caught:
        RankTarget(**arguments)
    assert message in str(caught.value)
