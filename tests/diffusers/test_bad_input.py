"""What cannot work is refused before a component is changed, and diffusers' LoRA functions say what to call instead."""

import re

import pytest
import torch

from ndlora_plugins import NdLoraConfig
from ndlora_plugins.errors import NdLoraValueError
from ndlora_plugins.integrations.diffusers import export_lora, load_adapter, save_adapter

pytest.importorskip("diffusers")
# what diffusers would write without a configuration, or read as nothing -> what we say
OF_DIFFUSERS = {
    "save_lora_adapter": (
        lambda pipe, adapter, output: pipe.transformer.save_lora_adapter(output),
        "save_lora_adapter writes no configuration that could be read again, and adapter 'default' is NDLORA",
    ),
    "save_lora_weights": (
        lambda pipe, adapter, output: pipe.save_lora_weights(
            output, transformer_lora_layers=dict(pipe.transformer.state_dict())
        ),
        "is a tensor of an NDLORA adapter. save_lora_weights writes LoRA only",
    ),
    "load_lora_adapter": (
        lambda pipe, adapter, output: pipe.transformer.load_lora_adapter(adapter),
        "holds an NDLORA adapter, and load_lora_adapter reads LoRA only",
    ),
    "load_lora_weights": (
        lambda pipe, adapter, output: pipe.load_lora_weights(
            adapter, weight_name="adapter_model.safetensors"
        ),
        "is a tensor of an NDLORA adapter. load_lora_adapter and load_lora_weights read LoRA only",
    ),
}
dit = pytest.mark.parametrize("architecture", ["dit"], indirect=True)
unet = pytest.mark.parametrize("architecture", ["unet"], indirect=True)


@pytest.fixture
def saved(make_pipeline, tmp_path):
    """A pipeline, and the directory of the adapter on its denoiser."""
    pipeline = make_pipeline()
    pipeline.denoiser.add_adapter(NdLoraConfig())
    save_adapter(pipeline.denoiser, tmp_path / "adapter")
    return pipeline, tmp_path / "adapter"


@dit
@pytest.mark.parametrize("function", OF_DIFFUSERS)
def test_what_diffusers_would_lose(function, saved, tmp_path):
    pipeline, adapter = saved
    call, sentence = OF_DIFFUSERS[function]
    with pytest.raises(NdLoraValueError, match=re.escape(sentence)):
        call(pipeline.pipe, str(adapter), str(tmp_path / "output"))
    assert not (tmp_path / "output").exists()


@dit
def test_lora_is_saved_and_loaded_as_ever(make_pipeline, tmp_path):
    from peft import LoraConfig

    pipeline = make_pipeline()
    pipeline.denoiser.add_adapter(LoraConfig(target_modules=["to_q"], init_lora_weights=False))
    pipeline.denoiser.save_lora_adapter(tmp_path / "lora")
    loaded = make_pipeline()
    loaded.denoiser.load_lora_adapter(
        tmp_path / "lora", prefix=None, weight_name="pytorch_lora_weights.safetensors"
    )
    torch.testing.assert_close(loaded.latents(), pipeline.latents())


@unet
def test_an_adapter_of_another_component(saved, text_encoder, tmp_path):
    pipeline, unets = saved
    text_encoder.add_adapter(NdLoraConfig())
    save_adapter(text_encoder, tmp_path / "words")
    untouched = pipeline.pipe.unet.state_dict().keys()
    with pytest.raises(
        NdLoraValueError, match="of which UNet2DConditionModel has none: .* pipe.text_encoder"
    ):
        load_adapter(pipeline.pipe.unet, tmp_path / "words", "words")
    assert pipeline.pipe.unet.state_dict().keys() == untouched
    assert list(pipeline.pipe.unet.peft_config) == ["default"]
    with pytest.raises(NdLoraValueError, match="of which CLIPTextModel has none"):
        load_adapter(text_encoder, unets, "image")


@unet
def test_a_component_of_another_size_is_left_as_it_was(saved):
    from diffusers import UNet2DConditionModel

    _, adapter = saved
    options = {"block_out_channels": (32, 64), "layers_per_block": 1, "cross_attention_dim": 32}
    kinds = {"down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"), "norm_num_groups": 8}
    other = UNet2DConditionModel(**options, **kinds, up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"))
    before = list(other.state_dict())
    with pytest.raises(NdLoraValueError, match="in this base model; the adapter was trained on"):
        load_adapter(other, adapter)
    assert list(other.state_dict()) == before and not hasattr(other, "peft_config")
    other.add_adapter(NdLoraConfig())


@dit
def test_a_name_that_is_taken(saved):
    pipeline, adapter = saved
    with pytest.raises(NdLoraValueError, match="has an adapter 'default' already"):
        load_adapter(pipeline.denoiser, adapter)


@dit
def test_an_adapter_that_is_not_there(saved, tmp_path):
    with pytest.raises(NdLoraValueError, match=r"has no NDLORA adapter 'other'; it has \['default'\]"):
        save_adapter(saved[0].denoiser, tmp_path / "other", "other")


def test_a_component_without_a_linear_layer():
    from diffusers import AutoencoderKL

    component = AutoencoderKL(block_out_channels=(8,), norm_num_groups=4, mid_block_add_attention=False)
    with pytest.raises(NdLoraValueError, match="AutoencoderKL has no linear layer, which target_modules="):
        component.add_adapter(NdLoraConfig())


def test_no_adapter_to_export(tmp_path):
    with pytest.raises(NdLoraValueError, match="was given no adapter"):
        export_lora({}, tmp_path / "lora")
