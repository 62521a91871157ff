"""The speed benchmark runs and goes on where it stopped; the pages say what its results say. No time is asserted."""

import json
import pathlib
import sys
import time
from functools import partial

import pytest
import torch

from ndlora_plugins.registry import methods

ROOT = pathlib.Path(__file__).resolve().parents[2]
sys.path.append(str(ROOT))  # the benchmarks are not installed

from benchmarks.speed import __main__ as speed  # noqa: E402
from benchmarks.speed import family, report  # noqa: E402
from benchmarks.speed.cases import OneLayer, _compiled, cases  # noqa: E402
from benchmarks.speed.measure import interleaved, kept_bytes, summary  # noqa: E402
from benchmarks.speed.variants import ON_CUDA, OURS, VARIANTS, ReferenceNdLinear, adapt, shake  # noqa: E402

sys.path.remove(str(ROOT))


@pytest.mark.parametrize("page", report.PAGES, ids=lambda page: page.name)
def test_the_pages_say_what_the_results_say(page):
    assert page.read_text() == report.write_docs(page.read_text())


def test_a_quick_run_and_its_continuation(tmp_path, monkeypatch):
    path = tmp_path / "speed.json"
    chosen = [
        case for case in cases(quick=True) if case.name.startswith(("start", "layer, SmolLM2-135M, 576"))
    ]
    monkeypatch.setattr(speed, "cases", lambda *_: chosen)

    def run(*only):
        """The cases that there are then."""
        speed.main(path, "cpu", 0.01, None, only, True, True)
        return json.loads(path.read_text())["cases"]

    first = run("576 -> 576, 256 tokens, float32")
    (case,) = first.values()
    assert set(case["both"]) == set(case["forward"]) == set(case["kept"]) == set(VARIANTS)
    assert path.with_suffix(".png").stat().st_size > 0
    chosen = [case for case in chosen if case.name in first or "start" in case.name]
    second = run()
    assert len(second) == 2 and second.items() >= first.items()  # measured once


@pytest.mark.slow
def test_one_process_may_measure_more_compiled_models_than_torch_compile_keeps(monkeypatch):
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))
    with torch._dynamo.config.patch(recompile_limit=1):
        _compiled("float32", "LoRA", layers=1, length=4).run(torch.device("cpu"), 0.01)
        _compiled("float32", "SLoRA", layers=1, length=4).run(torch.device("cpu"), 0.01)


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_variant_trains_its_adapter_alone_around_the_shared_weight(variant):
    base = OneLayer(24, 18, torch.float32, torch.device("cpu"))
    model = adapt(variant, base, ["layer"], rank=4)
    model(torch.randn(3, 24, requires_grad=True)).sum().backward()
    trained = [p for p in model.parameters() if p.requires_grad]
    assert bool(trained) == (variant != "no adapter")
    assert all(p.grad.abs().sum() > 0 for p in trained)
    assert any(p is base.layer.weight for p in model.parameters())


def test_the_variant_for_a_gpu_takes_the_triton_kernels_and_the_others_do_not():
    pytest.importorskip("triton")
    from ndlora_plugins.kernels.triton_modes import TritonModeProduct

    base = OneLayer(24, 18, torch.float32, torch.device("cpu"))
    products = [
        adapt(variant, base, ["layer"])(torch.randn(3, 24)).grad_fn.product
        for variant in (*ON_CUDA, "NdLinear")
    ]
    assert [isinstance(product, TritonModeProduct) for product in products] == [True, False]


def test_generation_takes_the_kernels_too(make_llama, monkeypatch):
    pytest.importorskip("triton")
    from ndlora_plugins.kernels.triton_modes import TritonModeProduct

    taken, forward = [], TritonModeProduct.forward
    monkeypatch.setattr(TritonModeProduct, "forward", lambda *given: taken.append(1) or forward(*given))
    tokens = torch.ones(1, 3, dtype=torch.long)
    for variant, expected in (("NdLinear", 0), (*ON_CUDA, 2 * 2)):  # layers, tokens
        model = adapt(variant, make_llama(), ["q_proj"]).eval()
        model.generate(input_ids=tokens, max_new_tokens=2, min_new_tokens=2, do_sample=False, pad_token_id=0)
        assert len(taken) == expected


def test_the_reference_is_the_kronecker_product():
    layer = shake(ReferenceNdLinear(torch.nn.Linear(24, 18, bias=False)))
    x = torch.randn(2, 5, 24)
    delta = torch.kron(layer.modes[0].weight, layer.modes[1].weight)
    torch.testing.assert_close(layer(x), layer.base_layer(x) + x @ delta.T)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("variant", OURS)
def test_no_method_keeps_more_for_backward_than_lora(variant, dtype):
    base = OneLayer(576, 576, dtype, torch.device("cpu"))
    x = torch.randn(1, 256, 576, dtype=dtype, requires_grad=True)
    kept = {}
    for name in ("LoRA", variant):
        model = adapt(name, base, ["layer"])
        kept[name] = kept_bytes(model, lambda model=model: model(x))
    limit = 0.1 if variant == "IntTune" else 1.0 if dtype == torch.float32 else 0.7
    assert kept[variant] <= limit * kept["LoRA"]


def test_rounds_are_interleaved_and_summed_up():
    order = []
    works = {"a": lambda: order.append("a"), "b": lambda: order.append("b")}
    times = interleaved(works, torch.device("cpu"), seconds=0, least=2)
    assert order == ["a", "b"] * 3  # one round to warm up
    assert {name: len(values) for name, values in times.items()} == {"a": 2, "b": 2}
    figures = summary({"a": [1.0, 2.0, 4.0], "b": [1.0, 1.0, 1.0]}, "b")
    assert figures["a"] == {"ms": 2000.0, "ratio": 2.0, "ratio_low": 1.5, "ratio_high": 3.0, "rounds": 3}


def test_a_turn_of_a_short_work_is_as_many_calls_for_every_work():
    order = []
    works = {name: lambda name=name: (time.sleep(0.001), order.append(name)) for name in "ab"}
    times = interleaved(works, torch.device("cpu"), seconds=0, least=2, turn=0.005)
    assert {name: len(values) for name, values in times.items()} == {"a": 2, "b": 2}
    before = ["a", "b"] * 2  # one call to warm up, one to see how long it takes
    calls = (len(order) - len(before)) // 4
    assert order == before + (["a"] * calls + ["b"] * calls) * 2
    assert 1 < calls <= 5


def test_every_method_is_timed_at_its_default_size():
    chosen = [name for name in methods() if name not in family.LEFT_OUT]
    found = family.measure(chosen, 192, 256, torch.float32, torch.device("cpu"), seconds=0)
    assert list(found) == ["LoRA", *chosen]
    assert all(row["rounds"] == 5 for row in found.values())
    page = (ROOT / "docs" / "speed_tables.md").read_text()
    assert [name for name in chosen if f"| `{name}` | " not in page] == []
