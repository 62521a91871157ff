"""A LoRA in GGUF is the exported LoRA under llama.cpp's names, in its order of rows; what has no place is refused.

That llama.cpp's own server answers with it as PEFT does is shown by `python -m benchmarks.serving` (docs/serving.md).
"""

import sys

import pytest
import torch
from peft import get_peft_model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, LlamaConfig, OPTConfig, Qwen2Config
from transformers.modeling_gguf_pytorch_utils import LlamaTensorProcessor

from ndlora_plugins import NdLoraConfig
from ndlora_plugins.errors import MissingExtraError, NdLoraValueError
from ndlora_plugins.integrations.peft.exports.export import export_adapter
from ndlora_plugins.integrations.peft.exports.gguf import GGUF_FILE

gguf = pytest.importorskip("gguf")

SIZES = {
    "hidden_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 96,
    "vocab_size": 64,
}
BASES = {
    "llama": LlamaConfig(**SIZES),
    "llama, tied": LlamaConfig(**SIZES, tie_word_embeddings=True),
    "qwen2": Qwen2Config(**SIZES),
    "opt": OPTConfig(
        hidden_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        ffn_dim=96,
        vocab_size=64,
        word_embed_proj_dim=48,
    ),
}
# the last names of layers -> llama.cpp's, as its gguf-py/gguf/tensor_mapping.py has them
NAMES = {
    "q_proj": "attn_q", "k_proj": "attn_k", "v_proj": "attn_v", "o_proj": "attn_output",
    "gate_proj": "ffn_gate", "up_proj": "ffn_up", "down_proj": "ffn_down",
}  # fmt: skip
# base, adapter, the dtype that is asked for
WRITTEN = {
    "crossed": ("llama", {}, None),
    "slora in half precision": ("llama", {"method": "slora", "r": 4}, torch.float16),
    "ranks that differ": ("llama", {"method": "slora", "r": 4, "rank_pattern": {"k_proj": 2}}, None),
    "read from the weights": ("llama", {"method": "nlora", "r": 4}, None),
    "rows in their order": ("qwen2", {"method": "slora", "r": 4}, torch.bfloat16),
}
# base, adapter, what the message says
REFUSED = {
    "an unknown architecture": ("opt", {}, "model_type='opt' .* is not in the table .* llama, mistral"),
    "a trained head": (
        "llama",
        {"modules_to_save": ["lm_head"]},
        "holds two matrices for a linear layer only",
    ),
    "trained tokens": (
        "llama",
        {"trainable_token_indices": [1]},
        "holds two matrices for a linear layer only",
    ),
    "a tied head": (
        "llama, tied",
        {"target_modules": ["lm_head"]},
        "no name of its own in llama.cpp's llama",
    ),
}


@pytest.fixture
def adapter(tmp_path, shake):
    """A function: saves a base model and an adapter of it."""

    def save(base, options):
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(BASES[base])
        model.save_pretrained(tmp_path / "base")
        config = NdLoraConfig(target_modules=options.pop("target_modules", "all-linear"), **options)
        model = shake(get_peft_model(AutoModelForCausalLM.from_pretrained(tmp_path / "base"), config))
        model.save_pretrained(tmp_path / "adapter", save_embedding_layers=False)
        return tmp_path / "adapter"

    return save


def export(adapter, to, **options):
    output = adapter.with_name(to)
    export_adapter(adapter, output, to, base=str(adapter.with_name("base")), **options)
    return output


def updates(directory):
    """Layer's name -> B A of a stock LoRA."""
    tensors = load_file(directory / "adapter_model.safetensors")
    return {
        name.removeprefix("base_model.model.").removesuffix(".lora_A.weight"): tensors[
            name.replace("lora_A", "lora_B")
        ].double()
        @ value.double()
        for name, value in tensors.items()
        if "lora_A" in name
    }


@pytest.mark.parametrize("case", WRITTEN)
def test_the_file_holds_the_lora(case, adapter):
    base, options, dtype = WRITTEN[case]
    saved = adapter(base, dict(options))
    expected = updates(export(saved, "lora", dtype=dtype))
    reader = gguf.GGUFReader(export(saved, "gguf", dtype=dtype) / GGUF_FILE)
    fields = {name: field.contents() for name, field in reader.fields.items()}
    assert (fields["general.type"], fields["adapter.type"]) == ("adapter", "lora")
    tensors = {each.name: torch.from_numpy(each.data.copy()).double() for each in reader.tensors}
    assert {each.tensor_type.name for each in reader.tensors} == {"F16" if dtype == torch.float16 else "F32"}
    order = LlamaTensorProcessor({"num_attention_heads": 4, "num_key_value_heads": 2})
    for layer, update in expected.items():
        _, _, block, _, last = layer.split(".")
        name = f"blk.{block}.{NAMES[last]}.weight"
        a, b = tensors.pop(f"{name}.lora_a"), tensors.pop(f"{name}.lora_b")
        # https://github.com/ggml-org/llama.cpp/blob/master/src/llama-adapter.h: scale = alpha / rank of the layer
        found = fields["adapter.lora.alpha"] / len(a) * (b @ a)
        if fields["general.architecture"] == "llama":
            found = torch.from_numpy(order.process(found.numpy(), name=name).weights)
        torch.testing.assert_close(found, update, rtol=2e-3 if dtype == torch.float16 else 1e-5, atol=1e-6)
    assert not tensors


@pytest.mark.parametrize("case", REFUSED)
def test_what_has_no_place_in_gguf_is_refused(case, adapter):
    base, options, message = REFUSED[case]
    saved = adapter(base, dict(options))
    with pytest.raises(NdLoraValueError, match=f"(?s){message}"):
        export(saved, "gguf")
    assert sorted(path.name for path in saved.parent.iterdir()) == ["adapter", "base"]


def test_without_the_package_nothing_is_written(adapter, monkeypatch):
    saved = adapter("llama", {})
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(MissingExtraError, match=r"ndlora-plugins\[gguf\]"):
        export(saved, "gguf")
    assert sorted(path.name for path in saved.parent.iterdir()) == ["adapter", "base"]
