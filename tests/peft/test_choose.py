"""The adapter for a budget: it fits, uses the budget up, trains, and says what it was measured to keep."""

import pytest
import torch
from peft import get_peft_model
from torch import nn
from transformers import BartConfig, BertConfig, GPT2Config, LlamaConfig, Qwen3Config, ViTConfig

from ndlora_plugins import NdLoraConfig
from ndlora_plugins.commands.choose import choose_for_config, parse_number
from ndlora_plugins.errors import NdLoraValueError
from ndlora_plugins.integrations.peft.choose import choose_adapter, lora_parameters
from ndlora_plugins.integrations.peft.skeleton import model_on_meta

# models that no track had
MODELS = {
    "llama": LlamaConfig(hidden_size=4096, intermediate_size=14336, num_hidden_layers=8, num_attention_heads=32,
                         num_key_value_heads=8, vocab_size=64),
    "qwen": Qwen3Config(hidden_size=2048, intermediate_size=6144, num_hidden_layers=6, num_attention_heads=16,
                        num_key_value_heads=8, head_dim=128, vocab_size=64),
    "gpt2": GPT2Config(vocab_size=64, n_layer=4, bos_token_id=0, eos_token_id=0),
    "bert": BertConfig(num_hidden_layers=4, vocab_size=64),
    "vit": ViTConfig(num_hidden_layers=4),
    # two numbered lists
    "bart": BartConfig(d_model=256, encoder_layers=6, decoder_layers=6, encoder_ffn_dim=512, decoder_ffn_dim=512,
                       vocab_size=64),
}  # fmt: skip
# parts of LoRA r=8's parameters, two a model
BUDGETS = [("llama", 5), ("llama", 90), ("qwen", 3), ("qwen", 12), ("gpt2", 7.3), ("gpt2", 40), ("bert", 20),
           ("bert", 100), ("vit", 10), ("vit", 33), ("bart", 9), ("bart", 21)]  # fmt: skip
# what follows `ndlora plan MODEL` -> what the error says
WRONG = {
    "two budgets": ({"parameters": "1M", "file_bytes": "1MB"}, "Give one budget"),
    "a part of nothing": ({"parameters": "1M", "fraction": "1/2"}, "Give one budget"),
    "no number": ({"parameters": "many"}, "write a number such as"),
    "no bytes": ({"file_bytes": "2XB"}, "'2XB': write a number such as"),
    "no fraction": ({"like_lora_r": 8, "fraction": "1/0"}, "write it as 1/16"),
    "nothing fits": ({"parameters": "2"}, "the smallest has"),
    "no such layer": ({"parameters": "1k", "target_modules": ["nothing"]}, "match no layer"),
}
NUMBERS = {"1M": 10**6, "250k": 250_000, "1.5M": 1_500_000, "1_000": 1000, "1,000": 1000}


@pytest.fixture(scope="module")
def networks():
    return {name: model_on_meta(config) for name, config in MODELS.items()}


@pytest.mark.parametrize("model, part", BUDGETS)
def test_a_budget_is_used_up_and_never_exceeded(model, part, networks):
    limit = int(lora_parameters(networks[model], 8) / part)
    choice = choose_adapter(networks[model], parameters=limit)
    assert 0.98 * limit <= choice.budget.parameters <= limit
    assert choice.measured and choice.kept


class Towers(nn.Module):
    """The name of one list is the end of the other's."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(nn.Sequential(nn.Linear(64, 64)) for _ in range(6))
        self.vision = nn.Module()
        self.vision.layers = nn.ModuleList(nn.Sequential(nn.Linear(64, 64)) for _ in range(6))


@pytest.mark.parametrize("limit", range(200, 4000, 190))
def test_a_pattern_that_stands_for_other_layers_too_exceeds_no_budget(limit):
    assert choose_adapter(Towers(), parameters=limit).budget.parameters <= limit


def test_bytes_are_those_of_the_file(networks):
    choice = choose_adapter(networks["qwen"], file_bytes=100_000)
    assert 98_000 <= 4 * choice.budget.saved <= 100_000


@pytest.mark.parametrize("part", (6, 70))
def test_what_is_chosen_trains_with_as_many_parameters(part):
    config = LlamaConfig(hidden_size=64, intermediate_size=128, num_hidden_layers=3, num_attention_heads=4,
                         vocab_size=16)  # fmt: skip
    torch.manual_seed(0)
    model = model_on_meta(config).to_empty(device="cpu")
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.02)
    choice = choose_adapter(model, parameters=lora_parameters(model, 8) // part)
    made = get_peft_model(model, eval(choice.python.partition("#")[0], {"NdLoraConfig": NdLoraConfig}))
    assert sum(p.numel() for p in made.parameters() if p.requires_grad) == choice.budget.parameters


def test_a_budget_that_no_track_had_is_said_to_be_one(networks):
    assert not choose_adapter(networks["llama"], parameters=3000).measured


@pytest.mark.parametrize("given, message", WRONG.values(), ids=WRONG)
def test_wrong_budgets(given, message, tmp_path):
    LlamaConfig(hidden_size=64, intermediate_size=128, num_hidden_layers=1, vocab_size=16).save_pretrained(
        tmp_path
    )
    with pytest.raises(NdLoraValueError, match=message):
        choose_for_config(str(tmp_path), **given)


@pytest.mark.parametrize("text, number", NUMBERS.items())
def test_numbers(text, number):
    assert parse_number(text) == number
