"""Sentence encoders: `add_adapter`, training, saving, loading without our import, going on; SetFit on top of it."""

import io
import subprocess
import sys
import tarfile
import zipfile

import pytest
import torch
from datasets import Dataset

from ndlora_plugins import NdLoraConfig
from ndlora_plugins.integrations.peft.exports.export import export_adapter

sentence_transformers = pytest.importorskip("sentence_transformers")
step = pytest.mark.step
METHODS = ("crossed", "ndlinear", "slora", "nlora", "inttune", "einsum")  # the columns of docs/hosts.md
SENTENCES = ["a dull film and no plot", "very good acting with great music", "it was bad", "the film is fine"]
PAIRS = {
    "sentence1": SENTENCES * 2,
    "sentence2": [*SENTENCES[1:], SENTENCES[0], *SENTENCES],
    "score": [0.1, 0.3, 0.2, 0.4, *[1.0] * 4],
}


def make(encoder, adapter=None, **fields):
    model = sentence_transformers.SentenceTransformer(
        str(encoder if adapter is None else adapter), device="cpu"
    )
    if fields:
        model.add_adapter(NdLoraConfig(task_type="FEATURE_EXTRACTION", **fields))
    return model.eval()


def train(model, output, steps=3):
    from sentence_transformers.losses import CosineSimilarityLoss

    arguments = sentence_transformers.SentenceTransformerTrainingArguments(
        output,
        max_steps=steps,
        learning_rate=1e-2,
        save_strategy="no",
        report_to="none",
        use_cpu=True,
        disable_tqdm=True,
    )
    trainer = sentence_transformers.SentenceTransformerTrainer(
        model, arguments, train_dataset=Dataset.from_dict(PAIRS), loss=CosineSimilarityLoss(model)
    )
    trainer.train()
    return model.eval()


def embed(model):
    return model.encode(SENTENCES, convert_to_tensor=True).cpu().clone()


@pytest.mark.parametrize("method", METHODS)
@step("train, save, load: without our import", host="sentence-transformers")
def test_a_trained_adapter_comes_back(encoder, fields_of, method, tmp_path):
    model = make(encoder, **fields_of(method))
    before = embed(model)
    torch.testing.assert_close(before, embed(make(encoder)))
    after = embed(train(model, tmp_path / "run"))
    assert not torch.allclose(after, before)
    model.save_pretrained(str(tmp_path / "adapter"))
    assert (tmp_path / "adapter" / "adapter_config.json").is_file()
    torch.save(after, tmp_path / "expected.pt")
    if method != "inttune":  # a process for the method that needs most; the others here
        return torch.testing.assert_close(embed(make(encoder, tmp_path / "adapter")), after)
    code = f"""
import torch
from sentence_transformers import SentenceTransformer
model = SentenceTransformer({str(tmp_path / "adapter")!r}, device="cpu")
found = model.encode({SENTENCES!r}, convert_to_tensor=True)
torch.testing.assert_close(found, torch.load({str(tmp_path / "expected.pt")!r}))
"""
    subprocess.run([sys.executable, "-P", "-c", code], check=True)


@step("continue", host="sentence-transformers", method="crossed")
def test_a_training_goes_on(encoder, tmp_path):
    model = train(make(encoder, method="crossed"), tmp_path / "run")
    model.save_pretrained(str(tmp_path / "adapter"))
    found = make(encoder)
    found.load_adapter(str(tmp_path / "adapter"), is_trainable=True)
    before = embed(found)
    torch.testing.assert_close(before, embed(model))
    assert not torch.allclose(embed(train(found, tmp_path / "more")), before)


@pytest.mark.parametrize("to", ["lora", "merged"])
@step("merge, export", host="sentence-transformers", method="crossed")
def test_what_is_exported_embeds_alike(encoder, shake, to, tmp_path):
    model = make(encoder, method="crossed")
    expected = embed(shake(model))
    model.save_pretrained(str(tmp_path / "adapter"))
    export_adapter(tmp_path / "adapter", tmp_path / "exported", to, base=str(encoder))
    found = make(encoder) if to == "lora" else make(tmp_path / "exported")
    if to == "lora":
        found.load_adapter(str(tmp_path / "exported"))
    torch.testing.assert_close(embed(found), expected, atol=1e-5, rtol=1e-5)


@step("train, save, load: its two parts", host="setfit", method="crossed")
def test_setfit(encoder, tmp_path):
    """SetFit 1.2 writes a config.json of its own where a body with an adapter writes none, and cannot read that, LoRA
    or ours: the parts are saved and loaded."""
    setfit, joblib = pytest.importorskip("setfit"), pytest.importorskip("joblib")
    model = setfit.SetFitModel.from_pretrained(str(encoder))
    model.model_body.add_adapter(NdLoraConfig(task_type="FEATURE_EXTRACTION"))
    data = Dataset.from_dict({"text": SENTENCES * 2, "label": [0, 1, 0, 1] * 2})
    arguments = setfit.TrainingArguments(
        str(tmp_path / "run"), max_steps=2, batch_size=4, report_to="none", save_strategy="no"
    )
    setfit.Trainer(model, arguments, train_dataset=data).train()
    expected = model.predict_proba(SENTENCES, as_numpy=True)
    model.model_body.save_pretrained(str(tmp_path / "body"))
    joblib.dump(model.model_head, tmp_path / "head.joblib")
    body = make(encoder, tmp_path / "body")
    loaded = setfit.SetFitModel(body, joblib.load(tmp_path / "head.joblib"))
    assert loaded.predict_proba(SENTENCES, as_numpy=True) == pytest.approx(expected, abs=1e-5)


def test_the_example_in_miniature(encoder, example, tmp_path):
    inner = io.BytesIO()
    lines = [f"{i}\t{(i % 9) - 4}\t{SENTENCES[i % 4]}\tratings" for i in range(1200)]
    with tarfile.open(fileobj=inner, mode="w:gz") as archive:
        entry = tarfile.TarInfo("hutto/movieReviewSnippets_GroundTruth.txt")
        text = "\n".join(lines).encode()
        entry.size = len(text)
        archive.addfile(entry, io.BytesIO(text))
    with zipfile.ZipFile(tmp_path / "vader.zip", "w") as outer:
        outer.writestr("vaderSentiment-0.5/hutto_ICWSM_2014.tar.gz", inner.getvalue())
    options = ["--steps", "1", "--pairs", "8", "--output", str(tmp_path / "adapter")]
    example("embeddings").main(
        ["--model", str(encoder), "--sentences", str(tmp_path / "vader.zip"), *options]
    )
    assert (tmp_path / "adapter" / "adapter_model.safetensors").is_file()
