"""`make gpu` in miniature, on the CPU: what its parts are, and that they stop nobody and go on. No time is asserted."""

import importlib.util
import json
import pathlib
import sys

import pytest
import torch
import typer

ROOT = pathlib.Path(__file__).resolve().parents[2]
sys.path.append(str(ROOT))  # the benchmarks are not installed

from benchmarks import gpu  # noqa: E402
from benchmarks.speed import __main__ as speed  # noqa: E402
from benchmarks.speed import cases  # noqa: E402

sys.path.remove(str(ROOT))

CPU = torch.device("cpu")


def test_the_parts_take_25_minutes_and_measure_every_case_once():
    assert sum(part.minutes for part in gpu.PARTS) <= 25
    assert max(part.minutes for part in gpu.PARTS) <= 9
    for case in cases.cases(cuda=True):
        parts = [part for part in gpu.PARTS if part.only and all(only in case.name for only in part.only)]
        assert len(parts) == 1, case.name


def test_the_page_names_the_parts_and_their_minutes():
    page = (ROOT / "docs" / "development.md").read_text()
    for part in gpu.PARTS:
        assert f"| {part.name} | {part.minutes} |" in page


def measure(path, monkeypatch, *chosen):
    monkeypatch.setattr(speed, "cases", lambda *_: chosen)
    monkeypatch.setattr(speed, "draw", lambda *_: None)
    speed.main(path, "cpu", 0.01, None, None, True, True)


def test_a_case_that_fails_stops_no_other_and_comes_last_the_next_time(tmp_path, monkeypatch):
    path, order = tmp_path / "speed.json", []

    def bad(device, seconds):
        order.append("bad")
        raise RuntimeError("no such kernel")

    def good(name):
        return cases.Case(name, lambda device, seconds: order.append(name) or {})

    with pytest.raises(typer.Exit):
        measure(path, monkeypatch, cases.Case("bad", bad), good("first"))
    found = json.loads(path.read_text())
    assert list(found["cases"]) == ["first"]
    assert found["failed"] == {"bad": "RuntimeError: no such kernel"}
    measure(path, monkeypatch, good("bad"), good("first"), good("second"))
    assert order == ["bad", "first", "second", "bad"]
    assert json.loads(path.read_text())["failed"] == {}


def test_kernels_that_fail_take_nothing_from_the_others(monkeypatch):
    def fails(model, targets, rank):
        raise RuntimeError("out of registers")

    monkeypatch.setattr(cases, "ON_CUDA", {"kernels": fails})
    monkeypatch.setitem(cases.adapt.__globals__, "ON_CUDA", {"kernels": fails})
    base = cases.OneLayer(24, 18, torch.float32, CPU)
    models, failed = cases._adapted(("LoRA", "NdLinear"), base, ["layer"], print, torch.device("cuda"))
    assert list(models) == ["LoRA", "NdLinear"]
    assert failed == {"failed": {"kernels": "RuntimeError: out of registers"}}


def test_a_part_that_runs_out_of_time_is_ended_and_told(tmp_path):
    log = tmp_path / "log"
    assert gpu._start([sys.executable, "-c", "import time; time.sleep(60)"], 1, log, interpret=True) is None
    part = gpu.Part("layers", 1, ("layer, ", "float32"))
    outcome = gpu._outcome(part, None, log, {"cases": {}}, CPU, quick=True)
    assert outcome == {"done": False, "result": "0 of 1 cases, out of time", "failures": []}


@pytest.mark.slow
def test_in_miniature_and_its_continuation(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    has_triton = importlib.util.find_spec("triton") is not None
    names = ("tests of the kernels", "blocks of Llama-3-8B")
    parts = {part.name: part for part in gpu.PARTS}
    path = tmp_path / "cpu.json"

    def call(*names):
        """The exit code."""
        monkeypatch.setattr(gpu, "PARTS", [parts[name] for name in names])
        try:
            gpu.main(path, 25, "cpu", True, True, tmp_path / "logs")
        except typer.Exit as end:
            return end.exit_code
        return 0

    # without triton the first part fails, and the second is measured
    assert call(*names) == int(not has_triton)
    first = json.loads(path.read_text())
    assert [part["done"] for part in first["parts"].values()] == [has_triton, True]
    assert [bool(part["failures"]) for part in first["parts"].values()] == [not has_triton, False]
    for case in first["cases"].values():
        assert {"NdLinear, crossed", "NdLinear", "SLoRA", "IntTune"} <= set(case["step"])
        assert set(case["peak"]) == set(case["step"])
    assert call(names[1]) == 0 and json.loads(path.read_text()) == first  # measured once
    assert f"| {names[1]} | {first['parts'][names[1]]['seconds']} | 2 of 2 cases |" in capsys.readouterr().out
