"""The cheap norm of the update against the norm of the update itself."""

import pytest
import torch

from ndlora_plugins.adapter import AdapterOptions, plan_layer
from ndlora_plugins.methods.base import Method

# options of the layer, in_features, out_features
CASES = {
    "ndlinear": (AdapterOptions(method="ndlinear", init_lora_weights="ndlinear", anchor="none"), 24, 36),
    "ndlinear, 3 modes, 4 terms": (
        AdapterOptions(method="ndlinear", init_lora_weights=False, rank=4, num_modes=3),
        24,
        60,
    ),
    "ndlinear, snapshot": (AdapterOptions(method="ndlinear", init_lora_weights="ndlinear", rank=2), 30, 20),
    "slora": (AdapterOptions(method="slora", init_lora_weights=False, rank=4), 24, 36),
    "nlora, no anchor": (AdapterOptions(method="nlora", rank=4, anchor="none"), 36, 24),
    "nlora, snapshot": (AdapterOptions(method="nlora", rank=4), 24, 36),
    "inttune": (AdapterOptions(method="inttune", rank=4), 24, 36),
}


@pytest.fixture(params=CASES.values(), ids=CASES)
def adapter(request):
    options, in_features, out_features = request.param
    generator = torch.Generator().manual_seed(0)
    plan = plan_layer(options, in_features, out_features, "layer")
    weight = torch.randn(out_features, in_features, generator=generator)
    trained, frozen = plan.initialize(weight, generator)
    trained = {
        name: value + 0.1 * torch.randn(value.shape, generator=generator) for name, value in trained.items()
    }
    return plan, trained, frozen


def test_equals_the_norm_of_the_materialised_update(adapter):
    plan, trained, frozen = adapter
    wide = [{name: value.double() for name, value in tensors.items()} for tensors in (trained, frozen)]
    assert plan.delta_norm(trained, frozen) == pytest.approx(plan.delta(*wide).norm().item(), rel=1e-10)


def test_the_default_of_a_method_materialises_the_update(adapter):
    plan, trained, frozen = adapter
    factors = plan._effective(trained, frozen)
    default = Method.delta_norm(plan.method, plan.layout, factors)
    assert default.item() == pytest.approx(plan.method.delta(plan.layout, factors).norm().item(), rel=1e-4)


def test_zero_update_has_norm_zero():
    plan = plan_layer(AdapterOptions(method="nlora", rank=4), 24, 36, "layer")
    assert plan.delta_norm(*plan.initialize(torch.randn(36, 24))) == 0.0


def test_no_gradient_is_recorded_and_the_factors_keep_theirs():
    plan = plan_layer(AdapterOptions(method="slora", init_lora_weights=False), 24, 36, "layer")
    trained, frozen = plan.initialize(None)
    trained = {name: value.requires_grad_() for name, value in trained.items()}
    assert plan.delta_norm(trained, frozen) > 0
    assert all(value.grad is None and value.requires_grad for value in trained.values())
