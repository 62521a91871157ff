"""The demo: its problems, its reading of answers, and a whole run on a tiny random model."""

import io
import json
import re
import time
from dataclasses import asdict

import pytest
import typer
from rich.console import Console
from typer.testing import CliRunner

from ndlora_demo.problems import FINAL_MARKER, Problem, final_answer, generate
from ndlora_demo.progress import SILENCE, Bars
from ndlora_plugins.errors import NdLoraValueError

STEP = re.compile(r"(\d+) ([-+*/]) (\d+) = (\d+)")
OPERATIONS = {"+": int.__add__, "-": int.__sub__, "*": int.__mul__, "/": int.__floordiv__}

FINAL_ANSWERS = [  # text, what counts
    ("3 + 4 = 7\n#### 7", "7"),
    ("#### $1,200.00", "1200"),
    ("#### -12", "-12"),
    ("so 2.50 dollars", "2.5"),
    ("She has 12 apples, then 15.", "15"),
    ("#### 8 apples\n#### 9", "8"),
    ("#### blue", "blue"),
    (" Paris ", "paris"),
    ("", ""),
]


def combination(problem: Problem) -> tuple[str, ...]:
    """Template and numbers: the sum asked for, whatever the names and things are."""
    words = re.sub(r"\b[A-Z][a-z]+\b", "", problem.question).split()
    shape = tuple(
        word
        for word in words
        if word.strip("?.,")
        in {"gets", "shelf", "gives", "needs", "fills", "buys", "shares", "finds", "bowl", "sells"}
    )
    return shape + tuple(re.findall(r"\d+", problem.question))


def test_generator_is_deterministic():
    assert generate(50, 3) == generate(50, 3)
    assert generate(50, 3)[:20] == generate(20, 3)
    assert generate(50, 3) != generate(50, 4)


def test_generator_writes_different_problems():
    assert len({problem.question for problem in generate(500, 0)}) == 500


@pytest.mark.parametrize("seeds", [(0, 0), (0, 1), (7, 3)])
def test_training_and_held_out_problems_share_no_combination(seeds):
    training = {combination(problem) for problem in generate(1500, seeds[0])}
    held_out = {combination(problem) for problem in generate(300, seeds[1], held_out=True)}
    assert training and held_out and not training & held_out


@pytest.mark.parametrize("held_out", [False, True])
def test_worked_answers_are_right(held_out):
    for problem in generate(800, 11, held_out=held_out):
        *steps, last = problem.answer.splitlines()
        numbers = [int(number) for number in re.findall(r"\d+", problem.question)]
        result = numbers[0]
        assert len(steps) == len(numbers) - 1
        for step, number in zip(steps, numbers[1:], strict=True):
            left, operator, right, claimed = STEP.fullmatch(step).groups()
            assert (int(left), int(right)) == (result, number)
            if operator == "/":
                assert result % number == 0
            result = OPERATIONS[operator](result, number)
            assert int(claimed) == result >= 0
        assert last == f"{FINAL_MARKER} {result}"
        assert final_answer(problem.answer) == str(result)


@pytest.mark.parametrize("count", [0, -1, 5001])
def test_count_out_of_range(count):
    with pytest.raises(ValueError, match=rf"count={count} is out of range: ask for 1 to 5,000 problems"):
        generate(count, 0)


@pytest.mark.parametrize(("text", "expected"), FINAL_ANSWERS)
def test_final_answer(text, expected):
    assert final_answer(text) == expected


@pytest.fixture(scope="module")
def tiny_model(save_tiny_model, tmp_path_factory):
    """A tiny model that knows the generator's words."""
    texts = [f"Question: {problem.question}\nAnswer: {problem.answer}" for problem in generate(300, 0)]
    return str(save_tiny_model(tmp_path_factory.mktemp("tiny"), texts))


@pytest.mark.parametrize(("terminal", "lines"), [(False, range(3, 12)), (True, range(1))])
def test_the_demo_is_not_silent_where_there_is_no_terminal(terminal, lines):
    said = io.StringIO()
    with Bars(Console(file=said, force_terminal=terminal), silence=0.1) as bars:
        bars.start("lora", total=4)
        bars.step("loss 1.234")
        time.sleep(1)
    assert SILENCE < 15
    assert said.getvalue().count("lora: 1 of 4, loss 1.234\n") in lines


def test_the_output_head_gets_one_block_of_memory(tiny_model):
    from ndlora_demo import finetune

    bench = finetune.prepare(tiny_model, None, steps=1, seed=0, batch_size=2, held_out=2, exact=2)
    blocks = []
    bench.model.lm_head.register_forward_pre_hook(lambda _, inputs: blocks.append(inputs[0].is_contiguous()))
    finetune.loss(bench, bench.model, bench.batches[0])
    finetune.answers(bench, bench.model, bench.held_out)
    assert len(blocks) > 2 and all(blocks)


def run_tiny(tiny_model, output, **options):
    from ndlora_demo.run import run_demo

    sizes = {"steps": 2, "batch_size": 2, "held_out": 4, "exact": 2, **options}
    return run_demo(tiny_model, output=output, **sizes)


def test_a_directory_of_something_else_is_left_alone(tiny_model, tmp_path):
    (tmp_path / "base").mkdir()
    with pytest.raises(NdLoraValueError, match="is not empty, and not of an earlier demo"):
        run_tiny(tiny_model, tmp_path)
    assert not any((tmp_path / "base").iterdir())


@pytest.mark.slow
def test_demo_from_end_to_end(tiny_model, tmp_path):
    output, said = tmp_path / "out", io.StringIO()
    report = run_tiny(tiny_model, output, methods=["lora", "crossed", "ndlinear"], console=Console(file=said))
    assert report.failures == []
    pieces = re.findall(r"^(model|base model|lora|crossed|ndlinear|reload): ", said.getvalue(), re.MULTILINE)
    assert list(dict.fromkeys(pieces)) == ["model", "base model", "lora", "crossed", "ndlinear", "reload"]
    assert [result.method for result in report.results] == ["lora", "crossed", "ndlinear"]
    for result in report.results:
        assert len(result.losses) == 2
        assert result.reloaded_answer == result.answer
        assert result.bytes_on_disk > result.trainable_parameters * 4
        assert 0 <= result.exact_match_after <= 1
    lora, crossed, ndlinear = (result.trainable_parameters for result in report.results)
    assert crossed == lora / 8 and ndlinear < lora
    assert json.loads((output / "results.json").read_text())["failures"] == []
    assert len((output / "results.md").read_text().splitlines()) == 5
    assert (output / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert "ndlora_plugins" not in (output / "reload.py").read_text()


@pytest.mark.slow
def test_demo_on_the_users_own_data(tiny_model, tmp_path):
    data = tmp_path / "data.jsonl"
    lines = [json.dumps(asdict(problem)) for problem in generate(7, 5)]
    data.write_text("\n".join([*lines, "", lines[0]]))
    report = run_tiny(tiny_model, tmp_path / "out", data=data, methods=["lora"])
    assert report.failures == [] and report.data == str(data)


@pytest.mark.slow
def test_demo_fails_when_a_saved_adapter_answers_otherwise(tiny_model, tmp_path, monkeypatch):
    from ndlora_demo import run

    script = run._RELOAD_SCRIPT.replace("    base = model", "    answers[adapter] += '!'\n    base = model")
    monkeypatch.setattr(run, "_RELOAD_SCRIPT", script)
    report = run_tiny(tiny_model, tmp_path / "out", methods=["lora"])
    assert len(report.failures) == 1
    assert report.failures[0].startswith("lora: the saved adapter answers ")


def test_demo_refuses_an_unknown_method(tmp_path):
    with pytest.raises(
        NdLoraValueError, match="unknown method dora: the demo knows lora, crossed, ndlinear, slora"
    ):
        run_tiny("unused", tmp_path / "out", methods=["lora", "dora"])
    assert not (tmp_path / "out").exists()


def test_demo_refuses_sizes_below_one(tmp_path):
    with pytest.raises(NdLoraValueError, match="steps=0, batch_size=2, held_out=4, exact=2: give at least 1"):
        run_tiny("unused", tmp_path / "out", steps=0)


def test_demo_refuses_data_without_questions(tmp_path):
    data = tmp_path / "data.jsonl"
    data.write_text('{"question": "1 + 1?", "answer": "2"}\n{"text": "no question"}\n')
    with pytest.raises(NdLoraValueError, match=r"data\.jsonl, line 2: expected a JSON object with the texts"):
        run_tiny("unused", tmp_path / "out", data=data)


def test_demo_refuses_too_little_data(tiny_model, tmp_path):
    data = tmp_path / "data.jsonl"
    data.write_text('{"question": "1 + 1?", "answer": "2"}\n')
    with pytest.raises(NdLoraValueError, match="has 1 usable problems .* keeps 4 for the evaluation"):
        run_tiny(tiny_model, tmp_path / "out", data=data)
    assert not (tmp_path / "out").exists()


def test_command_ends_with_exit_code_1_on_a_mismatch(tmp_path, monkeypatch):
    from ndlora_demo import command, run

    report = run.DemoReport("tiny", "data", 2, 0, results=[], failures=["lora: [answers] differ"])
    monkeypatch.setattr(run, "run_demo", lambda *_, **__: report)
    app = typer.Typer()
    app.command()(command.demo)
    result = CliRunner().invoke(app, ["--output", str(tmp_path)])
    assert result.exit_code == 1
    assert "failed: lora: [answers] differ" in result.output


def test_command_names_the_data_that_is_missing(tmp_path):
    from ndlora_demo.command import demo

    with pytest.raises(FileNotFoundError, match=r"nowhere\.jsonl"):
        demo(data=tmp_path / "nowhere.jsonl", output=tmp_path / "out")
