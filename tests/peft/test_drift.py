"""Online RL merges and unmerges at every step: the base weight may not wander off more than under PEFT's LoRA."""

import copy

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from ndlora_plugins import NdLoraConfig

CYCLES, WIDTH, RANK = 100, 64, 8
# seed, how large the update is beside the weight
UPDATES = [(0, 0.1), (1, 1.0), (2, 10.0)]


def drift(model):
    """Largest change of the base weight after the cycles, relative to its largest entry."""
    weight = model.base_model.model[0].base_layer.weight
    before = weight.detach().clone()
    for _ in range(CYCLES):
        model.merge_adapter()
        model.unmerge_adapter()
    weight = model.base_model.model[0].base_layer.weight
    return ((weight - before).abs().max() / before.abs().max()).item()


@pytest.mark.parametrize("seed, size", UPDATES)
def test_a_hundred_cycles_in_bfloat16_drift_no_more_than_lora(seed, size):
    torch.manual_seed(seed)
    base = nn.Sequential(nn.Linear(WIDTH, WIDTH)).to(torch.bfloat16)
    lora = get_peft_model(copy.deepcopy(base), LoraConfig(target_modules=["0"], r=RANK, lora_alpha=RANK))
    ours = get_peft_model(copy.deepcopy(base), NdLoraConfig(method="slora", target_modules=["0"], r=RANK))
    theirs, factors = lora.base_model.model[0], ours.base_model.model[0].ndlora_factors["default"]
    with torch.no_grad():  # the same update in both
        theirs.lora_B["default"].weight.copy_(size * torch.randn(WIDTH, RANK))
        factors["up"].copy_(theirs.lora_B["default"].weight)
        factors["down"].copy_(theirs.lora_A["default"].weight)
        factors["core"].copy_(torch.eye(RANK))
    assert drift(ours) <= drift(lora)
