"""The image example in miniature: it trains, adapts, saves and draws; what it learns is in docs/hosts.md."""

import gzip

import numpy
import pytest

from ndlora_plugins.integrations.peft.files.adapter import AdapterReader


@pytest.fixture
def data(tmp_path):
    """Files of the two data sets' form, with random pixels: 40 clothes, 60 digits."""
    drawn = numpy.random.default_rng(0)
    clothes = drawn.integers(0, 256, (40, 784), dtype=numpy.uint8)
    files = {"train-images-idx3-ubyte.gz": bytes(16) + clothes.tobytes()}
    files["train-labels-idx1-ubyte.gz"] = bytes(8) + (numpy.arange(40) % 10).astype(numpy.uint8).tobytes()
    for name, content in files.items():
        (tmp_path / name).write_bytes(gzip.compress(content))
    digits = numpy.concatenate([drawn.integers(0, 256, (60, 784)), numpy.arange(60)[:, None] % 10], axis=1)
    with gzip.open(tmp_path / "digits.csv.gz", "wt") as file:
        numpy.savetxt(file, digits, fmt="%d", delimiter=",")
    return tmp_path


def test_the_example_in_miniature(data, example, monkeypatch):
    pytest.importorskip("diffusers")
    pytest.importorskip("matplotlib")
    module = example("images")
    monkeypatch.setattr(module, "BATCH", 4)
    sizes = {"source-steps": 1, "steps": 1, "seeds": 1, "rates": 0.01, "held-out": 8, "drawing-steps": 2}
    options = ["--clothes", str(data), "--digits", str(data / "digits.csv.gz"), "--output", str(data / "out")]
    results = module.main([*options, *(word for name, n in sizes.items() for word in (f"--{name}", str(n)))])
    assert {"before", "LoRA r=8", "crossed"} <= results.keys()
    assert results["crossed"]["numbers"] * 8 == results["LoRA r=8"]["numbers"]
    assert (data / "out" / "pictures.png").is_file() and (data / "out" / "results.json").is_file()
    assert AdapterReader(data / "out" / "crossed").config.method == "crossed"
