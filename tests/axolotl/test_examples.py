"""The YAMLs of examples/axolotl: each validated by Axolotl and planned at full size, without weights."""

from pathlib import Path

import pytest

pytest.importorskip("axolotl")

import yaml
from axolotl.integrations.base import PluginManager
from click.testing import CliRunner
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, Qwen3Config

from ndlora_plugins.errors import NdLoraValueError
from ndlora_plugins.integrations.axolotl.cli import ndlora_plan, plan_yaml

EXAMPLES = Path(__file__).parents[2] / "examples" / "axolotl"
SMOL = LlamaConfig(
    hidden_size=576,
    intermediate_size=1536,
    num_hidden_layers=30,
    num_attention_heads=9,
    num_key_value_heads=3,
    vocab_size=49152,
)
QWEN = Qwen3Config(
    hidden_size=2048,
    intermediate_size=6144,
    num_hidden_layers=28,
    num_attention_heads=16,
    num_key_value_heads=8,
    head_dim=128,
)
LLAMA2 = LlamaConfig(hidden_size=4096, intermediate_size=11008, num_hidden_layers=32, num_attention_heads=32)
LLAMA3 = LlamaConfig(
    hidden_size=4096,
    intermediate_size=14336,
    num_hidden_layers=32,
    num_attention_heads=32,
    num_key_value_heads=8,
)
# SLoRA r=16 on Qwen3-1.7B: 16 (in + out) + 16^2 for each of seven projections
SLORA = 28 * sum(
    16 * (i + o) + 256
    for i, o in [
        (2048, 2048),
        (2048, 1024),
        (2048, 1024),
        (2048, 2048),
        (2048, 6144),
        (2048, 6144),
        (6144, 2048),
    ]
)
# file, model, method, trainable parameters
PLANS = {
    "demo.yml": (SMOL, "crossed", 305_280),
    "qwen3-1.7b-math10k-ndlinear.yml": (QWEN, "ndlinear", 1_146_880),
    "llama3-8b-math10k-ndlinear.yml": (LLAMA3, "ndlinear", 2_260_992),
    "llama2-7b-metamathqa-nlora.yml": (LLAMA2, "nlora", 319_815_680 + 3_670_016),
    "llama2-7b-metamathqa-inttune.yml": (LLAMA2, "inttune", 3_670_016),
    "llama3-8b-4bit-ndlinear.yml": (LLAMA3, "ndlinear", 4 * 2_260_992),
    "qwen3-1.7b-dpo-slora.yml": (QWEN, "slora", SLORA),
}


@pytest.fixture(autouse=True)
def plugins_as_before():
    manager = PluginManager.get_instance()
    before = dict(manager.plugins)
    yield
    manager.plugins.clear()
    manager.plugins.update(before)


def test_every_example_is_planned():
    assert set(PLANS) == {file.name for file in EXAMPLES.glob("*.yml")}


@pytest.mark.parametrize("name", PLANS)
def test_an_example_is_valid_and_costs_what_it_says(name, tmp_path):
    model, method, parameters = PLANS[name]
    model.save_pretrained(tmp_path)
    config, budget = plan_yaml(EXAMPLES / name, str(tmp_path))
    assert config.method == method
    assert parameters in (None, budget.parameters)
    layers = model.num_hidden_layers
    assert budget.layers == 7 * layers


def test_the_command_prints_the_plan(tiny, least, tmp_path):
    file = tmp_path / "config.yml"
    file.write_text(yaml.safe_dump({**least(tmp_path / "out"), "lora_target_modules": ["q_proj"]}))
    done = CliRunner().invoke(ndlora_plan, [str(file)])
    assert done.exit_code == 0, done.output
    assert "q_proj" in done.output and "128 trainable parameters" in done.output


@pytest.mark.parametrize(
    "keys, message",
    [
        ({"adapter": "lora"}, "adapter: lora"),
        ({"peft_use_dora": True}, "peft_use_dora"),
        ({"lora_target_modules": ["no_such_proj"]}, "no_such_proj"),
    ],
)
def test_the_command_says_what_is_wrong(tiny, least, tmp_path, keys, message):
    file = tmp_path / "config.yml"
    file.write_text(yaml.safe_dump({**least(tmp_path / "out"), **keys}))
    done = CliRunner().invoke(ndlora_plan, [str(file)])
    assert done.exit_code == 1 and message in done.output
    with pytest.raises(NdLoraValueError, match=message):
        plan_yaml(file)


def test_what_axolotl_refuses_is_said_in_words(tiny, least, tmp_path):
    file = tmp_path / "config.yml"
    file.write_text(yaml.safe_dump({**least(tmp_path / "out"), "ndlora": {"no_such_option": 1}}))
    done = CliRunner().invoke(ndlora_plan, [str(file)])
    assert done.exit_code == 1 and "no_such_option" in done.output


def test_a_model_that_sees_is_planned_as_what_it_is(tiny, least, tmp_path):
    small = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    tower = CLIPVisionConfig(**small, image_size=8, patch_size=4)
    text = LlamaConfig(**small, vocab_size=64)
    vlm = LlavaConfig(vision_config=tower, text_config=text, architectures=["LlavaForConditionalGeneration"])
    vlm.save_pretrained(tmp_path / "vlm")
    file = tmp_path / "config.yml"
    file.write_text(yaml.safe_dump({**least(tmp_path / "out"), "lora_target_modules": ["q_proj"]}))
    assert (
        plan_yaml(file, model=str(tmp_path / "vlm"))[1].layers == 2
    )  # of the tower and of the language model
