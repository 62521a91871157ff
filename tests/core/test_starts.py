"""The starts that are ours: what they are to be, and that a LoRA recipe's learning rate holds."""

import functools

import pytest
import torch

from ndlora_plugins.adapter import plan_layer
from ndlora_plugins.errors import NdLoraValueError
from ndlora_plugins.options import adapter_options
from ndlora_plugins.starts import Seen
from ndlora_plugins.starts.chain import pivot_columns
from ndlora_plugins.starts.modes import nearest_kronecker
from ndlora_plugins.starts.singular import largest_singular_vectors
from ndlora_plugins.structures.kronecker import kronecker

# in, out, rank, options of modes
CASES = [
    (576, 576, 1, {}),
    (576, 1536, 1, {}),
    (1536, 576, 1, {}),
    (576, 192, 4, {}),
    (576, 576, 4, {"num_modes": 3}),
    (1024, 4096, 2, {"num_modes": 4}),
    (576, 576, 1, {"crossed_modes": 4}),
    (576, 1536, 4, {"crossed_modes": 4}),
    (2048, 1024, 1, {"crossed_modes": 8}),
    (576, 1536, 2, {"crossed_modes": 4, "num_modes": 3}),
    (576, 576, 1, {"in_modes": (12, 48), "out_modes": (12, 48)}),
]

# in, out, rank
CORES = [(576, 576, 8), (576, 576, 64), (576, 1536, 32), (1536, 576, 128), (576, 192, 64)]


def apply(planned, trained, frozen, x, ranks=None):
    update, factors = planned.update(trained, frozen, ranks)
    return update.apply(factors, x)


def scaled_output(planned, frozen, trained, x):
    """What the layer adds for x."""
    return planned.scaling * apply(planned, trained, frozen, x)


def first_step(trained, answer, x, wanted):
    """How far the output for `x` moves along `wanted` (of length 1) when Adam has made one step of rate 1."""
    leaves = {name: value.requires_grad_() for name, value in trained.items()}
    before = answer(leaves, x)
    (before * wanted).sum().backward()
    with torch.no_grad():
        after = answer({name: value + value.grad.sign() for name, value in leaves.items()}, x)
        return ((after - before) * wanted).sum().item()


def loras_first_step(x, wanted, one_hot=False):
    """The same for PEFT's LoRA r=8 with lora_alpha=16."""
    down = torch.nn.init.kaiming_uniform_(torch.empty(8, len(x)), a=5**0.5)
    factors = {"down": down, "up": torch.zeros(len(wanted), 8)}
    if one_hot:
        factors = {"down": torch.zeros(8, len(x)), "up": torch.randn(len(wanted), 8)}
    return first_step(factors, lambda factors, x: 2 * factors["up"] @ (factors["down"] @ x), x, wanted)


def draw(in_features, out_features):
    """An input, and a direction of length 1."""
    return torch.randn(in_features), torch.nn.functional.normalize(torch.randn(out_features), dim=0)


def plan(method, start, in_features, out_features, rank=None, options=None, one_hot=False):
    chosen = adapter_options(method, start, rank, 16, options=options)
    return plan_layer(chosen, in_features, out_features, "q", one_hot=one_hot)


# method, start, options: of those that say that LoRA's alpha and rate hold
RECIPES = [
    ("crossed", "lora_step", {}),
    ("tucker", "core_zero", {}),
    ("tensor_train", "train_step", {}),
    ("tensor_ring", "train_step", {}),
    ("random_tucker", "random_network", {}),
    ("nola", "mixed_bases", {"bases": 64}),
    ("metatt", "shared_up_zero", {}),
    ("shared_diagonal", "shared_up_zero", {}),
    ("ffa_lora", "seeded", {}),
    ("sora", "open_gates", {}),
    ("lora_xs", "svd_step", {}),
    ("lora_sb", "gradient_step", {}),
    ("random_diagonal", "random_sides", {}),
    ("loldu", "lu", {}),
]


@pytest.mark.parametrize("one_hot", [False, True], ids=["linear", "embedding"])
@pytest.mark.parametrize("method, start, options", RECIPES)
def test_the_first_step_is_loras(method, start, options, one_hot):
    planned, ratios = plan(method, start, 1024, 192, None, options, one_hot), []
    for seed in range(6):
        x, wanted = draw(1024, 192)
        if one_hot:
            x = torch.nn.functional.one_hot(torch.tensor(100 * seed + 300), 1024).float()
        seen = Seen(*torch.randn(2, 192, 1024), seed=seed)
        trained, frozen = planned.initialize(seen)
        scaled = functools.partial(scaled_output, planned, frozen)
        ratios.append(first_step(trained, scaled, x, wanted) / loras_first_step(x, wanted, one_hot))
    assert 0.5 < sum(ratios) / len(ratios) < 2.5


@pytest.mark.parametrize("in_features, out_features, rank, options", CASES)
def test_the_first_step_is_loras_from_a_model_as_it_is(in_features, out_features, rank, options):
    planned = plan("ndlinear", "lora_step", in_features, out_features, rank, options)
    x, wanted = draw(in_features, out_features)
    trained, frozen = planned.initialize()
    assert planned.anchor == "none" and torch.count_nonzero(planned.delta(trained, frozen)) == 0
    ours = first_step(trained, functools.partial(scaled_output, planned, frozen), x, wanted)
    assert 0.5 < ours / loras_first_step(x, wanted) < 2


@pytest.mark.parametrize("in_features, out_features, rank", CORES)
def test_the_first_step_of_a_core_is_loras(in_features, out_features, rank):
    planned = plan("inttune", "n_lora_step", in_features, out_features, rank)
    x, wanted = draw(in_features, out_features)
    trained, frozen = planned.initialize(Seen(weight=0.2 * torch.randn(out_features, in_features)))
    ours = first_step(trained, functools.partial(scaled_output, planned, frozen), x, wanted)
    assert 0.5 < ours / loras_first_step(x, wanted) < 2


@pytest.mark.parametrize("start", ["n_lora_step", "n_lora_pivots"])
def test_a_scaled_start_of_a_zero_weight_is_zero(start):
    _, frozen = plan("nlora", start, 24, 18).initialize(Seen(weight=torch.zeros(18, 24)))
    assert all(torch.count_nonzero(value) == 0 for value in frozen.values())


# out modes, in modes
KRONECKER = [((4, 5), (3, 6)), ((4, 5, 2), (3, 4, 6)), ((1, 7), (2, 3))]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("out_modes, in_modes", KRONECKER)
def test_a_kronecker_product_is_its_own_nearest(out_modes, in_modes, dtype):
    modes = [torch.randn(1, *shape, dtype=dtype) for shape in zip(out_modes, in_modes, strict=True)]
    weight = kronecker(modes)
    found = nearest_kronecker(weight, out_modes, in_modes)
    assert [mode.norm().item() for mode in found] == pytest.approx([1.0] * len(modes))
    torch.testing.assert_close(abs(kronecker(found)) * weight.norm().float(), abs(weight).float())


@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-6), (torch.float32, 1e-4)], ids=str)
def test_the_largest_singular_vectors_are_those_of_an_svd_with_signs_that_are_fixed(dtype, tolerance):
    left, right = torch.linalg.qr(torch.randn(30, 12)).Q, torch.linalg.qr(torch.randn(12, 12)).Q
    matrix = (left * torch.logspace(2, -9, 12) @ right.T).to(dtype)
    found_left, values, found_right = largest_singular_vectors(matrix, 3)
    product = found_left.T * values @ found_right
    expected_left, expected_values, expected_right = torch.linalg.svd(matrix, full_matrices=False)
    expected = expected_left[:, :3] * expected_values[:3] @ expected_right[:3]
    torch.testing.assert_close(values, expected_values[:3], rtol=tolerance, atol=0)
    torch.testing.assert_close(product, expected, rtol=0, atol=100 * tolerance)
    assert (found_right.sum(dim=1) >= 0).all()


def test_several_terms_are_the_largest_singular_vectors():
    # Van Loan and Pitsianis: the nearest sum of products is the truncated SVD of the rearranged weight
    left, right = torch.linalg.qr(torch.randn(12, 3)).Q.T, torch.linalg.qr(torch.randn(30, 3)).Q.T
    sizes = torch.tensor([100.0, 10.0, 1.0])
    weight = kronecker([(left * sizes[:, None]).view(3, 4, 3), right.view(3, 5, 6)])
    first, second = nearest_kronecker(weight, (4, 5), (3, 6), terms=2)
    torch.testing.assert_close((first.flatten(1) @ left.T).abs(), torch.eye(2, 3), atol=1e-4, rtol=0)
    torch.testing.assert_close((second.flatten(1) @ right.T).abs(), torch.eye(2, 3), atol=1e-4, rtol=0)


def test_a_kronecker_start_survives_a_load_in_bfloat16():
    # it is recomputed at load: where singular values lie close, a converged SVD would turn with the rounding
    planned, weight = plan("ndlinear", "kronecker", 96, 64, 4), torch.randn(64, 96)
    assert planned.recomputed and planned.anchor == "snapshot"
    again = planned.initialize(Seen(weight=weight.bfloat16()))[1]
    for name, start in planned.initialize(Seen(weight=weight))[1].items():
        assert (again[name] - start).norm() < 0.02 * start.norm()


@pytest.mark.parametrize("num_modes", [2, 3])
def test_every_mode_of_a_kronecker_start_has_a_gradient_at_once(num_modes):
    planned = plan("ndlinear", "kronecker", 24, 18, 2, {"num_modes": num_modes})
    trained, frozen = planned.initialize(Seen(weight=torch.randn(18, 24)))
    leaves = {name: value.requires_grad_() for name, value in trained.items()}
    y = apply(planned, leaves, frozen, torch.randn(5, 24))
    assert torch.count_nonzero(y) == 0
    y.sum().backward()
    assert all(value.grad.abs().sum() > 0 for value in leaves.values())


def test_pivots_are_the_longest_of_what_is_left():
    # QR with column pivoting: column 5 is the longest, 2 is twice its direction and so nothing is left of it
    directions = torch.linalg.qr(torch.randn(20, 6, dtype=torch.float64)).Q
    matrix = directions * torch.tensor([1e-3, 1.0, 0.0, 1e-2, 1e-1, 100.0], dtype=torch.float64)
    matrix[:, 2] = 0.5 * matrix[:, 5]
    assert pivot_columns(matrix, 4).tolist() == [5, 1, 4, 3]


def test_pivots_are_saved_for_rounding_may_change_them():
    planned, weight = plan("nlora", "n_lora_pivots", 24, 18, 4), torch.randn(18, 24)
    _, frozen = planned.initialize(Seen(weight=weight))
    assert planned.anchor == "snapshot" and not planned.recomputed
    assert planned.num_saved == planned.num_parameters + planned.count_own(planned.frozen)
    rows, columns = pivot_columns(weight.T, 4), pivot_columns(weight, 4)
    slices = {"down": weight[rows], "core": weight[rows][:, columns], "up": weight[:, columns]}
    for name, value in slices.items():  # up to the scale
        torch.testing.assert_close(frozen[name] / frozen[name].norm(), value / value.norm())


@pytest.mark.parametrize("method", ["slora", "nlora"])
def test_n_lora_takes_the_references_slices(method):
    # https://github.com/TracyGuo2001/NLoRA nlora_init: A = W[:r, :], B = W[:, :r], N = W[:r, :r]
    chosen = adapter_options(method, init_lora_weights="n_lora", anchor="none", rank=4)
    weight = torch.randn(18, 24, dtype=torch.float64)
    trained, frozen = plan_layer(chosen, 24, 18, "q").initialize(Seen(weight=weight))
    assert not frozen
    expected = {"down": weight[:4, :], "core": weight[:4, :4], "up": weight[:, :4]}
    torch.testing.assert_close(trained, expected, rtol=0, atol=0)


@pytest.mark.parametrize("shape", [(18, 24), (24, 18)], ids=str)
def test_mica_takes_the_smallest_singular_vectors(shape):
    # as peft/tuners/lora/layer.py `mica_init`: the last ones of a thin SVD, where out > in no vectors of the null space
    weight = torch.randn(shape)
    _, frozen = plan("mica", None, shape[1], shape[0], 4).initialize(Seen(weight))
    expected = torch.linalg.svd(weight, full_matrices=False)[0][:, -4:].flip(1)
    torch.testing.assert_close(frozen["up"].abs(), expected.abs(), rtol=1e-3, atol=1e-4)
    with pytest.raises(NdLoraValueError, match="allows at most r=18 .* r=19"):
        plan("mica", None, shape[1], shape[0], 19)


def test_what_a_saved_adapter_of_an_embedding_makes_again_is_as_long_as_of_a_linear_layer():
    # version 0.1.0 made it so, and its adapters hold the changes alone
    weight = torch.randn(18, 24)
    frozen = [
        plan("nlora", None, 24, 18, 4, one_hot=one_hot).initialize(Seen(weight))[1]
        for one_hot in (False, True)
    ]
    torch.testing.assert_close(*frozen, rtol=0, atol=0)


# method, start, options; the most that r may be on a layer of 6 x 8
LARGEST = [
    ("ndlinear", "kronecker", {"in_modes": (1, 8), "out_modes": (2, 3)}, 2),
    ("nlora", "n_lora", {}, 6),
    ("slora", "n_lora_step", {}, 6),
    ("inttune", "n_lora_pivots", {}, 6),
]


@pytest.mark.parametrize("method, start, options, largest", LARGEST)
def test_a_rank_that_the_weight_does_not_have(method, start, options, largest):
    plan(method, start, 8, 6, largest, options).initialize(Seen(weight=torch.randn(6, 8)))
    with pytest.raises(
        NdLoraValueError, match=f"'{start}' allows at most r={largest} on layer 'q'.*r={largest + 1}"
    ):
        plan(method, start, 8, 6, largest + 1, options)


# factor -> the bound of its uniform values
BOUNDS = [
    ("slora", {}, False, {"down": 24**-0.5, "core": 4**-0.5, "up": 4**-0.5}),
    ("slora", {}, True, {"down": 1.0, "core": 4**-0.5, "up": 4**-0.5}),
    ("ndlinear", {}, False, {"mode_1": 4**-0.5, "mode_2": 6**-0.5}),
    ("ndlinear", {}, True, {"mode_1": 1.0, "mode_2": 1.0}),
    (
        "einsum", {"equation": "out r, r s, s in -> out in"}, False,
        {"factor_1": 4**-0.5, "factor_2": 4**-0.5, "factor_3": 24**-0.5},
    ),
    (
        "einsum", {"equation": "out r, r s, s in -> out in"}, True,
        {"factor_1": 4**-0.5, "factor_2": 4**-0.5, "factor_3": 1.0},
    ),
]  # fmt: skip


@pytest.mark.parametrize("method, options, one_hot, bounds", BOUNDS)
def test_random_values_keep_lengths(method, options, one_hot, bounds):
    chosen = adapter_options(method, False, 4, options=options)
    trained, _ = plan_layer(chosen, 24, 180, "q", one_hot=one_hot).initialize()
    for name, bound in bounds.items():
        assert 0.7 * bound < trained[name].abs().max() <= bound
