"""Starts that keep a LoRA recipe's learning rate: the first step of Adam is as large as LoRA's."""

import pytest
import torch

from ndlora_plugins.adapter import AdapterOptions, plan_layer

# in, out, options
CASES = [
    (576, 576, {"rank": 1}),
    (576, 1536, {"rank": 1}),
    (1536, 576, {"rank": 1}),
    (576, 192, {"rank": 4}),
    (576, 576, {"rank": 4, "num_modes": 3}),
    (1024, 4096, {"rank": 2, "num_modes": 4}),
    (576, 576, {"rank": 1, "in_modes": (4, 144), "out_modes": (144, 4)}),
    (576, 576, {"rank": 1, "in_modes": (12, 48), "out_modes": (12, 48)}),
]


def first_step(trained, answer, x, wanted):
    """How far the output for `x` moves along `wanted` (of length 1) when Adam has made one step of rate 1."""
    leaves = {name: value.requires_grad_() for name, value in trained.items()}
    before = answer(leaves, x)
    (before * wanted).sum().backward()
    with torch.no_grad():
        after = answer({name: value + value.grad.sign() for name, value in leaves.items()}, x)
        return ((after - before) * wanted).sum().item()


@pytest.mark.parametrize("in_features, out_features, options", CASES)
def test_the_first_step_is_loras(in_features, out_features, options):
    plan = plan_layer(
        AdapterOptions(method="ndlinear", init_lora_weights="lora_step", **options),
        in_features,
        out_features,
        "q",
    )
    x, wanted = torch.randn(in_features), torch.nn.functional.normalize(torch.randn(out_features), dim=0)
    trained, frozen = plan.initialize(None)
    ours = first_step(trained, lambda factors, x: plan.scaling * plan.apply(factors, frozen, x), x, wanted)
    down = torch.nn.init.kaiming_uniform_(torch.empty(8, in_features), a=5**0.5)
    lora = {"down": down, "up": torch.zeros(out_features, 8)}
    theirs = first_step(lora, lambda factors, x: factors["up"] @ (factors["down"] @ x), x, wanted)
    assert 0.5 < ours / theirs < 2


@pytest.mark.parametrize("in_features, out_features, options", CASES)
def test_the_model_starts_as_it_is(in_features, out_features, options):
    plan = plan_layer(
        AdapterOptions(method="ndlinear", init_lora_weights="lora_step", **options),
        in_features,
        out_features,
        "q",
    )
    assert plan.anchor == "none"
    assert torch.count_nonzero(plan.delta(*plan.initialize(None))) == 0
