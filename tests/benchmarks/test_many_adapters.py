"""The benchmark of many adapters runs, and its page says what was measured."""

import json
import pathlib
import sys

ROOT = pathlib.Path(__file__).resolve().parents[2]
sys.path.append(str(ROOT))  # the benchmarks are not installed

from benchmarks import many_adapters  # noqa: E402

TINY = {
    "hidden_size": 48,
    "intermediate_size": 96,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 160,
}


def test_every_figure_is_there(tmp_path, monkeypatch):
    monkeypatch.setattr(many_adapters, "SHAPES", {**many_adapters.SHAPES, **TINY})
    found = many_adapters.measure(tmp_path, adapters=8, rounds=1, layers=1)
    text = many_adapters.page(json.loads(json.dumps(found)))
    assert [name for name in many_adapters.KINDS if f"| {name} |" not in text] == []


def test_the_page_is_what_was_measured():
    found = json.loads((ROOT / "benchmarks" / "many_adapters.json").read_text())
    assert (ROOT / "docs" / "many_adapters.md").read_text() == many_adapters.page(found)
