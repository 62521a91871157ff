"""A base model and an adapter in directories, as a user has them after a training."""

import pytest
from peft import PeftModel, get_peft_model
from transformers import AutoModelForCausalLM

from ndlora_plugins import NdLoraConfig


@pytest.fixture
def load():
    """A function that loads a base model, with an adapter if one is given."""

    def model(directory, adapter=None):
        base = AutoModelForCausalLM.from_pretrained(directory)
        return (base if adapter is None else PeftModel.from_pretrained(base, adapter)).eval()

    return model


@pytest.fixture
def trained(tmp_path, tokens, shake, load):
    """A function that saves a base model and a trained adapter in `tmp_path` and returns its logits."""

    def make(make_model, shards="5GB", scale=0.1, **options):
        make_model().save_pretrained(tmp_path / "base", max_shard_size=shards)
        model = get_peft_model(load(tmp_path / "base"), NdLoraConfig(task_type="CAUSAL_LM", **options))
        shake(model, scale).eval()
        model.save_pretrained(tmp_path / "adapter")
        return model(tokens).logits.detach()

    return make
