"""The messages that docs/trouble.md shows are those that come."""

import pathlib
import re
import warnings

import pytest
import torch
from peft import PeftModel, get_peft_model

from ndlora_plugins import NdLoraConfig
from ndlora_plugins.integrations.peft.adapters.check import check_adapter
from ndlora_plugins.integrations.peft.exports.export import export_adapter
from ndlora_plugins.integrations.trl.checks import adapted_layers, check_gradients

PAGE = pathlib.Path(__file__).resolve().parent.parent / "docs" / "trouble.md"


def base(size=16, seed=0):
    torch.manual_seed(seed)
    return torch.nn.Sequential(torch.nn.Linear(size, 16), torch.nn.Linear(16, size))


def adapted(model=None, targets=("0",), **options):
    return get_peft_model(model or base(), NdLoraConfig(target_modules=list(targets), **options))


def saved(folder, **options):
    adapted(**options).save_pretrained(folder / "saved")
    return folder / "saved"


def overflowing():
    model = adapted()
    (model(torch.ones(2, 16)).sum() * float("inf")).backward()
    raise RuntimeError("; ".join(check_gradients(adapted_layers(model)).problems))


def idle(folder):
    raise RuntimeError("; ".join(check_adapter(saved(folder)).problems))


# a line of the page -> how it comes
MESSAGES = {
    "Target modules {'nope'} not found in the base model": lambda folder: adapted(targets=["nope"]),
    "target_modules: the entry 'q_proj' matches no adapted layer, so it does nothing.": lambda folder: (
        adapted(targets=["0", "q_proj"])
    ),
    "times those of even modes. Set `modes`, exclude the layer, or use a method without modes.": lambda folder: (
        adapted(torch.nn.Sequential(torch.nn.Linear(1009, 1009)), method="ndlinear")
    ),
    "lower the learning rate or the scaling, or train in bfloat16 or float32": lambda folder: overflowing(),
    "No layer does anything: every update is zero.": idle,
    "The weights of layer '0' differ from those that the adapter was trained on": lambda folder: (
        PeftModel.from_pretrained(base(seed=1), saved(folder, method="inttune", r=4))
    ),
    "Layer '0' is 16 x 32 (out x in) in this base model; the adapter was trained on 16 x 16.": lambda folder: (
        PeftModel.from_pretrained(base(32), saved(folder))
    ),
    "cannot become LoRA: method='ndlinear' has no exact form of a small rank: choose a rank, an energy or a "
    "max_error.": lambda folder: export_adapter(saved(folder, method="ndlinear"), folder / "new", to="lora"),
    "exists already, and nothing is overwritten: name a new directory, or remove it.": lambda folder: (
        export_adapter(saved(folder), folder / "saved", to="lora")
    ),
}


def test_every_message_of_the_page_is_here():
    blocks = re.findall(r"^```text\n(.*?)^```$", PAGE.read_text(), re.DOTALL | re.MULTILINE)
    assert [line for block in blocks for line in block.splitlines()] == list(MESSAGES)


@pytest.mark.parametrize("message", MESSAGES)
def test_a_message_comes(message, tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(Exception, match=re.escape(message)):
            MESSAGES[message](tmp_path)
