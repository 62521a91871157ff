"""The published counts, exactly, on the meta device; and what the plan says of awkward dimensions."""

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, Qwen3Config, Qwen3ForCausalLM

from ndlora_plugins import NdLoraConfig
from ndlora_plugins.adapter import AdapterOptions, plan_layer
from ndlora_plugins.budget import make_budget
from ndlora_plugins.integrations.peft import plan_model

QWEN3 = {
    "hidden_size": 2048, "intermediate_size": 6144, "num_hidden_layers": 28, "num_attention_heads": 16,
    "num_key_value_heads": 8, "head_dim": 128,
}  # fmt: skip
LLAMA3 = {
    "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32,
    "num_key_value_heads": 8,
}  # fmt: skip
LLAMA2 = {**LLAMA3, "intermediate_size": 11008, "num_key_value_heads": 32}
QWEN3_17B = (Qwen3Config, Qwen3ForCausalLM, QWEN3)
LLAMA3_8B = (LlamaConfig, LlamaForCausalLM, LLAMA3)
LLAMA2_7B = (LlamaConfig, LlamaForCausalLM, LLAMA2)

# model, options, trainable, in the file; arXiv 2503.17353 table 4 and arXiv 2502.14482 table 1
PUBLISHED = [
    (QWEN3_17B, {}, 1_146_880, 1_146_880),
    (LLAMA3_8B, {}, 2_260_992, 2_260_992),
    (LLAMA2_7B, {"init_lora_weights": "n_lora", "r": 128}, 319_815_680 + 3_670_016, 319_815_680 + 3_670_016),
    (LLAMA2_7B, {"method": "slora", "r": 128}, 319_815_680 + 3_670_016, 319_815_680 + 3_670_016),
    (LLAMA2_7B, {"method": "inttune", "r": 128}, 3_670_016, 3_670_016),
]
# model, rank, LoRA's count over the same layers
LORA = [
    (QWEN3_17B, 4, 4_358_144),
    (QWEN3_17B, 8, 8_716_288),
    (LLAMA3_8B, 8, 20_971_520),
    (LLAMA2_7B, 128, 319_815_680),
]


def on_meta(model):
    config, cls, options = model
    with torch.device("meta"):
        return cls(config(**options))


@pytest.mark.parametrize("model, options, trainable, saved", PUBLISHED)
def test_published_counts(model, options, trainable, saved):
    budget = make_budget(plan_model(on_meta(model), NdLoraConfig(**options)))
    assert (budget.parameters, budget.saved) == (trainable, saved)


@pytest.mark.parametrize("model, rank, expected", LORA)
def test_lora_beside_it(model, rank, expected):
    assert make_budget(plan_model(on_meta(model), NdLoraConfig()), lora_rank=rank).lora_parameters == expected


def test_what_is_planned_is_what_is_trained():
    from peft import get_peft_model

    model = on_meta(QWEN3_17B)
    budget = make_budget(plan_model(model, NdLoraConfig()))
    wrapped = get_peft_model(model, NdLoraConfig())
    assert sum(p.numel() for p in wrapped.parameters() if p.requires_grad) == budget.parameters


def test_a_prime_dimension_is_noted():
    row = make_budget([("head", plan_layer(AdapterOptions(), 2048, 4099, "head"))]).rows[0]
    assert "lopsided" in row.note


def test_the_table_ends_in_the_totals():
    layers = [(f"layers.{i}.q_proj", plan_layer(AdapterOptions(), 24, 24, "q")) for i in range(3)]
    header, rows = make_budget(layers).table()
    assert len(rows) == 2 and all(len(row) == len(header) for row in rows)
    assert rows[0][:3] == ("q_proj", "3", "24 x 24") and rows[-1][4] == f"{3 * (4 * 4 + 6 * 6):,}"
