"""Adapters of experts as PEFT's own LoRA with `target_parameters`: the same logits, whichever side inputs are on."""

import pytest
import torch
from peft import PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, GptOssConfig, MixtralConfig, Qwen3MoeConfig

from ndlora_plugins import NdLoraConfig
from ndlora_plugins.errors import NdLoraValueError
from ndlora_plugins.integrations.peft.files.export import export_adapter

SIZES = {
    "hidden_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 64,
}
BASES = {
    "mixtral": MixtralConfig(**SIZES, intermediate_size=40, num_local_experts=3),
    "qwen3_moe": Qwen3MoeConfig(**SIZES, moe_intermediate_size=40, num_experts=4, num_experts_per_tok=2, head_dim=12),
    "gpt_oss, inputs first": GptOssConfig(
        **SIZES, intermediate_size=40, num_local_experts=3, num_experts_per_tok=2, head_dim=12,
        layer_types=["full_attention"] * 2,
    ),
}  # fmt: skip
EXPERTS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
ADAPTERS = {
    "crossed": {},
    "slora": {"method": "slora", "r": 4},
    "attention too, of another rank": {
        "method": "slora", "r": 4, "target_modules": ["q_proj"], "rank_pattern": {"q_proj": 2},
    },
}  # fmt: skip
TOKENS = torch.arange(24).view(2, 12)


@pytest.fixture
def saved(tmp_path, shake):
    """A function: saves a base and a trained adapter of its experts, and gives the logits."""

    def save(base, options):
        torch.manual_seed(0)
        AutoModelForCausalLM.from_config(BASES[base]).save_pretrained(tmp_path / "base")
        model = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
        config = NdLoraConfig(**{"target_modules": [], "target_parameters": EXPERTS, **options})
        model = shake(get_peft_model(model, config), scale=0.3).eval()
        model.save_pretrained(tmp_path / "adapter")
        with model.disable_adapter():
            before = model(TOKENS).logits
        return before, model(TOKENS).logits

    return save


@pytest.mark.parametrize("adapter", ADAPTERS)
@pytest.mark.parametrize("base", BASES)
def test_stock_peft_answers_as_the_adapter(base, adapter, saved, tmp_path):
    before, expected = saved(base, ADAPTERS[adapter])
    export_adapter(tmp_path / "adapter", tmp_path / "lora", base=str(tmp_path / "base"), any_size=True)
    stock = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    found = PeftModel.from_pretrained(stock, tmp_path / "lora").eval()(TOKENS).logits
    assert (expected - before).abs().max() > 1e-2
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_the_base_model_has_to_be_named(saved, tmp_path):
    saved("mixtral", {})
    with pytest.raises(
        NdLoraValueError, match=r"does not say which side its inputs are on: name the base model"
    ):
        export_adapter(tmp_path / "adapter", tmp_path / "lora")
