"""Fixtures that every folder uses. Models are tiny and random; the real one is in tests/peft/test_real_model.py."""

import os
import pathlib
import warnings

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("AXOLOTL_DO_NOT_TRACK", "1")

import pytest
import torch

ROOT = pathlib.Path(__file__).resolve().parent.parent


@pytest.fixture(autouse=True)
def fixed_seed():
    """Every test starts from the same global generator."""
    torch.manual_seed(0)


@pytest.fixture
def make_llama():
    """A function that makes the same tiny Llama every time: hidden 48, two layers, float32, eval mode."""
    from transformers import LlamaConfig, LlamaForCausalLM

    def make(seed=0, dtype=torch.float32, **changes):
        options = {
            "hidden_size": 48,
            "intermediate_size": 96,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "vocab_size": 128,
        }
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            return LlamaForCausalLM(LlamaConfig(**{**options, **changes})).to(dtype).eval()

    return make


@pytest.fixture
def make_gpt2():
    """The same for GPT-2, whose linear layers are transformers' Conv1D."""
    from transformers import GPT2Config, GPT2LMHeadModel

    def make(seed=0, dtype=torch.float32):
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            return (
                GPT2LMHeadModel(GPT2Config(n_embd=48, n_layer=2, n_head=4, vocab_size=128)).to(dtype).eval()
            )

    return make


@pytest.fixture
def tokens():
    """Input ids (2, 10) for the tiny models."""
    return torch.arange(20).view(2, 10)


@pytest.fixture
def shake():
    """A function that moves every trainable parameter of a model by noise, as training would."""

    def move(model, scale=0.1, seed=1):
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.requires_grad:
                    noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float32)
                    parameter.add_(scale * noise.to(parameter.dtype))
        return model

    return move


@pytest.fixture
def no_warnings():
    """Turns every warning of ours into an error."""
    from ndlora_plugins.errors import NdLoraWarning

    with warnings.catch_warnings():
        warnings.simplefilter("error", NdLoraWarning)
        yield
