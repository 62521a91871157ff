"""Adapters that version 0.1.0 saved (schema 1, commit 367f6d2) load for ever and answer as they did."""

import pathlib

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from ndlora_plugins.integrations.peft.adapters.check import check_adapter
from ndlora_plugins.integrations.peft.exports.export import export_adapter

SAVED = pathlib.Path(__file__).parents[1] / "data" / "first_release"
ADAPTERS = sorted(path.name for path in SAVED.iterdir() if path.name != "base" and path.is_dir())
TOKENS = torch.arange(12).view(2, 6)
TOLERANCE = {"rtol": 1e-5, "atol": 1e-6}


@pytest.fixture
def base():
    return AutoModelForCausalLM.from_pretrained(SAVED / "base").eval()


@pytest.fixture(scope="module")
def logits():
    return load_file(SAVED / "logits.safetensors")


def test_there_is_one_of_each():
    assert len(ADAPTERS) == 14


@pytest.mark.parametrize("name", ADAPTERS)
def test_loads_with_equal_logits(name, base, logits):
    model = PeftModel.from_pretrained(base, SAVED / name).eval()
    torch.testing.assert_close(model(TOKENS).logits, logits[name], **TOLERANCE)


@pytest.mark.parametrize("name", ADAPTERS)
def test_is_saved_again_and_merged(name, base, logits, tmp_path):
    PeftModel.from_pretrained(base, SAVED / name).save_pretrained(tmp_path / "again")
    again = AutoModelForCausalLM.from_pretrained(SAVED / "base").eval()
    model = PeftModel.from_pretrained(again, tmp_path / "again").eval()
    torch.testing.assert_close(model(TOKENS).logits, logits[name], **TOLERANCE)
    torch.testing.assert_close(model.merge_and_unload()(TOKENS).logits, logits[name], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ADAPTERS)
def test_is_sound_and_merges_into_files(name, logits, tmp_path):
    assert check_adapter(SAVED / name, str(SAVED / "base")).ok
    export_adapter(SAVED / name, tmp_path / "merged", "merged", base=str(SAVED / "base"))
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval()
    torch.testing.assert_close(merged(TOKENS).logits, logits[name], rtol=1e-4, atol=1e-5)
