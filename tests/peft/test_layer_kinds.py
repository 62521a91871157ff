"""Layers that are not linear: embeddings, convolutions, and bare parameters such as the experts of a mixture."""

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from peft import PeftModel, get_peft_model
from torch import nn

from ndlora_plugins import NdLoraConfig
from ndlora_plugins.errors import NdLoraValueError
from ndlora_plugins.integrations.peft.adapters.check import check_adapter
from ndlora_plugins.integrations.peft.exports.export import export_adapter
from ndlora_plugins.integrations.peft.layers.kinds import ParamWrapper
from ndlora_plugins.integrations.peft.layers.layer import NdLoraLayer

METHODS = {
    "ndlinear": {"method": "ndlinear"},
    "ndlinear-3-modes-4-terms": {"method": "ndlinear", "num_modes": 3, "r": 4},
    "ndlinear-reference-start": {"init_lora_weights": "ndlinear"},
    "ndlinear-crossed": {"crossed_modes": 2, "r": 2},
    "slora": {"method": "slora", "r": 3},
    "nlora": {"method": "nlora", "r": 1},
    "inttune": {"method": "inttune", "r": 1},
}
# layer, shape of its input
CONVOLUTIONS = {
    "conv1d": (lambda: nn.Conv1d(6, 8, 3), (2, 6, 9)),
    "conv2d": (lambda: nn.Conv2d(6, 8, 3, padding=1), (2, 6, 5, 7)),
    "conv2d-even-kernel": (lambda: nn.Conv2d(6, 8, (2, 4)), (2, 6, 5, 7)),
    "conv2d-1x1": (lambda: nn.Conv2d(6, 8, 1), (2, 6, 5, 7)),
    "conv2d-1x3": (lambda: nn.Conv2d(6, 8, (1, 3)), (2, 6, 5, 7)),
    "conv2d-stride-dilation": (lambda: nn.Conv2d(6, 8, 3, stride=2, dilation=2, padding=2), (2, 6, 9, 9)),
    "conv2d-same": (lambda: nn.Conv2d(6, 8, 3, padding="same"), (2, 6, 5, 7)),
    "conv2d-reflect": (lambda: nn.Conv2d(6, 8, 3, padding=1, padding_mode="reflect"), (2, 6, 5, 7)),
    "conv2d-groups": (lambda: nn.Conv2d(6, 8, 3, groups=2), (2, 6, 5, 7)),
    "conv2d-depthwise": (lambda: nn.Conv2d(6, 6, 3, groups=6), (2, 6, 5, 7)),
    "conv2d-one-sample": (lambda: nn.Conv2d(6, 8, 3), (6, 5, 7)),
    "conv3d": (lambda: nn.Conv3d(6, 8, (2, 3, 3)), (2, 6, 4, 5, 5)),
}
MIXTURES = ["MixtralForCausalLM", "Qwen3MoeForCausalLM"]
EXPERTS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]


class OneLayer(nn.Module):
    """A layer of one kind in a model of its own."""

    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, x):
        return self.layer(x)


class ScaledEmbedding(nn.Embedding):
    """As Gemma's."""

    embed_scale = torch.tensor(3.0)

    def forward(self, input):
        return super().forward(input) * self.embed_scale


def make_case(name):
    """(model, input) in float64."""
    torch.manual_seed(0)
    if name in CONVOLUTIONS:
        make, shape = CONVOLUTIONS[name]
        return OneLayer(make()).double(), torch.randn(shape, dtype=torch.float64)
    embedding = {"embedding": nn.Embedding, "embedding-scaled": ScaledEmbedding}[name]
    return OneLayer(embedding(30, 8)).double(), torch.tensor([[0, 3, 29], [7, 7, 11]])


def make_mixture(name):
    import transformers

    make = getattr(transformers, name)
    config = make.config_class(
        hidden_size=24,
        intermediate_size=32,
        moe_intermediate_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        head_dim=12,
        vocab_size=64,
        num_experts=4,
        num_local_experts=4,
        num_experts_per_tok=2,
        decoder_sparse_step=1,
    )
    torch.manual_seed(0)
    return make(config).eval()


CASES = ["embedding", "embedding-scaled", *CONVOLUTIONS]


def adapted(name, case, **more):
    model, x = make_case(case)
    config = NdLoraConfig(target_modules=["layer"], **{**METHODS[name], **more})
    return get_peft_model(model, config, autocast_adapter_dtype=False), x


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("case", CASES)
def test_the_start_is_the_bases_output(name, case):
    model, x = adapted(name, case)
    assert torch.equal(model(x), make_case(case)[0](x))


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("case", CASES)
def test_forward_is_that_of_the_merged_weight_and_unmerging_brings_the_base_back(name, case, shake):
    model, x = adapted(name, case)
    base = copy.deepcopy(model.base_model.model.layer.base_layer.state_dict())
    changed = shake(model)(x)
    assert not torch.allclose(changed, make_case(case)[0](x))
    model.merge_adapter()
    torch.testing.assert_close(model(x), changed)
    model.unmerge_adapter()
    torch.testing.assert_close(dict(model.base_model.model.layer.base_layer.state_dict()), dict(base))
    with model.disable_adapter():
        torch.testing.assert_close(model(x), make_case(case)[0](x))
    merged = model.merge_and_unload()
    assert type(merged.layer) is type(make_case(case)[0].layer)
    torch.testing.assert_close(merged(x), changed)


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("case", CASES)
def test_every_factor_gets_the_gradient_of_the_merged_weight(name, case, shake):
    model, x = adapted(name, case)
    shake(model)
    layer = model.base_model.model.layer
    plan, weight = layer.plan["default"], layer.get_base_weight()
    model(x).square().sum().backward()
    got = {key: value.grad for key, value in layer.ndlora_factors["default"].items()}
    trained, frozen = layer.tensors("default")
    trained = {key: value.detach().requires_grad_() for key, value in trained.items()}
    updated = weight + layer.form.stored(plan.delta(trained, frozen)) * layer.scaling["default"]
    torch.func.functional_call(layer.base_layer, {"weight": updated}, x).square().sum().backward()
    for key, value in trained.items():
        torch.testing.assert_close(got[key], value.grad)


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("case", ["embedding", "conv1d", "conv2d-groups", "conv3d"])
def test_save_and_load(name, case, shake, tmp_path):
    model, x = adapted(name, case)
    expected = shake(model)(x)
    model.save_pretrained(tmp_path, save_embedding_layers=False)
    loaded = PeftModel.from_pretrained(make_case(case)[0], tmp_path, autocast_adapter_dtype=False)
    torch.testing.assert_close(
        loaded(x), expected
    )  # not bit for bit: without gradients torch convolves otherwise
    assert torch.equal(pickle.loads(pickle.dumps(loaded))(x), loaded(x))


def test_a_convolution_has_its_height_and_width_as_modes():
    # dW[(a b), (c d), h, w] = sum_t W1[t,a,c] W2[t,b,d] W3[t,h] W4[t,w]
    model, _ = adapted("ndlinear", "conv2d-even-kernel", r=3, init_lora_weights=False)
    layer = model.base_model.model.layer
    modes = [layer.ndlora_factors["default"][f"mode_{k}"] for k in (1, 2, 3, 4)]
    assert [tuple(mode.shape) for mode in modes] == [(3, 2, 2), (3, 4, 3), (3, 1, 2), (3, 1, 4)]
    expected = torch.einsum("tac,tbd,tzh,tyw->abcdhw", *modes).reshape(8, 6, 2, 4)
    torch.testing.assert_close(layer.get_delta_weight("default"), expected * layer.scaling["default"])


def test_modes_by_hand_may_be_the_very_dimensions_of_the_weight(shake):
    modes = {"in_modes": [6, 2, 4], "out_modes": [8, 1, 1]}  # dW[o, i, h, w] = W1[o, i] W2[h] W3[w]
    model, x = adapted("ndlinear", "conv2d-even-kernel", modes=modes)
    changed = shake(model)(x)
    assert [tuple(f.shape) for f in model.base_model.model.layer.ndlora_factors["default"].values()] == [
        (1, 8, 6),
        (1, 1, 2),
        (1, 1, 4),
    ]
    torch.testing.assert_close(model.merge_and_unload()(x), changed)


def test_a_wide_convolution_is_not_called_lopsided(no_warnings):
    get_peft_model(OneLayer(nn.Conv2d(256, 256, 3)), NdLoraConfig(target_modules=["layer"]))


def test_an_embedding_looks_its_columns_up_without_the_matrix(monkeypatch):
    model, x = adapted("ndlinear", "embedding", r=2, init_lora_weights=False)
    layer = model.base_model.model.layer
    first, second = (layer.ndlora_factors["default"][f"mode_{k}"] for k in (1, 2))
    expected = layer.scaling["default"] * (torch.kron(first[0], second[0]) + torch.kron(first[1], second[1]))
    monkeypatch.delattr(type(layer.plan["default"].structure), "delta")
    torch.testing.assert_close(model(x) - layer.base_layer(x), F.embedding(x, expected.T))


@pytest.mark.parametrize("start, factor", [("zero_mode", "mode_2"), ("s_lora", "down")])
def test_what_reads_an_index_starts_as_large_as_its_one_input(start, factor):
    # U(+-1/sqrt(fan_in)), of which an index has 1, however large the vocabulary; LoRA starts with N(0, 1)
    model = get_peft_model(
        OneLayer(nn.Embedding(4096, 64)), NdLoraConfig(target_modules=["layer"], init_lora_weights=start)
    )
    start = model.base_model.model.layer.ndlora_factors["default"][factor]
    assert start.abs().max() > 0.9


@pytest.mark.parametrize("case", ["embedding", "conv2d", "conv2d-groups"])
def test_each_sample_its_adapter(case, shake):
    model, x = adapted("slora", case)
    model.add_adapter("other", NdLoraConfig(target_modules=["layer"]))
    for seed, adapter in enumerate(["default", "other"]):
        model.set_adapter(adapter)
        shake(model, seed=seed)
    model.eval()
    alone = {"__base__": model.get_base_model().layer.base_layer(x)}
    for adapter in ["default", "other"]:
        model.set_adapter(adapter)
        alone[adapter] = model(x)
    for names in (["default", "other"], ["__base__", "default"]):
        mixed = model(x, adapter_names=names)
        for sample, adapter in enumerate(names):
            torch.testing.assert_close(mixed[sample], alone[adapter][sample])


@pytest.mark.parametrize("case", ["embedding", "conv2d"])
def test_dropout_and_autocast(case):
    model, x = make_case(case)
    model = get_peft_model(
        model.bfloat16(),
        NdLoraConfig(target_modules=["layer"], method="slora", lora_dropout=0.5, init_lora_weights=False),
    ).train()
    x = x if case == "embedding" else x.bfloat16()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert model(x).dtype == torch.bfloat16
    assert model(x).dtype == torch.bfloat16


@pytest.mark.slow
@pytest.mark.parametrize("case", ["embedding", "conv2d"])
def test_compiles_into_one_graph(case, shake):
    model, x = adapted("ndlinear", case)
    torch._dynamo.reset()
    expected = shake(model)(x)
    torch.testing.assert_close(torch.compile(model, fullgraph=True, backend="aot_eager")(x), expected)


# --- experts ---------------------------------------------------------------------------------------------------


def with_experts(make, name, **more):
    return get_peft_model(
        make_mixture(make), NdLoraConfig(target_parameters=EXPERTS, **{**METHODS[name], **more})
    )


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("make", MIXTURES)
def test_experts_train_merge_save_and_load(name, make, shake, tokens, tmp_path):
    base = make_mixture(make)(tokens).logits
    model = with_experts(make, name).eval()
    torch.testing.assert_close(model(tokens).logits, base)
    model(tokens, labels=tokens).loss.backward()
    wrappers = [module for module in model.modules() if isinstance(module, ParamWrapper)]
    assert len(wrappers) == 4
    for wrapper in wrappers:
        gradients = [value.grad for value in wrapper.ndlora_factors["default"].values()]
        assert all(gradient is not None for gradient in gradients)
        assert any(gradient.any() for gradient in gradients)
    shake(model, scale=0.02)
    changed = model(tokens).logits
    assert not torch.equal(changed, base)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(make_mixture(make), tmp_path).eval()
    assert torch.equal(loaded(tokens).logits, changed)
    with model.disable_adapter():
        torch.testing.assert_close(model(tokens).logits, base)
    merged = model.merge_and_unload()
    assert not any(isinstance(module, NdLoraLayer) for module in merged.modules())
    torch.testing.assert_close(merged(tokens).logits, changed, atol=1e-5, rtol=1e-4)
    assert check_adapter(tmp_path).ok


def test_experts_are_a_mode():
    # dW[e, (a b), (c d)] = sum_t W1[t,e] W2[t,a,c] W3[t,b,d]
    model = with_experts("MixtralForCausalLM", "ndlinear", r=2, init_lora_weights=False)
    wrapper = model.get_submodule("base_model.model.model.layers.0.mlp.experts")
    assert wrapper.parameter_name == "down_proj"
    modes = [wrapper.ndlora_factors["default"][f"mode_{k}"] for k in (1, 2, 3)]
    assert [tuple(mode.shape) for mode in modes] == [(2, 4, 1), (2, 4, 4), (2, 6, 8)]
    expected = torch.einsum("tez,tac,tbd->eabcd", *modes).reshape(4, 24, 32)
    torch.testing.assert_close(wrapper.get_delta_weight("default"), expected * wrapper.scaling["default"])


def test_a_second_adapter_of_the_same_experts_and_their_gradient_checkpointing(shake, tokens):
    model = with_experts("MixtralForCausalLM", "ndlinear")
    model.add_adapter("other", NdLoraConfig(target_parameters=EXPERTS, method="slora"))
    assert sum(isinstance(module, ParamWrapper) for module in model.modules()) == 4
    model.set_adapter("other")
    shake(model, scale=0.02)
    plain = model(tokens, labels=tokens).loss
    plain.backward()
    gradients = {n: p.grad.clone() for n, p in model.named_parameters() if p.requires_grad}
    model.zero_grad()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    model.train()
    again = model(tokens, labels=tokens).loss
    again.backward()
    torch.testing.assert_close(again, plain)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            torch.testing.assert_close(parameter.grad, gradients[name])


def test_what_experts_refuse(tokens):
    model = with_experts("MixtralForCausalLM", "ndlinear").eval()
    with pytest.raises(NdLoraValueError, match="a parameter is one for the whole batch"):
        model(tokens, adapter_names=["default", "__base__"])
    with pytest.raises(NdLoraValueError, match="must name the same parameters"):
        model.add_adapter("other", NdLoraConfig(target_parameters=EXPERTS[:1]))
    with pytest.raises(NdLoraValueError, match="does not support targeting nn.Parameter"):
        model.add_weighted_adapter(["default"], [1.0], "sum")


# --- files -----------------------------------------------------------------------------------------------------

# target -> options, an export that is refused, what it says
FILES = {
    "embedding": ({"target_modules": ["embed_tokens"]}, "lora", r"'model.embed_tokens' is a embedding"),
    "parameter": (
        {"target_parameters": ["self_attn.q_proj.weight", "mlp.down_proj.weight"]},
        "lokr",
        r"'model.layers.0.mlp.down_proj.weight' is a parameter",
    ),
}


@pytest.mark.parametrize("name", ["ndlinear", "slora", "nlora", "inttune"])
@pytest.mark.parametrize("target", FILES)
def test_files_are_read_checked_and_merged(name, target, make_llama, shake, tokens, tmp_path):
    options, refused, refusal = FILES[target]
    make_llama().save_pretrained(tmp_path / "base")
    model = get_peft_model(make_llama(), NdLoraConfig(**{**METHODS[name], **options}))
    expected = shake(model, scale=0.02).eval()(tokens).logits
    model.save_pretrained(tmp_path / "adapter", save_embedding_layers=False)
    report = check_adapter(tmp_path / "adapter", str(tmp_path / "base"))
    assert report.ok, report.problems
    export_adapter(tmp_path / "adapter", tmp_path / "merged", "merged", base=str(tmp_path / "base"))
    merged = type(make_llama()).from_pretrained(tmp_path / "merged").eval()
    torch.testing.assert_close(merged(tokens).logits, expected, atol=1e-5, rtol=1e-4)
    with pytest.raises(NdLoraValueError, match=refusal):
        export_adapter(tmp_path / "adapter", tmp_path / "out", refused, base=str(tmp_path / "base"))
