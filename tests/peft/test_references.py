"""The layers hold against references in float64: torch.kron, PEFT's LoKr, and the formulas of the papers."""

import pytest
import torch
from peft import LoKrConfig, get_peft_model
from torch import nn
from transformers.pytorch_utils import Conv1D

from ndlora_plugins import NdLoraConfig

IN, OUT, RANK = 24, 18, 4


class OneLayer(nn.Module):
    def __init__(self, kind):
        super().__init__()
        self.q = nn.Linear(IN, OUT) if kind == "linear" else Conv1D(OUT, IN)
        self.double()

    def forward(self, x):
        return self.q(x)


def adapted(kind="linear", **options):
    torch.manual_seed(0)
    model = get_peft_model(
        OneLayer(kind), NdLoraConfig(target_modules=["q"], **options), autocast_adapter_dtype=False
    )
    layer = model.base_model.model.q
    return model, layer, {name: p.detach() for name, p in layer.ndlora_factors["default"].items()}


def base_output(layer, x):
    return layer.base_layer(x)


@pytest.mark.parametrize("kind", ["linear", "conv1d"])
def test_ndlinear_is_torch_kron(kind):
    model, layer, f = adapted(kind, init_lora_weights=False, lora_alpha=3)
    x = torch.randn(2, 5, IN, dtype=torch.float64)
    # github.com/ensemble-core/NdLinear-LoRA: y = W x + alpha vec(W1 X W2^T), which is kron(W1, W2) x row-major
    expected = base_output(layer, x) + 3 * x @ torch.kron(f["mode_1"][0], f["mode_2"][0]).T
    torch.testing.assert_close(model(x), expected)


def test_ndlinear_is_pefts_lokr_with_the_same_factors():
    model, layer, f = adapted(method="ndlinear", init_lora_weights=False)
    lokr = get_peft_model(
        OneLayer("linear"),
        LoKrConfig(target_modules=["q"], r=64, alpha=64, decompose_factor=-1, init_weights=False),
        autocast_adapter_dtype=False,
    )
    target = lokr.base_model.model.q
    target.base_layer.load_state_dict(layer.base_layer.state_dict())
    with torch.no_grad():
        assert target.lokr_w1["default"].shape == f["mode_1"][0].shape
        target.lokr_w1["default"].copy_(f["mode_1"][0])
        target.lokr_w2["default"].copy_(f["mode_2"][0])
    x = torch.randn(2, 5, IN, dtype=torch.float64)
    torch.testing.assert_close(model(x), lokr(x))


@pytest.mark.parametrize("kind", ["linear", "conv1d"])
@pytest.mark.parametrize("method", ["slora", "nlora", "inttune"])
def test_low_rank_with_core(method, kind):
    model, layer, f = adapted(kind, method=method, init_lora_weights=False, r=RANK, lora_alpha=2 * RANK)
    f |= layer.ndlora_frozen["default"].tensors() if method == "inttune" else {}
    x = torch.randn(2, 5, IN, dtype=torch.float64)
    # arXiv 2502.14482: y = W x + s B N A x
    expected = base_output(layer, x) + 2 * x @ (f["up"] @ f["core"] @ f["down"]).T
    torch.testing.assert_close(model(x), expected)


@pytest.mark.parametrize("kind", ["linear", "conv1d"])
def test_n_lora_without_anchor_starts_where_the_reference_does(kind):
    model, layer, f = adapted(kind, init_lora_weights="n_lora", anchor="none", r=RANK)
    weight = layer.base_layer.weight.detach()
    weight = weight.T if kind == "conv1d" else weight
    x = torch.randn(2, 5, IN, dtype=torch.float64)
    # github.com/TracyGuo2001/NLoRA: A = W[:r, :], B = W[:, :r], N = W[:r, :r]
    start = weight[:, :RANK] @ weight[:RANK, :RANK] @ weight[:RANK, :]
    torch.testing.assert_close(f["down"], weight[:RANK], rtol=0, atol=0)
    torch.testing.assert_close(model(x), base_output(layer, x) + x @ start.T)


@pytest.mark.parametrize("modes", [2, 3])
@pytest.mark.parametrize("terms", [1, 4])
def test_sums_of_terms_and_more_modes(modes, terms):
    model, layer, f = adapted(init_lora_weights=False, r=terms, lora_alpha=terms, num_modes=modes)
    x = torch.randn(7, IN, dtype=torch.float64)
    delta = 0
    for term in range(terms):
        product = torch.ones(1, 1, dtype=torch.float64)
        for k in range(1, modes + 1):
            product = torch.kron(product, f[f"mode_{k}"][term])
        delta = delta + product
    torch.testing.assert_close(model(x), base_output(layer, x) + x @ delta.T)
