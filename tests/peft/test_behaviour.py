"""What PEFT asks of a tuner beyond the forward: mixed batches, sums of adapters, what else is trained.

Each test runs for every method; the adapters are random and not zero.
"""

import copy
from collections import OrderedDict
from dataclasses import replace

import pytest
import torch
from peft import PeftModel, get_peft_model, inject_adapter_in_model
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from peft.utils import merge_utils
from representative import REPRESENTATIVE
from torch import nn
from transformers import (
    RobertaConfig,
    RobertaForQuestionAnswering,
    RobertaForSequenceClassification,
    RobertaForTokenClassification,
)

from ndlora_plugins import NdLoraConfig
from ndlora_plugins.errors import NdLoraValueError
from ndlora_plugins.registry import methods

# options of a second adapter on the same layers
OTHERS = {
    "same": {},
    "higher rank": {"r": 5, "lora_alpha": 3},
    "rank pattern": {"rank_pattern": {"layers.1.self_attn.q_proj": 2}},
}
# starts that are subtracted where the method has one: the effective rank is then twice r, or the modes times r
ANCHORED = {
    "ndlinear": {"init_lora_weights": "ndlinear"},
    "crossed": {"init_lora_weights": "ndlinear"},
    "nlora": {"init_lora_weights": "n_lora"},
    "inttune": {"init_lora_weights": "n_lora"},
}

# without factors that layers share: those refuse a rank of one layer's own, and PEFT injects them by PeftModel alone
UNSHARED = [name for name in REPRESENTATIVE if methods()[name].value.shared is None]
SUMS = [
    *((name, other) for name in REPRESENTATIVE for other in ("same", "higher rank")),
    *((name, "rank pattern") for name in UNSHARED),
]

SAVES_BIASES = hasattr(BaseTuner, "_get_adapter_state_dict")


# whose whole model is compiled: factors of a layer's own, and shared ones beside them
WHOLE = ("crossed", "shared_core")
# a method of each structure, and of each way to share
COMPILED = ("crossed", "slora", "einsum", "columns", "shared_core", "metatt", "nola")


@pytest.fixture(params=REPRESENTATIVE)
def method(request):
    return request.param


@pytest.fixture
def config(method, fields_of):
    def make(anchored=False, **options):
        options = {"init_lora_weights": False, "r": 3, "target_modules": ["q_proj", "down_proj"], **options}
        if anchored:
            options |= {"anchor": "snapshot", **ANCHORED.get(method, {})}
        return NdLoraConfig(task_type="CAUSAL_LM", **{**fields_of(method), **options})

    return make


@pytest.fixture
def two_adapters(config, make_llama):
    """Adapters "one" and "two", and what the model says with none, one, and two."""

    def make(tokens, **options):
        model = get_peft_model(make_llama(), config(), "one")
        model.add_adapter("two", config(**options))
        model.eval()
        said = {}
        with torch.no_grad():
            with model.disable_adapter():
                said["__base__"] = model(tokens).logits
            for name in ("one", "two"):
                model.set_adapter(name)
                said[name] = model(tokens).logits
        return model, said

    return make


# --- several adapters in one batch


@pytest.mark.parametrize(
    "names", [["one", "two"], ["two", "__base__"], ["__base__", "__base__"], ["two", "two"]]
)
def test_each_sample_has_its_adapter(names, two_adapters, tokens):
    model, said = two_adapters(tokens, target_modules=["q_proj", "v_proj"])
    expected = torch.stack([said[name][index] for index, name in enumerate(names)])
    with torch.no_grad():
        torch.testing.assert_close(model(tokens, adapter_names=names).logits, expected, atol=1e-5, rtol=1e-5)


def test_beam_search_repeats_the_names(two_adapters, tokens):
    model, _ = two_adapters(tokens)
    options = {"max_new_tokens": 4, "num_beams": 3, "do_sample": False, "pad_token_id": 0}
    mixed = model.generate(input_ids=tokens, adapter_names=["one", "two"], **options)
    for index, name in enumerate(["one", "two"]):
        model.set_adapter(name)
        assert torch.equal(model.generate(input_ids=tokens, **options)[index], mixed[index])


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-4), (torch.bfloat16, 0.1)])
@pytest.mark.parametrize("anchored", [False, True])
def test_generation_sees_the_factors_as_they_are(
    config, method, anchored, dtype, tolerance, make_llama, shake, tokens
):
    model = get_peft_model(make_llama(dtype=dtype), config(anchored)).eval()

    def check():
        found = model.generate(
            input_ids=tokens,
            attention_mask=torch.ones_like(tokens),
            max_new_tokens=8,
            min_new_tokens=8,
            do_sample=False,
            pad_token_id=0,
            return_dict_in_generate=True,
            output_logits=True,
        )
        with torch.no_grad():
            expected = model(found.sequences).logits[:, tokens.shape[1] - 1 : -1]
        torch.testing.assert_close(
            torch.stack(found.logits, dim=1), expected.float(), atol=tolerance, rtol=tolerance
        )
        return expected

    before = check()
    shake(model, scale=0.3)
    assert not torch.equal(check(), before)
    for name, parameter in model.named_parameters():
        if "ndlora_factors" in name:
            parameter.data.mul_(0.5)  # unseen by autograd
    check()


def test_hooks_are_gone_after_an_error(two_adapters, tokens):
    model, _ = two_adapters(tokens)
    with pytest.raises(NdLoraValueError, match="same as the number of inputs, but got 3 and 2"):
        model(tokens, adapter_names=["one", "two", "one"])
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_bad_batches_are_refused(two_adapters, tokens):
    model, _ = two_adapters(tokens)
    with pytest.raises(NdLoraValueError, match=r"non-existing adapter\(s\): three. There are: one, two"):
        model(tokens, adapter_names=["one", "three"])
    model.merge_adapter(["one"])
    with pytest.raises(NdLoraValueError, match="merged adapters, please call `unmerge_adapter` first"):
        model(tokens, adapter_names=["one", "two"])
    model.unmerge_adapter()
    model.train()
    with pytest.raises(NdLoraValueError, match="in training mode"):
        model(tokens, adapter_names=["one", "two"])


# --- sums of adapters


def deltas(model, adapter):
    return {
        name: layer.get_delta_weight(adapter)
        for name, layer in model.named_modules()
        if isinstance(layer, BaseTunerLayer) and adapter in layer.ndlora_factors
    }


@pytest.mark.parametrize("method, other", SUMS)
@pytest.mark.parametrize("weights", [[1.0, 1.0], [0.5, -2.0]])
def test_the_sum_is_exact(other, weights, two_adapters, tokens, tmp_path, make_llama):
    model, _ = two_adapters(tokens, **OTHERS[other])
    model.add_weighted_adapter(["one", "two"], weights, "sum")
    one, two, found = (deltas(model, name) for name in ("one", "two", "sum"))
    assert found.keys() == one.keys() | two.keys()
    for name, delta in found.items():
        torch.testing.assert_close(
            delta, weights[0] * one[name] + weights[1] * two[name], atol=1e-5, rtol=1e-5
        )
    model.set_adapter("sum")
    model.save_pretrained(tmp_path, selected_adapters=["sum"])
    again = PeftModel.from_pretrained(make_llama(), tmp_path / "sum").eval()
    with torch.no_grad():
        torch.testing.assert_close(again(tokens).logits, model(tokens).logits, atol=1e-5, rtol=1e-5)


def test_the_sum_of_adapters_with_a_snapshot(method, config, make_llama, shake):
    model = get_peft_model(make_llama(), config(anchored=True), "one")
    model.add_adapter("two", config(anchored=True))
    model.set_requires_grad(["one", "two"])
    shake(model)
    model.add_weighted_adapter(["one", "two"], [0.5, 2.0], "sum")
    one, two, found = (deltas(model, name) for name in ("one", "two", "sum"))
    for name, delta in found.items():
        torch.testing.assert_close(delta, 0.5 * one[name] + 2.0 * two[name], atol=1e-5, rtol=1e-5)


def test_the_sum_covers_the_layers_of_both(two_adapters, tokens):
    model, _ = two_adapters(tokens, target_modules=["v_proj"])
    model.add_weighted_adapter(["one", "two"], [1.0, 1.0], "sum", combination_type="linear")
    assert deltas(model, "sum").keys() == deltas(model, "one").keys() | deltas(model, "two").keys()
    assert model.active_adapters == ["two"]


# adapters "one" and "two" -> the rank of their sum on a layer that both have
SPLITS = {
    "crossed, by the method's own option": (
        {"options": {"crossed_modes": 4}, "r": 2},
        {"options": {"crossed_modes": 4}},
        3,
    ),
    "crossed and by hand, by options": (
        {"options": {"crossed_modes": 4}, "target_modules": ["q_proj"]},
        {"options": {"in_modes": [4, 12], "out_modes": [12, 4]}, "target_modules": ["q_proj"]},
        2,
    ),
    "by options that fit one adapter's layers": (
        {"options": {"in_modes": [2, 24], "out_modes": [24, 2]}, "target_modules": ["q_proj"]},
        {"options": {"in_modes": [4, 12], "out_modes": [4, 6]}, "target_modules": ["v_proj"]},
        1,
    ),
    "crossed, both": ({"crossed_modes": 4, "r": 2}, {"crossed_modes": 4}, 3),
    "crossed in two sizes, on other layers": (
        {"crossed_modes": 4, "target_modules": ["q_proj"]},
        {"crossed_modes": 2, "target_modules": ["v_proj"]},
        1,
    ),
    "crossed and by hand": (
        {"crossed_modes": 4, "target_modules": ["q_proj"]},
        {"modes": {"in_modes": [4, 12], "out_modes": [12, 4]}, "target_modules": ["q_proj"]},
        2,
    ),
}


@pytest.mark.parametrize("case", SPLITS)
def test_sums_of_kronecker_products_keep_each_layers_modes(case, make_llama, shake, tmp_path):
    first, second, rank = SPLITS[case]
    model = get_peft_model(make_llama(), NdLoraConfig(**first), "one")
    model.add_adapter("two", NdLoraConfig(**second))
    model.set_requires_grad(["one", "two"])
    shake(model)
    model.add_weighted_adapter(["one", "two"], [0.5, 2.0], "sum")
    assert (model.peft_config["sum"].method, model.peft_config["sum"].r) == ("crossed", rank)
    model.save_pretrained(tmp_path, selected_adapters=["sum"])
    again = PeftModel.from_pretrained(make_llama(), tmp_path / "sum")
    one, two, found = (deltas(model, name) for name in ("one", "two", "sum"))
    for name, delta in found.items():
        expected = 0.5 * one.get(name, torch.zeros(())) + 2.0 * two.get(name, torch.zeros(()))
        torch.testing.assert_close(delta, expected, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(deltas(again, "default")[name], delta)


# combination type -> PEFT's function of the updates, and what it is given beside weights
COMBINATIONS = {
    "svd": (merge_utils.task_arithmetic, {}),
    "ties_svd": (merge_utils.ties, {"density": 0.5, "majority_sign_method": "frequency"}),
    "dare_linear_svd": (merge_utils.dare_linear, {"density": 0.5}),
    "dare_ties_svd": (merge_utils.dare_ties, {"density": 0.5, "majority_sign_method": "total"}),
    "magnitude_prune_svd": (merge_utils.magnitude_prune, {"density": 0.3}),
}


@pytest.mark.parametrize("combination", COMBINATIONS)
def test_updates_are_pruned_and_approximated_as_by_peft(
    combination, two_adapters, tokens, tmp_path, make_llama
):
    model, _ = two_adapters(tokens)
    reference, options = COMBINATIONS[combination]
    torch.manual_seed(5)
    one, two = deltas(model, "one"), deltas(model, "two")
    expected = {name: reference([one[name], two[name]], torch.tensor([0.5, -2.0]), **options) for name in one}
    torch.manual_seed(5)
    model.add_weighted_adapter(
        ["one", "two"], [0.5, -2.0], "sum", combination_type=combination, svd_rank=1000, **options
    )
    for name, delta in deltas(model, "sum").items():
        torch.testing.assert_close(delta, expected[name], atol=1e-4, rtol=1e-4)
    model.set_adapter("sum")
    model.save_pretrained(tmp_path, selected_adapters=["sum"])
    again = PeftModel.from_pretrained(make_llama(), tmp_path / "sum").eval()
    with torch.no_grad():
        torch.testing.assert_close(again(tokens).logits, model(tokens).logits, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("layer", ["embed_tokens", "q_proj"])
def test_the_approximation_is_the_best_of_its_rank(layer, config, make_llama):
    model = get_peft_model(make_llama(), config(target_modules=[layer]), "one")
    model.add_adapter("two", config(target_modules=[layer]))
    model.add_weighted_adapter(["one", "two"], [1.0, 1.0], "sum", combination_type="svd", svd_rank=2)
    one, two, found = (deltas(model, name) for name in ("one", "two", "sum"))
    for name, delta in found.items():
        lost = torch.linalg.svdvals(one[name] + two[name])[2:].norm()
        torch.testing.assert_close((one[name] + two[name] - delta).norm(), lost, atol=1e-5, rtol=1e-4)


# the tokens of the second adapter, where the first has [3, 5]; the union is a list or a dict as they are
@pytest.mark.parametrize("named", [False, True])
def test_trained_tokens_are_added_up(named, config, make_llama, shake, tokens):
    first, second = [3, 5], [5, 9]
    if named:
        first, second = {"embed_tokens": first}, {"embed_tokens": second}
    model = get_peft_model(make_llama(), config(trainable_token_indices=first), "one")
    model.add_adapter("two", config(trainable_token_indices=second))
    model.set_requires_grad(["one", "two"])
    shake(model)
    embedding = model.get_input_embeddings()
    rows = {}
    for name in ("one", "two"):
        model.set_adapter(name)
        rows[name] = embedding(tokens).detach() - embedding.original_module(tokens)
    model.add_weighted_adapter(["one", "two"], [0.5, -2.0], "sum")
    model.set_adapter("sum")
    found = embedding(tokens) - embedding.original_module(tokens)
    torch.testing.assert_close(found, 0.5 * rows["one"] - 2.0 * rows["two"], atol=1e-6, rtol=1e-5)


# what is asked for -> what the message says
REFUSED_SUMS = [
    ((["one"], [1.0, 1.0], "sum"), {}, "1 adapters and 2 weights"),
    ((["three"], [1.0], "sum"), {}, "Adapter three does not exist"),
    ((["one"], [1.0], "two"), {}, "an adapter 'two' already"),
    ((["one"], [1.0], "sum"), {"combination_type": "ties"}, "combination_type='ties': .*entry by entry"),
    ((["one"], [1.0], "sum"), {"combination_type": "ties_svd"}, "needs density"),
    ((["one"], [1.0], "sum"), {"density": 0.5}, "combination_type='cat' has no density: got density=0.5"),
    ((["one"], [1.0], "sum"), {"combination_type": "ties_svd", "density": 1.5}, "density=1.5: choose"),
    ((["one"], [1.0], "sum"), {"svd_rank": 4}, "svd_rank=4 with combination_type='cat'"),
    ((["one"], [1.0], "sum"), {"majority_sign_method": "none"}, "majority_sign_method='none'"),
    ((["one"], [1.0], "mode_1"), {}, "An adapter cannot be called 'mode_1'"),
]


@pytest.mark.parametrize("method", ["crossed"], indirect=True)
@pytest.mark.parametrize("arguments, options, message", REFUSED_SUMS)
def test_sums_that_cannot_be_are_refused(arguments, options, message, two_adapters, tokens):
    model, _ = two_adapters(tokens)
    with pytest.raises(NdLoraValueError, match=message):
        model.add_weighted_adapter(*arguments, **options)
    assert list(model.peft_config) == ["one", "two"]


def test_a_kronecker_product_says_nothing_of_the_rank_to_keep(make_llama):
    model = get_peft_model(make_llama(), NdLoraConfig(method="ndlinear", target_modules=["q_proj"]), "one")
    with pytest.raises(NdLoraValueError, match="'svd' on layer .*q_proj.*Give svd_rank"):
        model.add_weighted_adapter(["one"], [1.0], "sum", combination_type="svd")


def test_a_sum_of_two_structures_is_refused(make_llama):
    model = get_peft_model(make_llama(), NdLoraConfig(method="slora", target_modules=["q_proj"]), "one")
    model.add_adapter("two", NdLoraConfig(method="ndlinear", target_modules=["q_proj"]))
    with pytest.raises(NdLoraValueError, match=r"one \(slora\), two \(ndlinear\) on layer .*q_proj"):
        model.add_weighted_adapter(["one", "two"], [1.0, 1.0], "sum")


# --- what else is trained and saved


class Biased(nn.Module):
    def __init__(self):
        super().__init__()
        self.first = nn.Linear(12, 8)
        self.bias_first = nn.Linear(8, 6)

    def forward(self, x):
        return self.bias_first(self.first(x))


# bias option -> the biases that train when `first` alone has an adapter
BIASES = {
    "all": {"first.base_layer.bias", "bias_first.bias"},
    "ndlora_only": {"first.base_layer.bias"},
    "lora_only": {"first.base_layer.bias"},
}


@pytest.mark.skipif(not SAVES_BIASES, reason="peft 0.20 saves biases of its own tuner types only")
@pytest.mark.parametrize("bias", BIASES)
def test_biases_come_back(bias, method, fields_of, shake, tmp_path):
    torch.manual_seed(3)
    base, x = Biased(), torch.randn(2, 12)
    config = NdLoraConfig(**{**fields_of(method), "r": 2}, target_modules=["first"], bias=bias)
    model = shake(get_peft_model(copy.deepcopy(base), config))
    trained = {
        name.removeprefix("base_model.model.") for name, p in model.named_parameters() if p.requires_grad
    }
    assert {name for name in trained if "ndlora_" not in name} == BIASES[bias]
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path)
    torch.testing.assert_close(again(x), model(x), atol=1e-6, rtol=1e-6)


@pytest.mark.skipif(SAVES_BIASES, reason="peft 0.21 saves them")
def test_biases_that_would_be_lost_are_refused(method, fields_of):
    with pytest.raises(NdLoraValueError, match="bias='all': peft .* Upgrade to peft 0.21"):
        get_peft_model(
            Biased(), NdLoraConfig(**{**fields_of(method), "r": 2}, target_modules=["first"], bias="all")
        )


def test_tokens_and_whole_modules_survive_a_merge(config, make_llama, tokens, shake):
    options = {"trainable_token_indices": {"embed_tokens": [1, 5]}, "modules_to_save": ["lm_head"]}
    model = shake(get_peft_model(make_llama(tie_word_embeddings=False), config(**options))).eval()
    with torch.no_grad():
        before = model(tokens).logits
        merged = model.merge_and_unload()
        torch.testing.assert_close(merged(tokens).logits, before, atol=1e-4, rtol=1e-4)
    assert not any("ndlora" in name or "token_adapter" in name for name, _ in merged.named_modules())


# ensure_weight_tying, modules_to_save
@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`")
@pytest.mark.parametrize(
    "tied, modules",
    [(False, ["embed_tokens"]), (True, ["embed_tokens"]), (True, ["embed_tokens", "lm_head"])],
)
def test_tied_embeddings_stay_tied(tied, modules, config, make_llama):
    options = {"modules_to_save": modules, "ensure_weight_tying": tied}
    model = get_peft_model(make_llama(tie_word_embeddings=True), config(**options))
    embedding = model.get_input_embeddings().modules_to_save["default"].weight
    head = model.get_output_embeddings()
    head = head.modules_to_save["default"] if tied else head
    assert (head.weight is embedding) == tied


def test_an_adapter_saved_as_a_pickle_file_loads(config, make_llama, tokens, tmp_path):
    # PEFT loads it with weights_only=True, so that no code runs
    model = get_peft_model(make_llama(), config()).eval()
    model.save_pretrained(tmp_path, safe_serialization=False)
    assert (tmp_path / "adapter_model.bin").exists()
    again = PeftModel.from_pretrained(make_llama(), tmp_path)
    assert torch.equal(again(tokens).logits, model(tokens).logits)


def test_a_configuration_loads_without_tensors(config, tmp_path):
    config().save_pretrained(tmp_path)
    assert NdLoraConfig.from_pretrained(tmp_path).to_dict() == config().to_dict()


# --- the state of a model


def test_status(two_adapters, tokens):
    model, _ = two_adapters(tokens)
    status = model.get_model_status()
    assert status.available_adapters == ["one", "two"]
    assert status.active_adapters == ["two"] and status.enabled is True and status.merged_adapters == []
    assert status.adapter_model_type == "NdLoraModel" and status.peft_types == {
        "one": "NDLORA",
        "two": "NDLORA",
    }
    assert {layer.name.rpartition(".")[2] for layer in model.get_layer_status()} == {"q_proj", "down_proj"}


def test_scales(config, make_llama):
    model = get_peft_model(make_llama(), config(lora_alpha=6))
    layer = next(layer for layer in model.modules() if isinstance(layer, BaseTunerLayer))
    layer.scale_layer(3.0)
    assert layer.scaling["default"] == 6.0
    layer.unscale_layer(2.0)
    assert layer.scaling["default"] == 3.0
    layer.unscale_layer()
    assert layer.scaling["default"] == 2.0
    layer.set_scale("default", 0.5)
    assert layer.scaling["default"] == 1.0


def test_deleting_and_merging_in_turn(two_adapters, tokens):
    model, said = two_adapters(tokens)
    model.delete_adapter("two")
    with torch.no_grad():
        assert torch.equal(model(tokens).logits, said["one"]) and model.active_adapters == ["one"]
        torch.testing.assert_close(model.merge_and_unload()(tokens).logits, said["one"], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("method", UNSHARED)
def test_injected_without_a_peft_model(config, make_llama, tokens):
    wrapped = get_peft_model(make_llama(), config(random_seed=4))
    model = inject_adapter_in_model(config(random_seed=4), make_llama())
    assert torch.equal(model(tokens).logits, wrapped(tokens).logits)


@pytest.mark.parametrize("method", ["crossed", "shared_core"], indirect=True)
@pytest.mark.parametrize("targets", [["q_proj"], "all-linear", None])
def test_layer_indices(targets, config, make_llama, tokens, tmp_path):
    model = get_peft_model(make_llama(), config(target_modules=targets, layers_to_transform=[1]))
    adapted = deltas(model, "default")
    assert adapted and all(".layers.1." in name for name in adapted)
    model.save_pretrained(tmp_path)
    assert deltas(PeftModel.from_pretrained(make_llama(), tmp_path), "default").keys() == adapted.keys()


# task -> transformers' model, and the linear layers of its head, which PEFT trains in full
HEADS = {
    "SEQ_CLS": (RobertaForSequenceClassification, {"classifier.dense", "classifier.out_proj"}),
    "TOKEN_CLS": (RobertaForTokenClassification, {"classifier"}),
    "QUESTION_ANS": (RobertaForQuestionAnswering, {"qa_outputs"}),
}


@pytest.mark.parametrize("method", ["crossed"], indirect=True)
@pytest.mark.parametrize("task", HEADS)
def test_a_head_that_trains_in_full_gets_no_adapter(task, method, fields_of, tokens, shake, tmp_path):
    model_class, head = HEADS[task]
    sizes = {"vocab_size": 64, "hidden_size": 16, "intermediate_size": 32}
    base = model_class(RobertaConfig(num_hidden_layers=1, num_attention_heads=2, **sizes)).eval()
    linear = {name for name, layer in base.named_modules() if isinstance(layer, nn.Linear)}
    model = get_peft_model(
        copy.deepcopy(base), NdLoraConfig(**{**fields_of(method), "r": 2}, task_type=task)
    ).eval()
    assert {name.removeprefix("base_model.model.") for name in deltas(model, "default")} == linear - head
    shake(model).save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(base, tmp_path).eval()
    torch.testing.assert_close(again(tokens)[0], model(tokens)[0])


@pytest.mark.slow
@pytest.mark.parametrize("method", WHOLE, indirect=True)
def test_the_whole_model_compiles_into_one_graph(config, make_llama, tokens, shake):
    model = shake(get_peft_model(make_llama(num_hidden_layers=1), config()), scale=0.05)
    compiles_into_one_graph(model, lambda model: model(tokens, labels=tokens).loss)


@pytest.mark.parametrize("method", COMPILED, indirect=True)
def test_adapted_layers_compile_into_one_graph(config, shake):
    base = nn.Sequential(OrderedDict(q_proj=nn.Linear(24, 18), down_proj=nn.Linear(18, 24)))
    model = shake(get_peft_model(base, replace(config(), task_type=None)), scale=0.05)
    x = torch.randn(5, 24)
    compiles_into_one_graph(model, lambda model: model(x).square().mean())


def compiles_into_one_graph(model, loss):
    torch._dynamo.reset()
    expected = loss(model)
    expected.backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad}
    model.zero_grad()
    found = loss(torch.compile(model, fullgraph=True, backend="aot_eager"))
    found.backward()
    torch.testing.assert_close(found, expected)
    for name, gradient in gradients.items():
        torch.testing.assert_close(model.get_parameter(name).grad, gradient, atol=1e-5, rtol=1e-4)
