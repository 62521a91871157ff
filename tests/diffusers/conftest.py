"""Two tiny random pipelines, made from configurations: a UNet with attention and convolutions, and a DiT."""

import pytest
import torch

PROMPT = torch.linspace(-1, 1, 7 * 32).view(1, 7, 32)
POOLED = torch.linspace(-1, 1, 32).view(1, 32)


def make_unet_pipeline():
    from diffusers import DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel

    torch.manual_seed(0)
    unet = UNet2DConditionModel(
        block_out_channels=(16, 32),
        layers_per_block=1,
        sample_size=8,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=32,
        norm_num_groups=8,
        attention_head_dim=8,
    )
    return StableDiffusionPipeline(
        vae=make_vae(),
        text_encoder=make_text_encoder(),
        tokenizer=None,
        unet=unet,
        scheduler=DDIMScheduler(steps_offset=1, clip_sample=False),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def make_dit_pipeline():
    from diffusers import (
        FlowMatchEulerDiscreteScheduler,
        SD3Transformer2DModel,
        StableDiffusion3Pipeline,
    )

    torch.manual_seed(0)
    transformer = SD3Transformer2DModel(
        sample_size=8,
        patch_size=2,
        in_channels=4,
        out_channels=4,
        num_layers=2,
        attention_head_dim=8,
        num_attention_heads=4,
        joint_attention_dim=32,
        caption_projection_dim=32,
        pooled_projection_dim=32,
    )
    rest = ("text_encoder", "text_encoder_2", "text_encoder_3", "tokenizer", "tokenizer_2", "tokenizer_3")
    return StableDiffusion3Pipeline(
        transformer=transformer,
        vae=make_vae(),
        scheduler=FlowMatchEulerDiscreteScheduler(),
        **dict.fromkeys(rest),
    )


def make_vae():
    from diffusers import AutoencoderKL

    return AutoencoderKL(block_out_channels=(8,), norm_num_groups=4, latent_channels=4)


def make_text_encoder():
    from transformers import CLIPTextConfig, CLIPTextModel

    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 4}
    return CLIPTextModel(CLIPTextConfig(**sizes, vocab_size=64, max_position_embeddings=16)).eval()


# architecture -> how the pipeline is made, its denoiser, and what the pipeline is called with
PIPELINES = {
    "unet": (make_unet_pipeline, "unet", {"prompt_embeds": PROMPT}),
    "dit": (
        make_dit_pipeline,
        "transformer",
        {"prompt_embeds": PROMPT, "pooled_prompt_embeds": POOLED},
    ),
}


class Pipeline:
    """One of the pipelines, its denoiser, and what it makes: latents (1, 4, 8, 8) of two steps."""

    def __init__(self, architecture):
        make, self.component, self.inputs = PIPELINES[architecture]
        self.pipe = make()
        self.pipe.set_progress_bar_config(disable=True)

    @property
    def denoiser(self):
        return getattr(self.pipe, self.component)

    def latents(self):
        generator = torch.Generator().manual_seed(1)
        return self.pipe(
            **self.inputs,
            guidance_scale=1.0,
            num_inference_steps=2,
            height=8,
            width=8,
            output_type="latent",
            generator=generator,
        ).images

    def train(self, steps=8, rate=1e-2):
        """Denoise one fixed image, as any training script does; returns the losses."""
        torch.manual_seed(3)
        noisy, target, step = torch.randn(2, 4, 8, 8), torch.randn(2, 4, 8, 8), torch.tensor([3, 7])
        words = {
            key.replace("prompt_embeds", "projections") if "pooled" in key else "encoder_hidden_states": value
            for key, value in self.inputs.items()
        }
        words = {key: value.expand(2, *value.shape[1:]) for key, value in words.items()}
        self.denoiser.train()
        trained = [value for value in self.denoiser.parameters() if value.requires_grad]
        optimizer, losses = torch.optim.AdamW(trained, lr=rate), []
        for _ in range(steps):
            found = self.denoiser(noisy, timestep=step, **words).sample
            loss = (found - target).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        self.denoiser.eval()
        return losses


@pytest.fixture(params=PIPELINES)
def architecture(request):
    return request.param


@pytest.fixture
def make_pipeline(architecture):
    """A function that makes the same pipeline every time."""
    return lambda: Pipeline(architecture)


@pytest.fixture
def text_encoder():
    """A tiny CLIP text encoder with which the UNet's layers have no name in common."""
    torch.manual_seed(0)
    return make_text_encoder()
