"""AsyncGRPO's adapter-only sync: what a vLLM server gets at every step is the exported LoRA, and nothing is merged."""

import json
from types import SimpleNamespace

import pytest
import torch
from accelerate import PartialState
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file

from ndlora_plugins import NdLoraConfig
from ndlora_plugins.integrations.peft.exports.export import export_adapter

pytest.importorskip("trl")
trainer = pytest.importorskip("trl.experimental.async_grpo.async_grpo_trainer")
if not hasattr(trainer, "save_lora_adapter"):
    pytest.skip("this TRL syncs no adapters", allow_module_level=True)

SERVER = {"lora_config": {"max_lora_rank": 16, "max_loras": 8}, "parallel_config": {"data_parallel_size": 1}}
ARGUMENTS = SimpleNamespace(max_staleness=1)
MAIN = SimpleNamespace(is_main_process=True, device=torch.device("cpu"))
SYNCED = {
    "crossed": {},
    "slora": {"method": "slora", "r": 4},
    "nlora": {"method": "nlora", "r": 4},
    "inttune": {"method": "inttune", "r": 8},
    "metatt": {"method": "metatt", "r": 4},
    "ranks that differ": {"method": "slora", "r": 4, "rank_pattern": {"q_proj": 2}, "lora_alpha": 12},
}
# adapter -> words of the warning with which TRL goes back to merged weights
MERGED = {
    "no exact LoRA": ({"method": "ndlinear"}, "has no exact form of a small rank"),
    "a trained head": ({"modules_to_save": ["lm_head"]}, "has no place in a LoRA that vLLM serves"),
    "an adapted head": ({"target_modules": ["q_proj", "lm_head"]}, "is a model's output layer"),
    "biases": ({"bias": "all"}, "bias='all'"),
}


@pytest.fixture(autouse=True)
def synced(monkeypatch):
    """TRL's two functions, put back afterwards."""
    from ndlora_plugins.integrations.trl import sync_as_lora

    for name in ("validate_lora_for_vllm_sync", "save_lora_adapter"):
        monkeypatch.setattr(trainer, name, getattr(trainer, name))
    sync_as_lora()
    sync_as_lora()  # a second call changes nothing
    assert not hasattr(trainer.save_lora_adapter.__wrapped__, "__wrapped__")


@pytest.mark.parametrize("case", SYNCED)
def test_the_server_gets_the_exported_lora_at_every_step(case, make_llama, shake, tmp_path):
    base = make_llama()
    base.save_pretrained(tmp_path / "base")
    model = get_peft_model(
        base, NdLoraConfig(target_modules="all-linear", task_type="CAUSAL_LM", **SYNCED[case])
    )
    weights = {name: value.clone() for name, value in model.named_parameters() if "base_layer" in name}
    assert trainer.select_adapter_sync(SERVER, model, ARGUMENTS)
    for step in (1, 2):
        shake(model, seed=step)
        trainer.save_lora_adapter(model, MAIN, "default", str(tmp_path / "synced"))
        model.save_pretrained(tmp_path / f"adapter-{step}")
        export_adapter(tmp_path / f"adapter-{step}", tmp_path / f"lora-{step}", base=str(tmp_path / "base"))
        found, expected = (
            load_file(tmp_path / folder / "adapter_model.safetensors")
            for folder in ("synced", f"lora-{step}")
        )
        assert found.keys() == expected.keys()
        for name in expected:
            torch.testing.assert_close(found[name], expected[name])
        configs = [
            json.loads((tmp_path / folder / "adapter_config.json").read_text())
            for folder in ("synced", f"lora-{step}")
        ]
        assert configs[0] == {**configs[1], "base_model_name_or_path": configs[0]["base_model_name_or_path"]}
    assert all(torch.equal(model.get_parameter(name), value) for name, value in weights.items())


@pytest.mark.parametrize("case", MERGED)
def test_what_is_no_lora_is_merged_as_before(case, make_llama):
    PartialState()  # TRL's logger asks for it
    options, words = MERGED[case]
    model = get_peft_model(make_llama(), NdLoraConfig(**{"target_modules": "all-linear", **options}))
    with pytest.raises(ValueError, match=words):
        trainer.validate_lora_for_vllm_sync(model)
    assert not trainer.select_adapter_sync(SERVER, model, ARGUMENTS)


def test_pefts_own_lora_goes_its_own_way(make_llama, tmp_path):
    model = get_peft_model(make_llama(), LoraConfig(r=4, target_modules=["q_proj"]))
    assert trainer.validate_lora_for_vllm_sync(model).r == 4
    trainer.save_lora_adapter(model, MAIN, "default", str(tmp_path / "synced"))
    assert (tmp_path / "synced/adapter_model.safetensors").is_file()
