"""The quality benchmark: that its cut model is the model, and that its tables are of its runs."""

import pathlib
import sys

import pytest
import torch

ROOT = pathlib.Path(__file__).resolve().parents[2]
# learning rate -> loss at the first seed
SWEPT = {(3e-4, 0): 3, (1e-3, 0): 1, (3e-3, 0): 2, (1e-2, 0): 3}
# settings that between them use every type of PEFT's configuration and every way of ours
TRIED = [
    "lora-r8", "pissa-r8", "lokr-full", "vera-r256", "lora_sb-r8",
    "ndlinear-kronecker", "ndlinear-crossed4", "nlora-r8-pivots",
]  # fmt: skip


@pytest.fixture(scope="module")
def quality():
    """The package, which is not installed: it lies in the root."""
    sys.path.append(str(ROOT))
    yield pytest.importorskip("benchmarks.quality")
    sys.path.remove(str(ROOT))


def made(losses, name="ndlinear-1term", peft_type="NDLORA", parameters=10, method="ndlinear"):
    """Results as `runs.run` gives them."""
    return [
        {
            "task": "gsm8k",
            "about": {"steps": 7},
            "setting": {"name": name, "peft_type": peft_type, "options": {"method": method}},
            "learning_rate": rate,
            "seed": seed,
            "parameters": parameters,
            "held_out_loss": loss,
            "exact_match": None,
            "curve": [[0, 2.0], [5, loss]],
            "seconds_a_step": 1.0,
            "peak_memory_bytes": None,
        }
        for (rate, seed), loss in losses.items()
    ]


def test_rows_are_taken_at_the_best_rate(quality):
    from benchmarks.quality import report

    (row,) = report.rows(made({**SWEPT, (1e-3, 1): 1, (1e-3, 2): 1}))
    assert (row.learning_rate, row.losses, row.at_edge) == (1e-3, {0: 1, 1: 1, 2: 1}, False)
    assert row.curve == [(0, 2.0), (5, 1.0)]
    assert report.rows(made({(3e-4, 0): 1.2, (1e-3, 0): 1.1})) == []


def test_recipes_are_the_front_the_best_of_each_method_and_lora(quality):
    from benchmarks.quality import report

    shape = dict.fromkeys(((1e-4, 0), (3e-4, 0), (1e-3, 0), (3e-3, 0)), 1.0)
    results = made(shape, "lora-r8", "LORA", 20) + made(shape)
    results += made(shape, "beaten", parameters=15) + made(shape, "slora-r8", parameters=16, method="slora")
    lines = report.recipe_table(results).splitlines()
    names = [line.split(":")[0] for line in lines[2:]]
    assert names == ["| ndlinear-1term", "| slora-r8", "| lora-r8"]


def test_the_front_holds_what_nothing_beats(quality):
    from benchmarks.quality import report

    shape = ((1e-4, 0), (3e-4, 0), (1e-3, 0), (3e-3, 0))
    results = [
        result
        for name, parameters, loss in (("a", 10, 1.0), ("b", 20, 1.1), ("c", 30, 0.9), ("d", 30, 0.95))
        for result in made(dict.fromkeys(shape, loss), name, parameters=parameters)
    ]
    assert [row.setting for row in report.front(report.rows(results))] == ["a", "c"]


@pytest.fixture(scope="module")
def tiny(quality, save_tiny_model, tmp_path_factory):
    """(task, bench with the first seed's batches, last block of two) of a tiny random model."""
    from benchmarks.quality.task import LastBlocks, Task, bench_for, load_problems
    from ndlora_demo import finetune
    from ndlora_demo.problems import generate

    texts = [f"Question: {problem.question}\nAnswer: {problem.answer}" for problem in generate(300, 0)]
    model, tokenizer, name = finetune.load_model(str(save_tiny_model(tmp_path_factory.mktemp("tiny"), texts)))
    task = Task(
        "arithmetic",
        blocks=1,
        max_tokens=200,
        held_out=4,
        steps=2,
        batch_size=2,
        curve=2,
        curve_every=2,
        exact=2,
    )
    training, held_out = load_problems(task, None, tokenizer)
    last = LastBlocks(model, task.blocks)
    last.remember(tokenizer, [*training, *held_out])
    bench = finetune.Bench(name, last.model, tokenizer, [], held_out, 2, 8)
    return task, bench_for(task, bench, training, 0), last


def test_the_last_blocks_alone_give_the_models_loss(tiny):
    from ndlora_demo import finetune

    _, bench, last = tiny
    whole = finetune.held_out_loss(bench, last.whole)
    assert finetune.held_out_loss(bench, last.model) == pytest.approx(whole, rel=1e-5)


def test_what_the_lower_blocks_gave_can_be_kept(tiny, tmp_path):
    from benchmarks.quality.task import LastBlocks

    _, bench, last = tiny
    kept = LastBlocks(last.whole, 1)
    kept.remember(bench.tokenizer, bench.held_out, tmp_path / "kept.safetensors")
    read = LastBlocks(last.whole, 1).model.get_decoder().embed_tokens
    read.load(tmp_path / "kept.safetensors")
    written = kept.model.get_decoder().embed_tokens
    assert read.states.keys() == written.states.keys()
    assert all(torch.equal(read.states[key], written.states[key]) for key in read.states)


@pytest.mark.parametrize("name", TRIED)
def test_a_run_learns_and_leaves_the_base_as_it_was(tiny, name):
    # PiSSA writes the base weight and `unload` leaves it so: every later run would start from a broken model
    from benchmarks.quality.runs import run
    from benchmarks.quality.settings import SETTINGS
    from benchmarks.runs import Run

    task, bench, last = tiny
    before = {key: value.clone() for key, value in last.whole.state_dict().items()}
    setting = next(setting for setting in SETTINGS if setting.name == name)
    result = run(Run(setting, 1e-3, 0), task, bench, last, lambda step, loss: None)
    assert result["held_out_loss"] > 0 and result["parameters"] > 0 and 0 <= result["exact_match"] <= 1
    assert [step for step, _ in result["curve"]] == [0, 2] and len(result["training_losses"]) == 2
    assert all(torch.equal(value, before[key]) for key, value in last.whole.state_dict().items())


def test_a_run_that_diverges_is_recorded(tiny):
    from benchmarks.quality.runs import run
    from benchmarks.runs import Run, Setting

    task, bench, last = tiny
    setting = Setting("any", "NDLORA", {"method": "slora", "lora_alpha": 1e9}, 1e-3)
    result = run(Run(setting, 1.0, 0), task, bench, last, lambda step, loss: None)
    assert result["held_out_loss"] is None and len(result["training_losses"]) < 3


def test_the_command_prints_its_plan(quality, tmp_path):
    import typer
    from typer.testing import CliRunner

    from benchmarks.quality.__main__ import main

    app = typer.Typer()
    app.command()(main)
    # "slora-r8" is the beginning of another's name
    options = ["--results", str(tmp_path), "--plan", "--setting", "lora-r8", "--setting", "slora-r8"]
    result = CliRunner().invoke(app, options)
    assert result.exit_code == 0 and "lora-r8: 0 done; next: 0.0003 seed 0, 0.001 seed 0" in result.output
    assert result.output.count("slora-r8") == 1 and "slora-r8-alpha16" not in result.output
    refused = CliRunner().invoke(app, [*options, "--setting", "lora"])
    assert refused.exit_code == 2 and "'lora'" in refused.output


def test_the_pages_are_of_the_committed_runs(quality):
    from benchmarks.quality import report

    for file in report.PAGES:
        assert file.read_text() == report.page(file.read_text())


def test_the_command_refuses_results_of_another_task(quality, save_tiny_model, tmp_path):
    from benchmarks.quality.__main__ import main
    from benchmarks.runs import append_result
    from ndlora_demo.problems import generate

    model = str(save_tiny_model(tmp_path / "tiny", [problem.question for problem in generate(50, 0)]))
    append_result(tmp_path / "arithmetic.jsonl", made({(1e-3, 0): 1.0}, "lora-r8")[0])
    with pytest.raises(SystemExit, match="holds runs of {'steps': 7}, which cannot be compared"):
        main(tmp_path, task="arithmetic", model=model, setting=["lora-r8"])
