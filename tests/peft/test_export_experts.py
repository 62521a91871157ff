"""Adapters of experts leave: as PEFT's LoRA with `target_parameters`, and merged into files of single experts."""

import pytest
import torch
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, GptOssConfig, HrmTextConfig, MixtralConfig, Qwen3MoeConfig

from ndlora_plugins import NdLoraConfig
from ndlora_plugins.errors import NdLoraValueError
from ndlora_plugins.integrations.peft.exports.export import export_adapter
from ndlora_plugins.integrations.peft.files.base import NotInFilesError

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
    "nlora, its start read from the weights": {"method": "nlora", "r": 4},
    "attention too, of another rank": {
        "method": "slora", "r": 4, "target_modules": ["q_proj"], "rank_pattern": {"q_proj": 2},
    },
}  # fmt: skip
TOKENS = torch.arange(24).view(2, 12)


@pytest.fixture
def saved(tmp_path, shake):
    """A function: saves a base and a trained adapter of its experts, and gives the logits."""

    def save(base, options, shards="5GB"):
        torch.manual_seed(0)
        AutoModelForCausalLM.from_config(BASES[base]).save_pretrained(
            tmp_path / "base", max_shard_size=shards
        )
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
    report = export_adapter(
        tmp_path / "adapter", tmp_path / "lora", base=str(tmp_path / "base"), any_size=True
    )
    # vLLM 0.32 refuses it without: "contains fused 3D MoE weights [...] Start the engine with"
    assert (
        "--enable-mixed-moe-lora-format" in report.server_flags
        and '"is_3d_lora_weight": true' in report.server_flags
    )
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


@pytest.mark.parametrize("shards", ["5GB", "20KB"])
@pytest.mark.parametrize("adapter", ADAPTERS)
@pytest.mark.parametrize("base", BASES)
def test_merged_files_are_those_of_merge_and_unload(base, adapter, shards, saved, load, tmp_path):
    _, expected = saved(base, ADAPTERS[adapter], shards)
    report = export_adapter(tmp_path / "adapter", tmp_path / "out", "merged", base=str(tmp_path / "base"))
    found = load(tmp_path / "out")
    merged = load(tmp_path / "base", tmp_path / "adapter").merge_and_unload().state_dict()
    torch.testing.assert_close(found.state_dict(), merged, rtol=0, atol=1e-6)
    torch.testing.assert_close(found(TOKENS).logits, expected, rtol=1e-4, atol=1e-4)
    names = {layer.name: layer.parameters for layer in report.layers}
    model = load(tmp_path / "base")
    assert all(
        names[f"model.layers.{k}.{e}"] == model.get_parameter(f"model.layers.{k}.{e}").numel()
        for k in (0, 1)
        for e in EXPERTS
    )
    assert 0 <= report.largest_error < 1e-4


def test_quantised_experts_have_no_place_in_the_files(saved, tmp_path):
    saved("mixtral", {})
    file = tmp_path / "base/model.safetensors"
    tensors = load_file(file)
    name = "model.layers.0.block_sparse_moe.experts.0.w1.weight"
    save_file({**tensors, name: tensors[name].to(torch.int8)}, file, {"format": "pt"})
    with pytest.raises(
        NotInFilesError, match=r"'model.layers.0.mlp.experts.gate_up_proj' is stored as torch.int8"
    ):
        export_adapter(tmp_path / "adapter", tmp_path / "out", "merged", base=str(tmp_path / "base"))
    assert not (tmp_path / "out").exists()


def test_layers_that_the_files_join_leave_as_lora_and_are_not_merged(tmp_path):
    sizes = {"hidden_size": 48, "intermediate_size": 64, "num_attention_heads": 4, "num_key_value_heads": 4}
    model = AutoModelForCausalLM.from_config(HrmTextConfig(**sizes, vocab_size=64, num_hidden_layers=2))
    model.save_pretrained(tmp_path / "base")
    get_peft_model(model, NdLoraConfig(target_modules=["gate_proj"])).save_pretrained(tmp_path / "adapter")
    base = str(tmp_path / "base")
    assert export_adapter(tmp_path / "adapter", tmp_path / "lora", base=base, any_size=True).layers
    with pytest.raises(NotInFilesError, match="joins several layers in a tensor, load it with its adapter"):
        export_adapter(tmp_path / "adapter", tmp_path / "out", "merged", base=base)
