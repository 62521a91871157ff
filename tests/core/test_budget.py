"""The published counts, exactly, from the shapes of the layers; and what the plan says of awkward dimensions."""

import pytest
import torch

from ndlora_plugins.adapter import plan_layer
from ndlora_plugins.budget import check_size, make_budget
from ndlora_plugins.errors import NdLoraValueError
from ndlora_plugins.options import adapter_options


def decoder(layers, hidden, intermediate, heads, key_values):
    """(name, in_features, out_features) of every linear layer of a decoder; heads' sizes in all."""
    shapes = {
        "q_proj": (hidden, heads),
        "k_proj": (hidden, key_values),
        "v_proj": (hidden, key_values),
        "o_proj": (heads, hidden),
        "gate_proj": (hidden, intermediate),
        "up_proj": (hidden, intermediate),
        "down_proj": (intermediate, hidden),
    }
    return [(f"layers.{k}.{name}", *shape) for k in range(layers) for name, shape in shapes.items()]


QWEN3_17B = decoder(28, 2048, 6144, 2048, 1024)
LLAMA3_8B = decoder(32, 4096, 14336, 4096, 1024)
LLAMA2_7B = decoder(32, 4096, 11008, 4096, 4096)

# model, options, trainable, in the file; arXiv 2503.17353 table 4 and arXiv 2502.14482 table 1
PUBLISHED = [
    (QWEN3_17B, {"method": "ndlinear"}, 1_146_880, 1_146_880),
    (LLAMA3_8B, {"method": "ndlinear"}, 2_260_992, 2_260_992),
    (
        LLAMA2_7B,
        {"init_lora_weights": "n_lora", "rank": 128},
        319_815_680 + 3_670_016,
        319_815_680 + 3_670_016,
    ),
    (LLAMA2_7B, {"method": "slora", "rank": 128}, 319_815_680 + 3_670_016, 319_815_680 + 3_670_016),
    (LLAMA2_7B, {"method": "inttune", "rank": 128}, 3_670_016, 3_670_016),
    # as LoRA r=1, an eighth of 8,716,288 and of 20,971,520
    (QWEN3_17B, {"method": "crossed"}, 1_089_536, 1_089_536),
    (LLAMA3_8B, {"method": "crossed"}, 2_621_440, 2_621_440),
]
# model, rank, LoRA's count over the same layers
LORA = [
    (QWEN3_17B, 4, 4_358_144),
    (QWEN3_17B, 8, 8_716_288),
    (LLAMA3_8B, 8, 20_971_520),
    (LLAMA2_7B, 128, 319_815_680),
]


def budget_of(model, lora_rank=8, **options):
    chosen = adapter_options(**options)
    largest = tuple(max(sizes) for sizes in list(zip(*model, strict=True))[1:])
    plans = ((layer, plan_layer(chosen, *shape, layer, largest=largest)) for layer, *shape in model)
    return make_budget(plans, lora_rank)


@pytest.mark.parametrize("model, options, trainable, saved", PUBLISHED)
def test_published_counts(model, options, trainable, saved):
    budget = budget_of(model, **options)
    assert (budget.parameters, budget.saved) == (trainable, saved)


@pytest.mark.parametrize("model, rank, expected", LORA)
def test_lora_beside_it(model, rank, expected):
    assert budget_of(model, rank).lora_parameters == expected


def test_what_is_planned_is_what_is_trained():
    from peft import get_peft_model
    from transformers import Qwen3Config, Qwen3ForCausalLM

    from ndlora_plugins import NdLoraConfig
    from ndlora_plugins.integrations.peft import plan_model

    shape = {"hidden_size": 2048, "intermediate_size": 6144, "num_hidden_layers": 28}
    heads = {"num_attention_heads": 16, "num_key_value_heads": 8, "head_dim": 128}
    with torch.device("meta"):
        model = Qwen3ForCausalLM(Qwen3Config(**shape, **heads))
    budget = make_budget(plan_model(model, NdLoraConfig(method="ndlinear")))
    assert budget.parameters == budget_of(QWEN3_17B, method="ndlinear").parameters
    wrapped = get_peft_model(model, NdLoraConfig(method="ndlinear"))
    assert sum(p.numel() for p in wrapped.parameters() if p.requires_grad) == budget.parameters


def test_a_prime_dimension_is_noted():
    row = budget_of([("head", 2048, 4099)], method="ndlinear").rows[0]
    assert row.note == "lopsided: 45.3x the parameters of even modes"


def test_the_table_ends_in_the_totals():
    header, rows = budget_of([(f"layers.{i}.q_proj", 24, 24) for i in range(3)], method="ndlinear").table()
    assert len(rows) == 2 and all(len(row) == len(header) for row in rows)
    assert rows[0][:3] == ("q_proj", "3", "24 x 24") and rows[-1][4] == f"{3 * (4 * 4 + 6 * 6):,}"


def test_lora_on_experts_has_one_for_each():
    # peft/tuners/lora/layer.py `ParamWrapper`: lora_A (r * experts, in), lora_B (out, r * experts)
    plan = plan_layer(adapter_options("crossed"), 24, 5 * 18, "experts", leading=(5,))
    assert make_budget([("experts", plan)]).lora_parameters == 8 * 5 * (24 + 18)


@pytest.mark.parametrize("method", ["metatt", "nola", "shared_core", "crossed"])
def test_equal_layers_share_a_row_whatever_they_share(method):
    budget = budget_of(decoder(3, 48, 96, 48, 24), method=method)
    assert [row.count for row in budget.rows] == 7 * [3]
    if method == "metatt":  # two sides, three layers and seven kinds
        assert budget.parameters == 16 * 2 * 96 + (3 + 7) * 16 * 16


# method, r -> what the error must say of a layer of 18 x 24
TOO_LARGE = [
    (
        "slora",
        10**5,
        r"r=100000 makes an adapter of [\d,]+ numbers on layer 'q', .* times its weight of 18 x 24",
    ),
    (
        "metatt",
        10**6,
        r"r=1000000 makes shared factors of 2,[\d,]+ numbers .* times the widest weight of 18 x 24",
    ),
    ("nola", 10**7, r"r=10000000 makes shared factors of [\d,]+ numbers"),
]


@pytest.mark.parametrize("method, rank, message", TOO_LARGE)
def test_a_mistyped_rank_is_refused_before_memory_runs_out(method, rank, message):
    check_size(plan_layer(adapter_options(method, rank=8), 24, 18, "q"), "q")
    with pytest.raises(NdLoraValueError, match=message):
        check_size(plan_layer(adapter_options(method, rank=rank), 24, 18, "q"), "q")


@pytest.mark.parametrize("method, modes", [("ndlinear", "4x4, 6x6"), ("crossed", "6x4, 4x6"), ("slora", "-")])
def test_the_modes_of_a_row(method, modes):
    assert budget_of([("q", 24, 24)], method=method).rows[0].modes == modes
