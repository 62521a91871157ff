"""Quantised bases, for real, on the CPU: bitsandbytes 4-bit and 8-bit, torchao int8 weight-only."""

import copy
from types import SimpleNamespace

import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import nn

from ndlora_plugins import NdLoraConfig
from ndlora_plugins.errors import NdLoraValueError, NdLoraWarning
from ndlora_plugins.integrations.peft.layer import NdLoraLayer

# the noise that stands for a training is of one size, so inttune starts from the slices as they are
METHODS = {
    "ndlinear": {},
    "slora": {},
    "nlora": {},
    "inttune": {"init_lora_weights": "n_lora"},
}
# base -> largest change of an output, of a norm of about 1, that rounding the merged weights may cause
MERGE_ERROR = {"4bit": 0.3, "8bit": 0.03, "torchao": 0.03}
# base -> the same for loading again: bitsandbytes computes in 16 bit, or less, in some modes
COMPUTE_ERROR = {"4bit": 0.02, "8bit": 0.02, "torchao": 1e-6}


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
    bnb = pytest.importorskip("bitsandbytes")

    def make(inputs, outputs):
        if kind == "4bit":
            return bnb.nn.Linear4bit(inputs, outputs, quant_type="nf4", compute_dtype=torch.float32)
        return bnb.nn.Linear8bitLt(inputs, outputs, has_fp16_weights=False)

    for name in ("first", "second"):
        setattr(model, name, bitsandbytes_layer(getattr(model, name), make))
    return model


@pytest.fixture(params=sorted(MERGE_ERROR))
def kind(request):
    pytest.importorskip("torchao" if request.param == "torchao" else "bitsandbytes")
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
    assert distances.max() < {"4bit": 0.2, "8bit": 0.02, "torchao": 0.02}[kind]


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
