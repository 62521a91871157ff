"""The image example in miniature: it trains, adapts, saves and draws; what it learns is in docs/hosts.md."""

import gzip

import numpy
import pytest

from ndlora_plugins.integrations.peft.files.adapter import AdapterReader


@pytest.fixture
def data(tmp_path):
    """Files of the two data sets' form, with random pixels: 40 clothes, 1,540 digits."""
    drawn = numpy.random.default_rng(0)
    clothes = drawn.integers(0, 256, (40, 784), dtype=numpy.uint8)
    files = {"train-images-idx3-ubyte.gz": bytes(16) + clothes.tobytes()}
    files["train-labels-idx1-ubyte.gz"] = bytes(8) + (numpy.arange(40) % 10).astype(numpy.uint8).tobytes()
    for name, content in files.items():
        (tmp_path / name).write_bytes(gzip.compress(content))
    digits = numpy.concatenate(
        [drawn.integers(0, 256, (1540, 784)), numpy.arange(1540)[:, None] % 10], axis=1
    )
    with gzip.open(tmp_path / "digits.csv.gz", "wt") as file:
        numpy.savetxt(file, digits, fmt="%d", delimiter=",")
    return tmp_path


def test_the_example_in_miniature(data, example, monkeypatch):
    pytest.importorskip("diffusers")
    pytest.importorskip("matplotlib")
    module = example("images")
    monkeypatch.setattr(module, "BATCH", 4)
    sizes = ["--source-steps", "1", "--steps", "1", "--seeds", "1", "--rates", "0.01"]
    options = ["--clothes", str(data), "--digits", str(data / "digits.csv.gz"), "--output", str(data / "out")]
    results = module.main([*options, *sizes])
    assert {"before", "LoRA r=8", "crossed"} <= results.keys()
    assert results["crossed"]["numbers"] * 8 == results["LoRA r=8"]["numbers"]
    assert (data / "out" / "pictures.png").is_file() and (data / "out" / "results.json").is_file()
    assert AdapterReader(data / "out" / "crossed").config.method == "crossed"
