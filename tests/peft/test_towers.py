"""Parts of multimodal models: which layers the shorthands take, what the plan shows, when a tower is warned of."""

import warnings

import pytest
import torch
from peft import get_peft_model
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

from ndlora_plugins import NdLoraConfig
from ndlora_plugins.commands.plan import plan_from_model_config
from ndlora_plugins.errors import NdLoraValueError, NdLoraWarning
from ndlora_plugins.integrations.peft.tuner.targets import plan_model

SMALL = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
# target_modules -> the parts that are adapted, and whether it is warned of
TARGETS = {
    "language-linear": ({"language_model"}, False),
    "vision-linear": ({"vision_tower"}, False),
    "all-linear": ({"language_model", "vision_tower", "multi_modal_projector"}, True),
    ("q_proj", "v_proj"): ({"language_model", "vision_tower"}, True),
    ("vision_tower.encoder.layers.0.self_attn.q_proj",): ({"vision_tower"}, False),
    r".*\.q_proj": ({"language_model", "vision_tower"}, False),
}


@pytest.fixture
def vlm():
    """A tiny random LLaVA: a CLIP tower of two layers, a projector, a Llama of two."""
    tower = CLIPVisionConfig(**SMALL, image_size=8, patch_size=4, projection_dim=32)
    text = LlamaConfig(**SMALL, num_key_value_heads=2, vocab_size=64)
    torch.manual_seed(0)
    parts = {"vision_config": tower, "text_config": text, "image_token_id": 63, "image_seq_length": 4}
    return LlavaForConditionalGeneration(LlavaConfig(**parts)).eval()


def given(targets):
    return list(targets) if isinstance(targets, tuple) else targets


@pytest.mark.parametrize("targets", TARGETS)
def test_which_parts_are_adapted(vlm, targets):
    parts, warned = TARGETS[targets]
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        model = get_peft_model(vlm, NdLoraConfig(target_modules=given(targets)))
    names = [name for name, value in model.named_parameters() if value.requires_grad]
    assert {name.split(".")[3] for name in names} == parts
    told = [str(each.message) for each in caught if issubclass(each.category, NdLoraWarning)]
    assert [text for text in told if "target_modules='language-linear' leaves them out" in text] == told
    assert bool(told) == warned


def test_the_parts_train_and_are_merged(vlm, shake):
    inputs = {
        "input_ids": torch.tensor([[63, 63, 63, 63, 5, 6, 7]]),
        "pixel_values": torch.linspace(-1, 1, 3 * 64).view(1, 3, 8, 8),
    }
    before = vlm(**inputs).logits
    model = get_peft_model(vlm, NdLoraConfig(target_modules="vision-linear")).eval()
    torch.testing.assert_close(model(**inputs).logits, before)
    after = shake(model)(**inputs).logits
    assert not torch.allclose(after, before)
    torch.testing.assert_close(model.merge_and_unload()(**inputs).logits, after, atol=1e-4, rtol=1e-4)


def test_what_is_saved_loads_without_a_warning(vlm, shake, no_warnings, tmp_path):
    from peft import PeftModel

    model = shake(get_peft_model(vlm, NdLoraConfig(target_modules="vision-linear")))
    model.save_pretrained(tmp_path)
    PeftModel.from_pretrained(model.unload(), tmp_path)


def test_the_plan_shows_the_split(vlm, tmp_path):
    vlm.config.save_pretrained(tmp_path)
    rows = {row.layer: row.count for row in plan_from_model_config(str(tmp_path)).rows}
    assert rows["q_proj (language)"] == rows["q_proj (vision)"] == 2
    assert rows["linear_1 (between)"] == 1
    rows = plan_from_model_config(str(tmp_path), target_modules="language-linear").rows
    assert {row.layer.rpartition(" ")[2] for row in rows} == {"(language)"}


def test_models_of_one_part(make_llama):
    every = [name for name, _ in plan_model(make_llama(), NdLoraConfig())]
    assert [
        name for name, _ in plan_model(make_llama(), NdLoraConfig(target_modules="language-linear"))
    ] == every
    with pytest.raises(NdLoraValueError, match="LlamaForCausalLM has no vision part .* it has one part only"):
        plan_model(make_llama(), NdLoraConfig(target_modules="vision-linear"))


def test_layers_to_transform_goes_with_a_shorthand(vlm):
    config = NdLoraConfig(target_modules="language-linear", layers_to_transform=[0])
    names = [name for name, _ in plan_model(vlm, config)]
    assert names and all("language_model" in name and ".layers.0." in name for name in names)
