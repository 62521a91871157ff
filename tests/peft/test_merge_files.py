"""The shard-by-shard merge against the adapter, and against PEFT's merge on the loaded model."""

import json

import pytest
import torch
from peft import get_peft_model
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from ndlora_plugins import NdLoraConfig
from ndlora_plugins.errors import NdLoraValueError
from ndlora_plugins.integrations.peft.exports.export import export_adapter
from ndlora_plugins.integrations.peft.files.adapter import AdapterReader
from ndlora_plugins.integrations.peft.files.base import NotInFilesError

METHODS = {
    "ndlinear": {"method": "ndlinear", "lora_alpha": 3},
    "ndlinear-3-modes-4-terms": {"method": "ndlinear", "num_modes": 3, "r": 4},
    "ndlinear-reference-start": {"init_lora_weights": "ndlinear"},
    "ndlinear-crossed": {"crossed_modes": 2, "r": 2},
    "nlora-pivots": {"init_lora_weights": "n_lora_pivots", "r": 4},
    "slora-rslora": {"method": "slora", "r": 4, "use_rslora": True},
    "slora-from-weights": {"method": "slora", "init_lora_weights": "n_lora", "r": 4},
    "nlora": {"method": "nlora", "r": 4},
    "nlora-no-anchor": {"method": "nlora", "r": 4, "anchor": "none"},
    "inttune": {"method": "inttune", "r": 4},
    # the slices as they are: scaled ones would move the model so far that rounding shows
    "inttune-no-anchor": {"method": "inttune", "init_lora_weights": "n_lora", "r": 4, "anchor": "none"},
}
# model -> how far its merged weights may be from merge_and_unload
MODELS = {"make_llama": 0, "make_gpt2": 1e-6}
# what the index of a base model says of one tensor -> what the error must say; {outside} is a file beside the base
HOSTILE_SHARDS = {
    "absolute": ("{outside}", "must be a .safetensors file in"),
    "above": ("../outside.safetensors", "must be a .safetensors file in"),
    "above-by-a-detour": ("inside/../../outside.safetensors", "must be a .safetensors file in"),
    "through-a-link": ("linked/outside.safetensors", "must be a .safetensors file in"),
    "no-tensor-file": ("config.json", "must be a .safetensors file in"),
    "no-name": (5, "must be a .safetensors file in"),
    "another-shard": ("inside/outside.safetensors", "which it does not"),
}


@pytest.fixture(params=MODELS)
def make_model(request):
    make = request.getfixturevalue(request.param)
    make.rounding = MODELS[request.param]
    return make


@pytest.mark.parametrize("shards", ["5GB", "30KB"])
@pytest.mark.parametrize("case", METHODS)
def test_merged_files_are_those_of_merge_and_unload(
    case, shards, make_model, trained, tokens, tmp_path, load
):
    expected = trained(make_model, shards, **METHODS[case])
    before = {file.name: file.read_bytes() for file in (tmp_path / "base").iterdir()}
    report = export_adapter(tmp_path / "adapter", tmp_path / "out", "merged")
    assert {file.name: file.read_bytes() for file in (tmp_path / "base").iterdir()} == before
    assert {file.name for file in (tmp_path / "out").iterdir()} == set(before)
    merged = load(tmp_path / "base", tmp_path / "adapter").merge_and_unload().state_dict()
    found = load(tmp_path / "out")
    # bit for bit but for Conv1D, whose factors PEFT's way keeps transposed: another order of summation
    torch.testing.assert_close(found.state_dict(), merged, rtol=0, atol=make_model.rounding)
    torch.testing.assert_close(found(tokens).logits, expected, rtol=1e-4, atol=1e-4)
    assert report.largest_error < 1e-4 and len(report.layers) == len(
        AdapterReader(tmp_path / "adapter").shapes
    )


def test_merged_files_keep_their_layout_dtypes_and_company(make_llama, trained, tmp_path):
    trained(lambda: make_llama(dtype=torch.bfloat16), "20KB", method="nlora")
    (tmp_path / "base" / "tokenizer.json").write_text("{}")
    (tmp_path / "base" / "templates").mkdir()
    (tmp_path / "base" / "templates" / "chat.jinja").write_text("{{ messages }}")
    (tmp_path / "base" / "pytorch_model.bin").write_bytes(b"the same weights again")
    report = export_adapter(tmp_path / "adapter", tmp_path / "out", "merged")
    index = "model.safetensors.index.json"
    assert json.loads((tmp_path / "out" / index).read_text()) == json.loads(
        (tmp_path / "base" / index).read_text()
    )
    assert (tmp_path / "out" / "templates" / "chat.jinja").is_file() and (
        tmp_path / "out" / "tokenizer.json"
    ).is_file()
    assert not (tmp_path / "out" / "pytorch_model.bin").exists()
    for file in (tmp_path / "out").glob("*.safetensors"):
        assert {tensor.dtype for tensor in load_file(file).values()} == {torch.bfloat16}
        with safe_open(file, "pt") as opened, safe_open(tmp_path / "base" / file.name, "pt") as original:
            assert opened.metadata() == original.metadata() and set(opened.keys()) == set(original.keys())
    assert 1e-3 < report.largest_error < 0.1


@pytest.mark.parametrize("case", HOSTILE_SHARDS)
def test_an_index_leads_nowhere_outside(case, make_llama, trained, tmp_path):
    shard, message = HOSTILE_SHARDS[case]
    trained(make_llama, "20KB", method="slora")
    outside = tmp_path / "elsewhere" / "outside.safetensors"
    for directory in (outside.parent, tmp_path / "base" / "inside"):
        directory.mkdir()
        save_file({"odd": torch.ones(2)}, directory / outside.name)
    save_file({"odd": torch.ones(2)}, tmp_path / "outside.safetensors")
    (tmp_path / "base" / "linked").symlink_to(outside.parent)
    index = tmp_path / "base" / "model.safetensors.index.json"
    fields = json.loads(index.read_text())
    fields["weight_map"]["lm_head.weight"] = shard if shard == 5 else shard.format(outside=outside)
    index.write_text(json.dumps(fields))
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    with pytest.raises(NdLoraValueError, match=message):
        export_adapter(tmp_path / "adapter", tmp_path / "out", "merged")
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"weight_map": {}}', '{"weight_map": []}', "[" * 10**5])
def test_a_broken_index(text, make_llama, trained, tmp_path):
    trained(make_llama, "20KB", method="slora")
    (tmp_path / "base" / "model.safetensors.index.json").write_text(text)
    with pytest.raises(NdLoraValueError, match=r"index\.json (is truncated|must hold|has no weight_map)"):
        export_adapter(tmp_path / "adapter", tmp_path / "out", "merged")


def test_files_that_are_links_are_read_and_linked_directories_left_out(make_llama, trained, tmp_path, load):
    trained(make_llama, "20KB", method="slora")
    expected = load(tmp_path / "base", tmp_path / "adapter").merge_and_unload().state_dict()
    (tmp_path / "base").rename(tmp_path / "blobs")  # as in the hub's cache
    (tmp_path / "base").mkdir()
    for file in (tmp_path / "blobs").iterdir():
        (tmp_path / "base" / file.name).symlink_to(f"../blobs/{file.name}")
    (tmp_path / "base" / "linked").symlink_to("../adapter")
    export_adapter(tmp_path / "adapter", tmp_path / "out", "merged")
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        path.name for path in (tmp_path / "blobs").iterdir()
    }
    assert not any(path.is_symlink() for path in (tmp_path / "out").iterdir())
    torch.testing.assert_close(load(tmp_path / "out").state_dict(), expected, rtol=0, atol=0)


def test_rows_beyond_the_vocabulary_have_no_place_in_the_files(make_llama, trained, tmp_path):
    trained(make_llama, method="slora", trainable_token_indices=[3, 5])
    file = tmp_path / "adapter" / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "trainable_token_indices": [3, 500]}))
    with pytest.raises(NotInFilesError, match="rows up to 500 of 'model.embed_tokens.weight'"):
        export_adapter(tmp_path / "adapter", tmp_path / "out", "merged")


def test_a_head_that_the_dtype_of_the_base_cannot_hold(make_llama, trained, tmp_path):
    trained(lambda: make_llama(dtype=torch.float16), method="slora", modules_to_save=["lm_head"])
    file = tmp_path / "adapter" / "adapter_model.safetensors"
    tensors = load_file(file)
    tensors["base_model.model.lm_head.weight"] = torch.full((128, 48), 1e6)
    save_file({key: tensor.float() for key, tensor in tensors.items()}, file)
    with pytest.raises(
        NdLoraValueError, match="'lm_head.weight' holds NaN or infinity: its dtype torch.float16"
    ):
        export_adapter(tmp_path / "adapter", tmp_path / "out", "merged")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter", "base"]


def test_an_untied_head_is_written_beside_what_it_was_tied_to(make_llama, trained, tokens, tmp_path, load):
    tied = lambda: make_llama(tie_word_embeddings=True)  # noqa: E731
    expected = trained(tied, "20KB", method="slora", target_modules=["q_proj", "lm_head"])
    export_adapter(tmp_path / "adapter", tmp_path / "out", "merged")
    assert json.loads((tmp_path / "out" / "config.json").read_text())["tie_word_embeddings"] is False
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    assert index["weight_map"]["lm_head.weight"] == index["weight_map"]["model.embed_tokens.weight"]
    torch.testing.assert_close(load(tmp_path / "out")(tokens).logits, expected, rtol=1e-4, atol=1e-4)


def test_an_embedding_and_a_head_that_stayed_the_same_stay_tied(make_llama, trained, tmp_path, load):
    tied = lambda: make_llama(tie_word_embeddings=True)  # noqa: E731
    trained(tied, method="slora", modules_to_save=["embed_tokens", "lm_head"])
    file = tmp_path / "adapter" / "adapter_model.safetensors"
    tensors = load_file(file)
    one = tensors["base_model.model.lm_head.weight"]
    save_file({**tensors, "base_model.model.model.embed_tokens.weight": one.clone()}, file)
    export_adapter(tmp_path / "adapter", tmp_path / "out", "merged")
    merged = load(tmp_path / "out")
    assert merged.lm_head.weight is merged.model.embed_tokens.weight and torch.equal(
        merged.lm_head.weight, one
    )


def test_rows_of_a_resized_vocabulary_have_no_place_in_the_files(make_llama, trained, tmp_path):
    trained(make_llama, method="slora", modules_to_save=["lm_head"])
    file = tmp_path / "adapter" / "adapter_model.safetensors"
    tensors = load_file(file)
    tensors["base_model.model.lm_head.weight"] = torch.zeros(130, 48)
    save_file(tensors, file)
    with pytest.raises(
        NdLoraValueError, match=r"'lm_head.weight' \[130, 48\]; the base model's is \[128, 48\]"
    ):
        export_adapter(tmp_path / "adapter", tmp_path / "out", "merged")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter", "base"]


def test_an_adapter_of_a_model_without_its_head(make_llama, shake, tmp_path, load):
    make_llama().save_pretrained(tmp_path / "base")
    model = shake(get_peft_model(load(tmp_path / "base").model, NdLoraConfig(method="nlora"))).eval()
    model.save_pretrained(tmp_path / "adapter")
    export_adapter(tmp_path / "adapter", tmp_path / "out", "merged", base=str(tmp_path / "base"))
    x = torch.arange(20).view(2, 10)
    merged = load(tmp_path / "out").model(x).last_hidden_state
    torch.testing.assert_close(merged, model(x).last_hidden_state, rtol=1e-4, atol=1e-4)
