"""Every registered method holds to the laws, with every start that fits it; and what is ours alone."""

from dataclasses import replace

import pytest
import torch

from ndlora_plugins.adapter import plan_layer
from ndlora_plugins.errors import NdLoraValueError
from ndlora_plugins.fused import cast_factors
from ndlora_plugins.options import adapter_options
from ndlora_plugins.registry import method_and_start, methods, starts
from ndlora_plugins.schedules import Moment, Ranks
from ndlora_plugins.starts import Seen, Start
from ndlora_plugins.testing import check_method

# options of the methods that cannot be planned without any
NEEDED = {"einsum": {"equation": "out r, r s, s in -> out in"}, "nola": {"bases": 5}}


def apply(planned, trained, frozen, x, ranks=None):
    update, factors = planned.update(trained, frozen, ranks)
    return update.apply(factors, x)


def fits(method, start):
    try:
        method_and_start(method, start, NEEDED.get(method))
    except NdLoraValueError:
        return False
    return True


FITTING = [(method, start) for method in methods() for start in starts() if fits(method, start)]
# options; in_features, out_features -> by anchor the rank of the product of crossed modes, or of mirrored ones
CROSSED = [
    ({"crossed_modes": 4}, 1, {"none": 16, "snapshot": 32}),
    ({"crossed_modes": 2}, 3, {"none": 12, "snapshot": 24}),
    ({"crossed_modes": 2, "num_modes": 3}, 2, {"none": 16, "snapshot": 48}),
    ({"crossed_modes": 2, "num_modes": 4}, 1, {"none": 16, "snapshot": 64}),
    ({"in_modes": (120, 2), "out_modes": (3, 64)}, 2, {"none": 12, "snapshot": 24}),
]
# dtype -> error relative to the largest entry
DTYPES = {torch.float32: 2e-6, torch.bfloat16: 5e-2}


def plan(method, in_features=24, out_features=18, options=None, **given):
    chosen = adapter_options(method, options=options or NEEDED.get(method), **given)
    return plan_layer(chosen, in_features, out_features, "q")


def moved(planned, dtype=torch.float64):
    """(trained, frozen) after some training."""
    weight, gradient = torch.randn(2, planned.layout.out_features, planned.layout.in_features)
    trained, frozen = planned.initialize(Seen(weight, gradient))
    trained = {name: value + 0.3 * torch.randn(value.shape) for name, value in trained.items()}
    return cast_factors(trained, dtype), cast_factors(frozen, dtype)


@pytest.mark.parametrize("method, start", FITTING)
def test_the_laws_hold(method, start):
    gradient = "gradient" in starts()[start].value.reads
    check_method(method, init_lora_weights=start, options=NEEDED.get(method), gradient=gradient)


@pytest.mark.parametrize("dtype, tolerance", DTYPES.items(), ids=str)
@pytest.mark.parametrize("anchor", ["none", "snapshot"])
@pytest.mark.parametrize("method", methods())
def test_narrow_dtypes(method, anchor, dtype, tolerance):
    planned = plan(method, rank=4, anchor=anchor)
    trained, frozen = moved(planned, dtype)
    x = torch.randn(2, 5, 24, dtype=dtype)
    expected = x @ planned.delta(trained, frozen).T
    found = apply(planned, trained, frozen, x)
    assert found.dtype == dtype
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance * expected.abs().max().item())


@pytest.mark.parametrize("method, start", FITTING)
def test_the_snapshot_anchor_subtracts_the_start(method, start):
    anchored, plain = (
        plan(method, rank=4, init_lora_weights=start, anchor=anchor) for anchor in ("snapshot", "none")
    )
    seen = Seen(*torch.randn(2, 18, 24, dtype=torch.float64))
    values, whole = (p.initialize(seen, torch.Generator().manual_seed(0)) for p in (anchored, plain))
    change = {name: torch.randn(value.shape, dtype=torch.float64) for name, value in values[0].items()}
    first = cast_factors({**whole[0], **whole[1]}, torch.float64)
    now = first | {name: first[name] + value for name, value in change.items()}
    frozen = cast_factors(values[1], torch.float64)
    expected = plain.structure.delta(now) - plain.structure.delta(first)
    torch.testing.assert_close(anchored.delta(change, frozen), expected)


@pytest.mark.parametrize("method", methods())
def test_random_values_move_the_function_and_have_no_anchor(method):
    planned = plan(method, init_lora_weights=False)
    assert planned.anchor == "none" and torch.count_nonzero(planned.delta(*planned.initialize())) > 0


@pytest.mark.parametrize("anchor", ["none", "snapshot"])
@pytest.mark.parametrize("options, rank, ranks", CROSSED, ids=str)
def test_modes_that_cross_are_an_exact_lora(options, rank, ranks, anchor):
    given = {"init_lora_weights": "ndlinear", "anchor": anchor, "rank": rank}
    planned = plan("ndlinear", 240, 192, options, **given)
    trained, frozen = moved(planned)
    update, factors = planned.update(trained, frozen)
    down, up = update.low_rank(factors)
    assert down.shape == (ranks[anchor], 240)
    torch.testing.assert_close(up @ down, planned.delta(trained, frozen))


def test_crossed_is_ndlinear_with_small_modes_of_four():
    layout = plan("ndlinear", 240, 192, {"crossed_modes": 4}).structure
    assert replace(plan("crossed", 240, 192).structure, layout=layout.layout) == layout
    assert plan("crossed", 240, 192).num_parameters == 240 + 192


def test_an_equation_is_the_method_that_it_says():
    written, chain = plan("einsum", rank=4), plan("slora", rank=4)
    trained, frozen = moved(chain)
    assert (written.num_parameters, written.anchor) == (chain.num_parameters, chain.anchor)
    by_position = {f"factor_{k}": trained[name] for k, name in enumerate(("up", "core", "down"), start=1)}
    torch.testing.assert_close(written.delta(by_position, {}), chain.delta(trained, frozen))


# method, start -> what is saved of 4 x 24, 4 x 4 and 18 x 4 numbers (down, core, up)
SAVED = [
    ("slora", True, 184),  # no anchor: the factors
    ("nlora", True, 184),  # the changes alone: the start is read from the weight again
    ("nlora", "n_lora_pivots", 2 * 184),  # rounding may change which rows these are
    ("inttune", True, 16),
    ("inttune", "first_zero", 184),  # random sides cannot be read from anything
    ("slora", False, 184),
]


@pytest.mark.parametrize("method, start, saved", SAVED)
def test_what_is_saved(method, start, saved):
    assert plan(method, init_lora_weights=start, rank=4).num_saved == saved


@pytest.mark.parametrize(
    "rank, alpha, rslora, expected", [(4, 8, False, 2), (4, 8, True, 4), (4, None, False, 1)]
)
def test_scaling(rank, alpha, rslora, expected):
    assert plan("slora", rank=rank, alpha=alpha, use_rslora=rslora).scaling == expected


def test_a_start_that_is_made_for_an_alpha_brings_it():
    assert plan("nlora", rank=4).scaling == 4 and plan("nlora", rank=4, alpha=4).scaling == 1
    assert plan("nlora", rank=4, init_lora_weights="n_lora").scaling == 1


def test_the_norm_of_no_update_is_zero_and_records_no_gradient():
    planned = plan("nlora", rank=4)
    trained, frozen = planned.initialize(Seen(weight=torch.randn(18, 24)))
    assert planned.delta_norm(trained, frozen) == 0.0
    leaves = {name: (value + 1).requires_grad_() for name, value in trained.items()}
    assert planned.delta_norm(leaves, frozen) > 0
    assert all(value.grad is None and value.requires_grad for value in leaves.values())


# What a method may have besides


# seen, learning, scale
RANKS = [Ranks(1), Ranks(3), Ranks(4, scale=0.5), Ranks(2, scale=2.0), Ranks(3, learning=2), Ranks(4, 3, 2.0)]


@pytest.mark.parametrize("ranks", RANKS, ids=str)
@pytest.mark.parametrize("anchor", ["none", "snapshot"])
@pytest.mark.parametrize("method", ["slora", "ndlinear", "inttune", "sora", "tensor_train", "metatt"])
def test_a_forward_in_training_may_see_a_part_of_the_ranks(method, anchor, ranks):
    planned = plan(method, rank=4, anchor=anchor)
    trained, frozen = moved(planned)
    x, output = torch.randn(5, 24, dtype=torch.float64), torch.randn(5, 18, dtype=torch.float64)
    small = replace(planned, layout=replace(planned.layout, rank=ranks.seen))
    shown = [planned.structure.cut_factors(factors, ranks.seen) for factors in (trained, frozen)]
    expected = ranks.scale * x @ small.delta(*shown).T
    torch.testing.assert_close(apply(planned, trained, frozen, x, ranks), expected)
    torch.testing.assert_close(
        planned.add_update(output, trained, frozen, x, 0.5, ranks=ranks), output + 0.5 * expected
    )
    whole = x @ planned.delta(trained, frozen).T
    torch.testing.assert_close(apply(planned, trained, frozen, x), whole)  # outside of training

    leaves = {name: value.clone().requires_grad_() for name, value in trained.items()}
    planned.add_update(output, leaves, frozen, x, 0.5, ranks=ranks).square().sum().backward()
    for name, value in leaves.items():
        if len(planned.structure.rank_axes[name]) == 1:
            by_rank = value.grad.movedim(*planned.structure.rank_axes[name], 0).reshape(4, -1)
            assert by_rank.any(1).nonzero().flatten().tolist() == list(range(ranks.learning, ranks.seen))


def test_a_moments_draw_is_the_same_everywhere_and_another_at_another_step():
    draws = [Moment(step, seed=1).draw(1000) for step in range(20)]
    assert draws == [Moment(step, seed=1).draw(1000) for step in range(20)]
    assert len(set(draws)) > 15 and draws != [Moment(step, seed=2).draw(1000) for step in range(20)]
    assert {Moment(step).draw(3) for step in range(100)} == {0, 1, 2}


def test_what_layers_share_has_one_key_and_its_value_comes_from_them():
    def sides(factor, layer, layout):
        return None if factor.name == "core" else f"{factor.name}_of_{layout.out_features}"

    options = replace(
        adapter_options("slora", rank=4), method=replace(methods()["slora"].value, shared=sides)
    )
    first, second, other = (
        plan_layer(options, 24, out, name) for out, name in ((18, "a"), (18, "b"), (6, "c"))
    )
    assert first.shared == second.shared == (("down", "down_of_18"), ("up", "up_of_18")) != other.shared
    shared = {"down": torch.ones(4, 24), "up": torch.ones(18, 4)}
    trained, _ = first.initialize(Seen(shared=shared))
    assert trained["down"] is shared["down"] and trained["up"] is shared["up"]


# options, (in, out) features, axes of the weight beyond them -> the in_mode of the factor that layers share
SHARED_MODES = [
    ({}, (24, 18), {}, 12),
    ({"num_modes": 3}, (24, 18), {}, 12),
    ({"in_modes": (2, 3, 4), "out_modes": (3, 3, 2)}, (24, 18), {}, 4),
    ({}, (24, 18), {"trailing": (1, 1)}, 12),
    ({}, (24 * 9, 18), {"trailing": (3, 3)}, 12),
    ({}, (24 * 3, 18), {"trailing": (1, 3)}, 12),
    ({}, (24, 5 * 18), {"leading": (5,)}, 12),
    (
        {"num_modes": 1},
        (24 * 3, 18),
        {"trailing": (3,)},
        None,
    ),  # mode_1, which starts at zero, is each layer's own
]


@pytest.mark.parametrize("options, features, axes, in_mode", SHARED_MODES, ids=str)
def test_crossed_modes_share_the_last_in_mode_of_the_features(options, features, axes, in_mode):
    chosen = adapter_options("shared_crossed", options={"crossed_modes": 2, **options})
    planned = plan_layer(chosen, *features, "q", **axes)
    names = [name for name, _ in planned.shared]
    assert [f.shape[2] for f in planned.structure.factors if f.name in names] == (
        [in_mode] if in_mode else []
    )


# a start's values, what it reads -> what the error must say
WRONG_STARTS = [
    (
        lambda structure: {"down": torch.zeros(8, 24)},
        (),
        "gives the factors .'down': .* must give every factor",
    ),
    (
        lambda structure: {factor.name: torch.zeros(2) for factor in structure.factors},
        (),
        r"'wrong' gives the factors .'down': \(2,\).* method='slora' has .'down': \(8, 24\)",
    ),
    (lambda structure: {}, ("gradient",), "init_lora_weights='wrong' reads the gradient, and there is none"),
]


@pytest.mark.parametrize("values, reads, message", WRONG_STARTS)
def test_a_start_that_does_not_give_what_it_should(values, reads, message):
    start = Start(
        name="wrong",
        summary="",
        source="",
        reads=frozenset(reads),
        function=lambda structure, trains, seen, generator: values(structure),
    )
    planned = replace(plan("slora"), start=start)
    with pytest.raises(NdLoraValueError, match=message):
        planned.initialize(Seen(weight=torch.randn(18, 24)))
