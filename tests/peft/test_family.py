"""The family's updates are what others make of the same numbers: PEFT's tuners, dense products, papers' formulas."""

import json
from collections import OrderedDict

import pytest
import torch
from peft import LoraConfig, MissConfig, PeftModel, PsoftConfig, VeraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from ndlora_plugins import NdLoraConfig
from ndlora_plugins.adapter import plan_layer
from ndlora_plugins.errors import NdLoraValueError
from ndlora_plugins.options import adapter_options
from ndlora_plugins.registry import methods
from ndlora_plugins.starts import Seen

IN, OUT, RANK, LAYER = 24, 18, 4, "model.layers.3.q"
# what a number of a shared factor counts (ndlora_plugins/methods/shared.py)
STEP = 3.0


def planned(method, largest=None, rank=RANK, options=None, start=None):
    chosen = adapter_options(method, start, rank=rank, options=options)
    return plan_layer(chosen, IN, OUT, LAYER, largest=largest)


def moved(plan, start=None):
    """The weight it starts from, and every factor after some training, in float64."""
    torch.manual_seed(0)
    weight, gradient = torch.randn(2, OUT, IN)
    trained, frozen = plan.initialize(Seen(weight, gradient, seed=1))
    trained = {name: value + torch.randn(value.shape) / 4 for name, value in trained.items()}
    factors = {
        name: value.double() if value.is_floating_point() else value
        for name, value in (trained | frozen).items()
    }
    return weight.double(), factors


def separated():
    """A matrix whose singular values lie far apart: iterations find the vectors of close ones roughly, on purpose."""
    left, right = (torch.linalg.qr(torch.randn(size, size)).Q for size in (OUT, IN))
    return left * torch.logspace(1, -6, OUT) @ right[:OUT]


def delta(plan, factors):
    """dW of all factors as they are, without the anchor and the scaling."""
    return plan.structure.delta(factors)


def pefts(config, weight):
    """PEFT's layer around this weight, its output for the unit vectors less the weight: dW."""
    model = nn.Sequential()
    model.add_module("q", nn.Linear(IN, OUT, bias=False))
    model.q.weight.data = weight.clone()
    model = get_peft_model(model.to(weight.dtype), config, autocast_adapter_dtype=False)
    return model.base_model.model.q, lambda: model(torch.eye(IN, dtype=weight.dtype)).T.detach() - weight


class Sizes(TorchDispatchMode):
    """How many numbers each tensor holds that is made in the meantime, but for views of one that was there."""

    def __init__(self, known):
        super().__init__()
        self.known, self.found = known.untyped_storage().data_ptr(), {}

    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        made = function(*arguments, **(options or {}))
        for tensor in made if isinstance(made, tuple) else [made]:
            if isinstance(tensor, torch.Tensor) and tensor.untyped_storage().data_ptr() != self.known:
                self.found[tensor.numel()] = function
        return made


@pytest.mark.parametrize("method", methods())
def test_a_training_step_of_a_linear_layer_forms_no_update_of_the_weight(method, fields_of):
    model = nn.Sequential()
    model.add_module("q", nn.Linear(IN, OUT, bias=False))
    config = NdLoraConfig(**{**fields_of(method), "r": 2, "target_modules": ["q"]})
    model = get_peft_model(model, config)
    with Sizes(model.get_submodule("base_model.model.q").base_layer.weight) as sizes:
        model(torch.randn(5, IN)).sum().backward()
    assert IN * OUT not in sizes.found


def test_lora_xs_is_pefts_psoft():
    plan, weight = planned("lora_xs", start="lora_xs"), separated()
    trained, frozen = plan.initialize(Seen(weight))
    factors = {**frozen, "core": torch.randn(RANK, RANK)}
    layer, update = pefts(
        PsoftConfig(
            target_modules=["q"],
            r=RANK,
            psoft_alpha=RANK,
            psoft_orth=False,
            psoft_mag_a=False,
            psoft_mag_b=False,
        ),
        weight,
    )
    values = torch.linalg.svdvals(weight)[:RANK, None]
    # N = S (R - I) S^-1; the signs of singular vectors are each one's own, so R is turned by them
    signs = torch.sign((layer._psoft_A_cache["default"] * factors["down"]).sum(1))
    rotation = torch.eye(RANK) + factors["core"] * values.T / values
    layer.psoft_R["default"].weight.data = signs[:, None] * rotation * signs
    torch.testing.assert_close(delta(plan, factors), update(), atol=1e-3, rtol=1e-3)


def test_tiled_is_pefts_miss():
    plan = planned("tiled")
    weight, factors = moved(plan)
    layer, update = pefts(MissConfig(target_modules=["q"], r=RANK), weight)
    layer.miss_block["default"].data = factors["up"].T.contiguous()
    torch.testing.assert_close(delta(plan, factors), update())


# method -> of which of LoRA's matrices which factor stays
HALVES = {"ffa_lora": ("lora_A", "down"), "mica": ("lora_B", "up"), "sora": (None, None)}


@pytest.mark.parametrize("method", HALVES)
def test_a_lora_of_which_one_side_stays(method):
    plan = planned(method)
    weight, factors = moved(plan)
    layer, update = pefts(LoraConfig(target_modules=["q"], r=RANK, lora_alpha=RANK), weight)
    layer.lora_A["default"].weight.data = factors["down"] * factors.get("core", torch.ones(RANK))[:, None]
    layer.lora_B["default"].weight.data = factors["up"]
    torch.testing.assert_close(delta(plan, factors), update())
    stays = HALVES[method][1]
    assert [factor.name for factor in plan.frozen] == ([stays] if stays else [])


# method -> its sides, and what a number of each of its factors counts
DIAGONALS = {"shared_diagonal": ("side_in", "side_out", STEP), "random_diagonal": ("down", "up", 1.0)}


@pytest.mark.parametrize("method", DIAGONALS)
def test_a_diagonal_between_sides_is_pefts_vera_without_its_second_vector(method):
    side_in, side_out, step = DIAGONALS[method]
    plan = planned(method)
    weight, factors = moved(plan)
    layer, update = pefts(VeraConfig(target_modules=["q"], r=RANK), weight)
    layer.vera_A["default"] = factors[side_in] * step
    layer.vera_B["default"] = factors[side_out] * step
    layer.vera_lambda_d["default"].data = factors["core"] * step
    layer.vera_lambda_b["default"].data.fill_(1)
    torch.testing.assert_close(delta(plan, factors), update())


def test_a_group_of_one_layer_is_slora():
    shared, own = planned("shared_core"), planned("slora")
    _, factors = moved(shared)
    as_own = {"down": "side_in", "core": "core", "up": "side_out"}
    expected = delta(own, {name: STEP * factors[other] for name, other in as_own.items()})
    assert torch.equal(delta(shared, factors), expected)


def test_shared_sides_are_cut_to_size():
    wide = planned("shared_core", largest=(2 * IN, 3 * OUT))
    _, factors = moved(wide)
    cut = {**factors, "side_in": factors["side_in"][:, :IN], "side_out": factors["side_out"][:OUT]}
    assert torch.equal(delta(wide, factors), delta(planned("shared_core"), cut))


# core -> the product of the four factors, arXiv 2506.09105 eq. 6 and arXiv 2410.04060 eq. 4
TRAINS = {
    "full": "or,rs,st,ti->oi",
    "diagonal": "or,r,r,ri->oi",
}


@pytest.mark.parametrize("core", TRAINS)
def test_metatt_is_the_product_of_its_four_factors(core):
    plan = planned("metatt", options={"core": core})
    _, factors = moved(plan)
    parts = [STEP * factors[name] for name in ("side_out", "layer", "kind", "side_in")]
    torch.testing.assert_close(delta(plan, factors), torch.einsum(TRAINS[core], *parts))


def test_a_shared_mode_is_a_mode():
    plan, own = planned("shared_crossed", rank=2), planned("crossed", rank=2)
    _, factors = moved(plan)
    assert torch.equal(delta(plan, factors), delta(own, factors))


# fields -> into how many modes a train splits
MODES_OF_A_TRAIN = [({}, 3), ({"num_modes": 2}, 2), ({"options": {"num_modes": 4}}, 4)]


@pytest.mark.parametrize("fields, modes", MODES_OF_A_TRAIN)
def test_the_field_num_modes_is_heard_where_the_methods_default_is_another(fields, modes):
    config = NdLoraConfig(method="tensor_train", **fields)
    assert (config.num_modes, config.resolved().options.num_modes) == (modes, modes)


def test_a_train_of_two_modes_is_a_sum_of_kronecker_products():
    plan = planned("tensor_train", options={"num_modes": 2})
    _, factors = moved(plan)
    # (out_1, in_1, bond), (bond, out_2, in_2)
    first, second = factors["train_1"].movedim(2, 0), factors["train_2"]
    expected = sum(torch.kron(a, b) for a, b in zip(first, second, strict=True))
    torch.testing.assert_close(delta(plan, factors), expected)


def test_a_ring_is_its_trace():
    plan = planned("tensor_ring", rank=2)
    _, f = moved(plan)
    # arXiv 2501.08727, eq. 5, with two modes a side
    expected = torch.einsum("zaw,wby,ycx,xdz->abcd", *(f[f"train_{k}"] for k in (1, 2, 3, 4)))
    torch.testing.assert_close(delta(plan, f), expected.reshape(OUT, IN))


def test_tucker_on_a_convolution_is_a_dense_tensordot():
    chosen = adapter_options("tucker", rank=RANK)
    plan = plan_layer(chosen, IN * 9, OUT, LAYER, trailing=(3, 3))
    factors = {factor.name: torch.randn(factor.shape, dtype=torch.float64) for factor in plan.trained}
    # arXiv 2405.14739, eq. 4: the core times a matrix along each of its axes
    dense = factors["core"]
    for name in ("axis_out", "axis_in", "kernel_1", "kernel_2"):
        matrix = factors[name] if name != "axis_in" else factors[name].T
        dense = torch.tensordot(dense, matrix, dims=([0], [1]))
    torch.testing.assert_close(delta(plan, factors), dense.reshape(OUT, IN * 9))


def test_a_random_network_is_its_scaled_contraction():
    plan = planned("random_tucker", rank=2)
    _, f = moved(plan)
    sides = [f[f"scale_{axis}"][:, None] * f[f"random_{axis}"] for axis in ("out1", "out2", "in1", "in2")]
    expected = torch.einsum("ap,bq,cr,ds,pqrs->abcd", *sides, f["random_core"])
    torch.testing.assert_close(delta(plan, f), expected.reshape(OUT, IN))


def test_nola_is_the_sum_of_its_bases():
    plan = planned("nola", options={"bases": 5})
    _, f = moved(plan)
    down = sum(mix * base for mix, base in zip(f["down_mix"], f["down_bases"], strict=True)) / (5 * IN) ** 0.5
    up = sum(mix * base for mix, base in zip(f["up_mix"], f["up_bases"], strict=True)) * (3 * OUT) ** 0.5 / 5
    torch.testing.assert_close(delta(plan, f), up @ down)


# method -> which index of dW the chosen features are
CHOSEN = {"rows": 0, "columns": 1}


# what becomes of the stored indices
WRONG = {
    "above": lambda indices: indices + OUT,
    "below zero": lambda indices: indices - OUT,
    "floating": lambda indices: indices.float(),
}


def base():
    return nn.Sequential(OrderedDict(q=nn.Linear(IN, OUT)))


@pytest.mark.parametrize("method", ["rows", "ffa_lora", "nola"])
def test_what_a_seed_makes_otherwise_than_in_training_is_not_loaded(method, tmp_path, fields_of):
    config = NdLoraConfig(**{**fields_of(method), "target_modules": ["q"], "random_seed": 1})
    get_peft_model(base(), config).save_pretrained(tmp_path)
    file = tmp_path / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "random_seed": 2}))
    model = base()
    modules = list(model.modules())
    with pytest.raises(
        NdLoraValueError, match=r"is made again at load, and comes out as another one .* save_frozen=True"
    ):
        PeftModel.from_pretrained(model, tmp_path)
    assert list(model.modules()) == modules


@pytest.mark.parametrize("wrong", WRONG)
def test_indices_out_of_range_are_not_loaded(wrong, tmp_path):
    config = NdLoraConfig(method="rows", r=2, target_modules=["q"], save_frozen=True)
    get_peft_model(base(), config).save_pretrained(tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    tensors = load_file(file)
    name = "base_model.model.q.ndlora_frozen.rows"
    save_file({**tensors, name: WRONG[wrong](tensors[name])}, file, {"format": "pt"})
    with pytest.raises(NdLoraValueError, match=f"must be of dtype int64, from 0 to below {OUT}"):
        PeftModel.from_pretrained(base(), tmp_path)


@pytest.mark.parametrize("method", CHOSEN)
def test_chosen_features_are_a_dense_update_with_a_mask(method):
    plan = planned(method)
    _, factors = moved(plan)
    found = delta(plan, factors)
    chosen = factors[method].flatten().tolist()
    rest = [k for k in range(found.shape[CHOSEN[method]]) if k not in chosen]
    side = factors["down"] if method == "rows" else factors["up"]
    assert torch.equal(found.index_select(CHOSEN[method], torch.tensor(chosen)), side)
    assert not found.index_select(CHOSEN[method], torch.tensor(rest)).any()


# start -> which rows or columns it takes of the weight, or of the gradient
def largest(matrix, axis):
    return matrix.norm(dim=1 - axis).topk(RANK).indices.sort().values


CHOICES = {
    "weight_rows": ("rows", 0, 0),
    "gradient_rows": ("rows", 1, 0),
    "weight_columns": ("columns", 0, 1),
    "gradient_columns": ("columns", 1, 1),
}


@pytest.mark.parametrize("start", CHOICES)
def test_the_largest_features_are_chosen(start):
    method, which, axis = CHOICES[start]
    seen = torch.randn(2, OUT, IN)
    trained, frozen = planned(method, start=start).initialize(Seen(*seen))
    assert frozen[method].flatten().tolist() == largest(seen[which], axis).tolist()


def test_lora_sb_begins_with_a_step_by_the_sign():
    plan = planned("lora_sb", rank=OUT, options={"first_step": 1e-2})
    weight, gradient = torch.randn(2, OUT, IN)
    trained, frozen = plan.initialize(Seen(weight, gradient))
    # arXiv 2411.19557, algorithm 1, at full rank
    torch.testing.assert_close(delta(plan, trained | frozen), -1e-2 * gradient.sign(), atol=1e-6, rtol=1e-4)


def test_lora_sb_without_the_sign_begins_with_the_best_of_its_rank_as_long():
    plan = planned("lora_sb", options={"first_step": 1e-2, "sign": False})
    gradient = separated()
    trained, frozen = plan.initialize(Seen(None, gradient))
    left, values, right = torch.linalg.svd(-1e-2 * gradient * (OUT * IN) ** 0.5 / gradient.norm())
    expected = left[:, :RANK] * values[:RANK] @ right[:RANK]
    torch.testing.assert_close(delta(plan, trained | frozen), expected, atol=1e-5, rtol=1e-3)


# method, start -> the sides of the weight's decomposition, up to the scale of each rank
def lu_sides(weight):
    permutation, lower, upper = torch.linalg.lu(weight)
    return upper[:RANK], permutation @ lower[:, :RANK]


def svd_sides(weight):
    left, _, right = torch.linalg.svd(weight, full_matrices=False)
    return right[:RANK], left[:, :RANK]


SIDES = {("svfit", "svd_step"): svd_sides, ("loldu", "lu"): lu_sides, ("lora_xs", "lora_xs"): svd_sides}


@pytest.mark.parametrize("method, start", SIDES)
def test_sides_are_those_of_the_decomposition(method, start):
    weight = separated()
    _, frozen = planned(method, start=start).initialize(Seen(weight))
    down, up = SIDES[method, start](weight)
    for found, expected in ((frozen["down"], down), (frozen["up"].T, up.T)):
        cosines = nn.functional.cosine_similarity(found, expected, dim=1).abs()
        torch.testing.assert_close(cosines, torch.ones(RANK), atol=1e-4, rtol=0)


def test_mica_keeps_the_smallest_singular_vectors():
    weight = torch.randn(OUT, IN)
    _, frozen = planned("mica").initialize(Seen(weight))
    smallest = torch.linalg.svd(weight)[0][:, -RANK:]
    # the same space: its projection leaves them as they are
    torch.testing.assert_close(smallest @ (smallest.T @ frozen["up"]), frozen["up"], atol=1e-4, rtol=1e-3)
