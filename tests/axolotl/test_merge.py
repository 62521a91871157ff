"""The shard-by-shard merge against the model with its adapter, in this process."""

import json
import shutil

import pytest

pytest.importorskip("axolotl")

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors import safe_open
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel

from ndlora_plugins import NdLoraConfig
from ndlora_plugins.errors import NdLoraError, NdLoraValueError
from ndlora_plugins.integrations.axolotl.merge import NotInFilesError, merge_by_shard

CONFIGS = [
    {"method": "ndlinear", "r": 2, "lora_alpha": 6},
    {"method": "ndlinear", "init_lora_weights": "ndlinear", "num_modes": 3, "anchor": "snapshot"},
    {"method": "slora", "init_lora_weights": "s_lora", "r": 4, "use_rslora": True, "lora_alpha": 8},
    {"method": "nlora", "r": 4, "rank_pattern": {"q_proj": 2}},
    {"method": "nlora", "r": 4, "anchor": "none"},
    {"method": "inttune", "r": 4},
    {"method": "ndlinear", "r": 2, "modules_to_save": ["lm_head"]},
]
TOKENS = torch.arange(20)[None]


def base(directory, **options):
    return AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32, **options).eval()


def trained(directory, output, **options):
    """Save an adapter whose trainable tensors have been moved away from their start."""
    model = get_peft_model(base(directory), NdLoraConfig(task_type="CAUSAL_LM", **options))
    torch.manual_seed(1)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += 0.1 * torch.randn_like(parameter)
    model.save_pretrained(output)


def logits(model):
    with torch.no_grad():
        return model(TOKENS).logits


@pytest.fixture(scope="module")
def sharded(tiny, tmp_path_factory):
    """The tiny model in several files."""
    directory = tmp_path_factory.mktemp("sharded")
    base(tiny).save_pretrained(directory, max_shard_size="20KB")
    assert len(list(directory.glob("*.safetensors"))) > 2
    return directory


@pytest.mark.parametrize("options", CONFIGS, ids=[f"{c['method']}-{i}" for i, c in enumerate(CONFIGS)])
def test_merged_shards_give_the_logits_of_the_adapter(sharded, tmp_path, options):
    trained(sharded, tmp_path / "adapter", **options)
    assert merge_by_shard(str(sharded), str(tmp_path / "adapter"), tmp_path / "merged") == 14
    with_adapter = logits(PeftModel.from_pretrained(base(sharded), tmp_path / "adapter").eval())
    merged = logits(base(tmp_path / "merged"))
    assert (with_adapter - logits(base(sharded))).abs().max() > 1e-3
    torch.testing.assert_close(merged, with_adapter, atol=1e-5, rtol=1e-4)


def test_transposed_weights_of_gpt2(tmp_path):
    torch.manual_seed(0)
    GPT2LMHeadModel(
        GPT2Config(n_layer=2, n_embd=32, n_head=4, vocab_size=40, n_positions=64)
    ).save_pretrained(tmp_path / "base")
    trained(tmp_path / "base", tmp_path / "adapter", method="slora", r=4)
    merge_by_shard(str(tmp_path / "base"), str(tmp_path / "adapter"), tmp_path / "merged")
    with_adapter = logits(PeftModel.from_pretrained(base(tmp_path / "base"), tmp_path / "adapter").eval())
    torch.testing.assert_close(logits(base(tmp_path / "merged")), with_adapter, atol=1e-5, rtol=1e-4)


def test_stored_dtype_and_other_files_stay(tiny, tmp_path):
    AutoModelForCausalLM.from_pretrained(tiny, dtype=torch.bfloat16).save_pretrained(tmp_path / "base")
    shutil.copy(tiny / "tokenizer.json", tmp_path / "base")
    trained(tmp_path / "base", tmp_path / "adapter")
    merge_by_shard(str(tmp_path / "base"), str(tmp_path / "adapter"), tmp_path / "merged")
    with safe_open(tmp_path / "merged" / "model.safetensors", "pt") as file:
        assert {file.get_tensor(key).dtype for key in file.keys()} == {torch.bfloat16}
    assert (tmp_path / "merged" / "tokenizer.json").read_bytes() == (tiny / "tokenizer.json").read_bytes()


def test_weights_of_an_earlier_merge_are_replaced_and_what_else_lies_there_stays(sharded, tmp_path):
    trained(sharded, tmp_path / "adapter")
    merged = tmp_path / "merged"
    (merged / "notes").mkdir(parents=True)
    for name in ("model.safetensors", "model.gguf", "config.json", "notes/mine.txt"):
        (merged / name).write_text("of an earlier merge into one file")
    merge_by_shard(str(sharded), str(tmp_path / "adapter"), merged)
    assert not (merged / "model.safetensors").exists()
    base(merged)
    assert {(merged / name).read_text() for name in ("model.gguf", "notes/mine.txt")} == {
        "of an earlier merge into one file"
    }


def test_an_adapter_of_another_kind_is_refused(tiny, tmp_path):
    get_peft_model(base(tiny), LoraConfig()).save_pretrained(tmp_path / "adapter")
    with pytest.raises(NdLoraValueError, match="of type LORA"):
        merge_by_shard(str(tiny), str(tmp_path / "adapter"), tmp_path / "merged")


def test_another_base_model_is_refused_before_anything_is_written(tiny, sharded, tmp_path):
    trained(tiny, tmp_path / "adapter", method="inttune", r=4)
    model = base(tiny)
    for parameter in model.parameters():
        parameter.data += 0.1
    model.save_pretrained(tmp_path / "other")
    with pytest.raises(NdLoraValueError, match="differ from those"):
        merge_by_shard(str(tmp_path / "other"), str(tmp_path / "adapter"), tmp_path / "merged")
    assert not (tmp_path / "merged").exists()


def test_a_base_stored_quantised_is_left_to_the_loaded_model(tiny, tmp_path):
    trained(tiny, tmp_path / "adapter")
    shutil.copytree(tiny, tmp_path / "quantised")
    file = tmp_path / "quantised" / "config.json"
    quantised = {"quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": True}}
    file.write_text(json.dumps({**json.loads(file.read_text()), **quantised}))
    with pytest.raises(NotInFilesError, match="stored quantised") as caught:
        merge_by_shard(str(tmp_path / "quantised"), str(tmp_path / "adapter"), tmp_path / "merged")
    assert isinstance(caught.value, NdLoraError) and not (tmp_path / "merged").exists()


def test_a_missing_factor_is_an_error(tiny, tmp_path):
    from safetensors.torch import load_file, save_file

    trained(tiny, tmp_path / "adapter")
    file = tmp_path / "adapter" / "adapter_model.safetensors"
    state = load_file(file)
    del state[next(key for key in state if "layers.1" in key)]
    save_file(state, file)
    with pytest.raises(NdLoraValueError, match="of layer .*layers.1.* has none in"):
        merge_by_shard(str(tiny), str(tmp_path / "adapter"), tmp_path / "merged")
    assert not (tmp_path / "merged").exists()
