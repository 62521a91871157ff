"""The starts that are ours: what they are to be, and that a LoRA recipe's learning rate holds."""

import pytest
import torch

from ndlora_plugins.adapter import AdapterOptions, plan_layer
from ndlora_plugins.contraction import kronecker
from ndlora_plugins.errors import NdLoraValueError
from ndlora_plugins.initializers import nearest_kronecker, pivot_columns

# in, out, options
CASES = [
    (576, 576, {"rank": 1}),
    (576, 1536, {"rank": 1}),
    (1536, 576, {"rank": 1}),
    (576, 192, {"rank": 4}),
    (576, 576, {"rank": 4, "num_modes": 3}),
    (1024, 4096, {"rank": 2, "num_modes": 4}),
    (576, 576, {"rank": 1, "crossed_modes": 4}),
    (576, 1536, {"rank": 4, "crossed_modes": 4}),
    (2048, 1024, {"rank": 1, "crossed_modes": 8}),
    (576, 1536, {"rank": 2, "crossed_modes": 4, "num_modes": 3}),
    (576, 576, {"rank": 1, "in_modes": (12, 48), "out_modes": (12, 48)}),
]


# in, out, rank
CORES = [(576, 576, 8), (576, 576, 64), (576, 1536, 32), (1536, 576, 128), (576, 192, 64)]


def first_step(trained, answer, x, wanted):
    """How far the output for `x` moves along `wanted` (of length 1) when Adam has made one step of rate 1."""
    leaves = {name: value.requires_grad_() for name, value in trained.items()}
    before = answer(leaves, x)
    (before * wanted).sum().backward()
    with torch.no_grad():
        after = answer({name: value + value.grad.sign() for name, value in leaves.items()}, x)
        return ((after - before) * wanted).sum().item()


def loras_first_step(x, wanted):
    """The same for LoRA r=8 with lora_alpha=16."""
    down = torch.nn.init.kaiming_uniform_(torch.empty(8, len(x)), a=5**0.5)
    factors = {"down": down, "up": torch.zeros(len(wanted), 8)}
    return first_step(factors, lambda factors, x: 2 * factors["up"] @ (factors["down"] @ x), x, wanted)


def draw(in_features, out_features):
    """An input, and a direction of length 1."""
    return torch.randn(in_features), torch.nn.functional.normalize(torch.randn(out_features), dim=0)


@pytest.mark.parametrize("in_features, out_features, options", CASES)
def test_the_first_step_is_loras(in_features, out_features, options):
    plan = plan_layer(
        AdapterOptions(init_lora_weights="lora_step", **options), in_features, out_features, "q"
    )
    x, wanted = draw(in_features, out_features)
    trained, frozen = plan.initialize(None)
    ours = first_step(trained, lambda factors, x: plan.scaling * plan.apply(factors, frozen, x), x, wanted)
    assert 0.5 < ours / loras_first_step(x, wanted) < 2


@pytest.mark.parametrize("in_features, out_features, rank", CORES)
def test_the_first_step_of_a_core_is_loras(in_features, out_features, rank):
    options = AdapterOptions(method="inttune", init_lora_weights="n_lora_step", rank=rank)
    plan = plan_layer(options, in_features, out_features, "q")
    x, wanted = draw(in_features, out_features)
    trained, frozen = plan.initialize(0.2 * torch.randn(out_features, in_features))
    ours = first_step(trained, lambda factors, x: plan.scaling * plan.apply(factors, frozen, x), x, wanted)
    assert 0.5 < ours / loras_first_step(x, wanted) < 2


@pytest.mark.parametrize("start", ["n_lora_step", "n_lora_pivots"])
def test_a_scaled_start_of_a_zero_weight_is_zero(start):
    plan = plan_layer(AdapterOptions(method="nlora", init_lora_weights=start), 24, 18, "q")
    _, frozen = plan.initialize(torch.zeros(18, 24))
    assert all(torch.count_nonzero(value) == 0 for value in frozen.values())


@pytest.mark.parametrize("in_features, out_features, options", CASES)
def test_the_model_starts_as_it_is(in_features, out_features, options):
    plan = plan_layer(
        AdapterOptions(init_lora_weights="lora_step", **options), in_features, out_features, "q"
    )
    assert plan.anchor == "none"
    assert torch.count_nonzero(plan.delta(*plan.initialize(None))) == 0


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
    plan = plan_layer(AdapterOptions(method="ndlinear", init_lora_weights="kronecker", rank=4), 96, 64, "q")
    weight = torch.randn(64, 96)
    assert plan.recomputed and plan.anchor == "snapshot"
    for name, start in plan.initialize(weight)[1].items():
        again = plan.initialize(weight.bfloat16())[1][name]
        assert (again - start).norm() < 0.02 * start.norm()


@pytest.mark.parametrize("num_modes", [2, 3])
def test_every_mode_of_a_kronecker_start_has_a_gradient_at_once(num_modes):
    options = AdapterOptions(method="ndlinear", init_lora_weights="kronecker", rank=2, num_modes=num_modes)
    plan = plan_layer(options, 24, 18, "q")
    trained, frozen = plan.initialize(torch.randn(18, 24))
    leaves = {name: value.requires_grad_() for name, value in trained.items()}
    y = plan.apply(leaves, frozen, torch.randn(5, 24))
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
    plan = plan_layer(AdapterOptions(method="nlora", init_lora_weights="n_lora_pivots", rank=4), 24, 18, "q")
    weight = torch.randn(18, 24)
    _, frozen = plan.initialize(weight)
    assert plan.anchor == "snapshot" and not plan.recomputed
    assert plan.num_saved == plan.num_parameters + plan.num_frozen
    rows, columns = pivot_columns(weight.T, 4), pivot_columns(weight, 4)
    slices = {"down": weight[rows], "core": weight[rows][:, columns], "up": weight[:, columns]}
    for name, value in slices.items():  # up to the scale
        torch.testing.assert_close(frozen[name] / frozen[name].norm(), value / value.norm())


def test_more_kronecker_terms_than_there_are():
    options = AdapterOptions(
        method="ndlinear", init_lora_weights="kronecker", rank=3, in_modes=(1, 6), out_modes=(2, 3)
    )
    with pytest.raises(NdLoraValueError, match="'kronecker' allows at most r=2 on layer 'q'"):
        plan_layer(options, 6, 6, "q")
