"""Quantised bases, for real, on the CPU: bitsandbytes 4-bit and 8-bit, torchao int8 weight-only, HQQ 4-bit.

GPTQ layers, whose package asks for another torch, are stood for by one that has what PEFT sees of them.
"""

import copy
from types import SimpleNamespace

import pytest
import torch
from peft import PeftModel, get_peft_model
from peft.utils.quantization_utils import ForwardOnlyQuantizationBackend
from torch import nn

from ndlora_plugins import NdLoraConfig
from ndlora_plugins.errors import NdLoraTypeError, NdLoraValueError, NdLoraWarning
from ndlora_plugins.integrations.peft.layers import weights
from ndlora_plugins.integrations.peft.layers.layer import NdLoraLayer

# the noise that stands for a training is of one size, so the scaling is, and the slices are taken as they are
METHODS = {
    "ndlinear": {"lora_alpha": 1},
    "slora": {},
    "nlora": {"init_lora_weights": "n_lora"},
    "inttune": {"init_lora_weights": "n_lora"},
}
# base -> largest change of an output, of a norm of about 1, that rounding the merged weights may cause
MERGE_ERROR = {"4bit": 0.3, "8bit": 0.03, "torchao": 0.03, "hqq": 0.3}
# base -> the same for loading again: bitsandbytes computes in 16 bit, or less, in some modes
COMPUTE_ERROR = {"4bit": 0.02, "8bit": 0.02, "torchao": 1e-6, "hqq": 1e-6}
# base -> the module that it needs
PACKAGES = {"4bit": "bitsandbytes", "8bit": "bitsandbytes", "torchao": "torchao", "hqq": "hqq"}
# base -> largest error of a dequantised row, relative to the rows' mean norm
ROUNDING = {"4bit": 0.2, "8bit": 0.02, "torchao": 0.02, "hqq": 0.2}


class Base(nn.Module):
    def __init__(self):
        super().__init__()
        self.first = nn.Linear(64, 128)
        self.second = nn.Linear(128, 64)

    def forward(self, x):
        return self.second(torch.relu(self.first(x)))


def bitsandbytes_layer(layer, make):
    quantised = make(layer.in_features, layer.out_features)
    quantised.load_state_dict(layer.state_dict())
    return quantised.to("cpu")  # this is when it quantises


def quantize(model, kind):
    if kind == "torchao":
        from torchao.quantization import Int8WeightOnlyConfig, quantize_

        quantize_(model, Int8WeightOnlyConfig())
        # where transformers keeps how to quantise again
        quantizer = SimpleNamespace(get_apply_tensor_subclass=Int8WeightOnlyConfig)
        model.hf_quantizer = SimpleNamespace(quantization_config=quantizer)
        return model
    if kind == "hqq":
        from hqq.core.quantize import BaseQuantizeConfig, HQQLinear

        for name in ("first", "second"):
            options = BaseQuantizeConfig(nbits=4, group_size=64)
            with torch.no_grad():  # else its scales hold a graph, and cannot be copied
                layer = HQQLinear(getattr(model, name), options, compute_dtype=torch.float32, device="cpu")
            setattr(model, name, layer)
        return model
    import bitsandbytes as bnb

    def make(inputs, outputs):
        if kind == "4bit":
            return bnb.nn.Linear4bit(inputs, outputs, quant_type="nf4", compute_dtype=torch.float32)
        return bnb.nn.Linear8bitLt(inputs, outputs, has_fp16_weights=False)

    for name in ("first", "second"):
        setattr(model, name, bitsandbytes_layer(getattr(model, name), make))
    return model


@pytest.fixture(params=sorted(MERGE_ERROR))
def kind(request):
    pytest.importorskip(PACKAGES[request.param])
    return request.param


@pytest.fixture(params=METHODS)
def config(request):
    def make(**options):
        options = {**METHODS[request.param], **options}
        return NdLoraConfig(method=request.param, r=4, target_modules=["first", "second"], **options)

    return make


@pytest.fixture
def base(kind):
    """A function that makes the same quantised model every time; its layers have not run yet."""

    def make(seed=0):
        torch.manual_seed(seed)
        return quantize(Base(), kind)

    return make


@pytest.fixture
def x():
    return torch.randn(8, 64)


def test_starts_as_the_base_and_trains(base, config, x):
    expected = base()(x)
    model = get_peft_model(base(), config())
    found = model(x)
    assert torch.equal(found, expected)
    found.square().sum().backward()
    trained = [p for p in model.parameters() if p.requires_grad]
    assert trained and all(p.dtype == torch.float32 and p.grad is not None for p in trained)
    assert any(p.grad.abs().sum() > 0 for p in trained)


def test_comes_back(base, config, x, kind, shake, tmp_path):
    model = shake(get_peft_model(base(), config())).eval()
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(base(), tmp_path)
    with torch.no_grad():
        torch.testing.assert_close(again(x), model(x), atol=1e-6, rtol=1e-6)
        model.train()  # bitsandbytes may compute otherwise
        torch.testing.assert_close(again(x), model(x), atol=COMPUTE_ERROR[kind], rtol=0)


def test_another_base_is_refused_where_the_start_is_read_from_it(base, config, tmp_path):
    model = get_peft_model(base(), config())
    model.save_pretrained(tmp_path)
    entry = model.peft_config["default"].to_dict()["base_fingerprint"]["first"]
    if any(layer.plan["default"].recomputed for layer in model.modules() if isinstance(layer, NdLoraLayer)):
        assert len(entry["values"]) == 8
        with pytest.raises(NdLoraValueError, match="differ from those that the adapter was trained on"):
            PeftModel.from_pretrained(base(seed=1), tmp_path)
    else:  # not worth dequantising for
        assert entry["values"] is None


@pytest.mark.parametrize("forward_first", [False, True])
def test_the_start_is_the_dequantised_weight(forward_first, base, kind, x):
    # a forward in eval mode packs 4-bit weights in another order on some CPUs
    model = base().eval()
    if forward_first:
        with torch.no_grad():
            model(x)
    start = get_peft_model(model, NdLoraConfig(method="nlora", r=4, target_modules=["first"]))
    layer = start.base_model.model.first
    torch.manual_seed(0)
    full = Base().first.weight
    found = layer.ndlora_frozen["default"].down  # rows of the weight
    distances = torch.cdist(found.float(), full.detach()).min(dim=1).values / full.norm(dim=1).mean()
    assert distances.max() < ROUNDING[kind]


@pytest.mark.parametrize("forward_first", [False, True])
def test_merges_with_a_warning(forward_first, base, config, x, kind, shake):
    model = shake(get_peft_model(base(), config())).eval()
    with torch.no_grad():
        expected = copy.deepcopy(model)(x)
        if forward_first:
            model(x)
        with pytest.warns(NdLoraWarning, match="rounds the update to the quantised grid"):
            merged = model.merge_and_unload()
        torch.testing.assert_close(merged(x), expected, atol=MERGE_ERROR[kind], rtol=0)
    assert not any("ndlora" in name for name, _ in merged.named_modules())


def test_a_torchao_base_of_unknown_making_trains_but_does_not_merge(x):
    pytest.importorskip("torchao")
    model = quantize(Base(), "torchao")
    del model.hf_quantizer
    model = get_peft_model(model, NdLoraConfig(method="nlora", r=4, target_modules=["first"]))
    model(x).sum().backward()
    with pytest.raises(NdLoraValueError, match="quantised with torchao cannot be merged into"):
        model.merge_and_unload()


class ForwardOnly(nn.Module):
    """As gptqmodel has it: no `nn.Linear`, and its weight is no tensor."""

    def __init__(self, layer):
        super().__init__()
        self.in_features, self.out_features = layer.in_features, layer.out_features
        self.weight = SimpleNamespace(device=torch.device("cpu"), dtype=torch.float16)
        self.register_buffer("packed", layer.weight.detach())

    def forward(self, x):
        return x @ self.packed.T


@pytest.fixture
def forward_only(monkeypatch):
    """A function that makes a model of such layers, which PEFT can neither dequantise nor merge into."""
    resolve = weights.resolve_quantization_backend

    def backend(layer, **options):
        known = isinstance(layer, ForwardOnly)
        return ForwardOnlyQuantizationBackend("gptq") if known else resolve(layer, **options)

    monkeypatch.setattr(weights, "resolve_quantization_backend", backend)

    def make():
        torch.manual_seed(0)
        model = Base()
        model.first, model.second = ForwardOnly(model.first), ForwardOnly(model.second)
        return model

    return make


@pytest.mark.parametrize("method", ["ndlinear", "slora"])
def test_a_base_that_only_runs_forward_trains_and_comes_back(forward_only, method, x, shake, tmp_path):
    config = NdLoraConfig(method=method, r=4, target_modules=["first", "second"])
    model = get_peft_model(forward_only(), config)
    assert torch.equal(model(x), forward_only()(x))
    model(x).square().sum().backward()
    assert any(p.grad.abs().sum() > 0 for p in model.parameters() if p.requires_grad)
    shake(model).save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(forward_only(), tmp_path)
    torch.testing.assert_close(again(x), model(x))
    with pytest.raises(NdLoraValueError, match="quantised with gptq cannot be merged into"):
        model.merge_and_unload()


@pytest.mark.parametrize("method", ["nlora", "inttune"])
def test_a_start_that_cannot_be_read_is_refused(forward_only, method):
    model = forward_only()
    with pytest.raises(NdLoraTypeError, match="layer 'first', which is quantised with gptq"):
        get_peft_model(model, NdLoraConfig(method=method, r=4, target_modules=["first", "second"]))
    assert isinstance(model.first, ForwardOnly)
