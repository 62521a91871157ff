"""Run after `pip install .`: the method is found by its entry point."""

from copy import deepcopy

import pytest
import torch
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file

from ndlora_plugins import NdLoraConfig
from ndlora_plugins.errors import NdLoraValueError
from ndlora_plugins.testing import check_method


def test_it_holds_to_the_laws_of_every_method():
    check_method("cosine")


def test_a_rank_above_the_smaller_side_is_refused():
    model = torch.nn.Sequential(torch.nn.Linear(12, 8))
    with pytest.raises(NdLoraValueError, match="8"):
        get_peft_model(model, NdLoraConfig(method="cosine", r=9, target_modules=["0"]))


def test_it_trains_and_is_loaded_as_it_was_saved(tmp_path):
    torch.manual_seed(0)
    base = torch.nn.Sequential(torch.nn.Linear(24, 16))
    x, wanted = torch.randn(64, 24), torch.randn(64, 16)
    model = get_peft_model(deepcopy(base), NdLoraConfig(method="cosine", r=8, target_modules=["0"]))
    optimizer = torch.optim.Adam(model.parameters(), lr=0.1)
    losses = []
    for _ in range(20):
        losses.append(torch.nn.functional.mse_loss(model(x), wanted))
        optimizer.zero_grad()
        losses[-1].backward()
        optimizer.step()
    assert losses[-1] < losses[0]

    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(base, tmp_path)
    torch.testing.assert_close(loaded(x), model(x))
    # the sides are made again from the seed: the core alone is in the file
    (saved,) = load_file(tmp_path / "adapter_model.safetensors").values()
    assert saved.shape == (8, 8)
