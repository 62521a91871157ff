"""What the quality benchmark and the tracks have in common: which run comes next, and their files of results."""

import json
import pathlib
import sys

import pytest

ROOT = pathlib.Path(__file__).resolve().parents[2]
RATES = (3e-4, 1e-3, 3e-3, 1e-2)
SWEPT = {(3e-4, 0): 3, (1e-3, 0): 1, (3e-3, 0): 2, (1e-2, 0): 3}

# of an ordinary setting with three seeds: (learning rate, seed) -> loss of the runs that are done; what is missing then
NEXT = {
    "a sweep begins": ({}, [(rate, 0) for rate in RATES]),
    "it goes on where it was killed": ({(3e-4, 0): 1.2, (1e-3, 0): 1.1}, [(3e-3, 0), (1e-2, 0)]),
    "best in the middle": (SWEPT, [(1e-3, 1), (1e-3, 2)]),
    "best at the lower edge": ({(3e-4, 0): 1, (1e-3, 0): 2, (3e-3, 0): 3, (1e-2, 0): 4}, [(1e-4, 0)]),
    "best at the upper edge": ({(3e-4, 0): 4, (1e-3, 0): 3, (3e-3, 0): 2, (1e-2, 0): 1}, [(3e-2, 0)]),
    "the next one diverged": ({(3e-4, 0): 4, (1e-3, 0): 3, (3e-3, 0): 2, (1e-2, 0): None}, [(3e-3, 1), (3e-3, 2)]),
    "all diverged": ({(rate, 0): None for rate in RATES}, [(1e-4, 0)]),
    "one seed is missing": ({**SWEPT, (1e-3, 1): 1}, [(1e-3, 2)]),
    "all done": ({**SWEPT, (1e-3, 1): 1, (1e-3, 2): 1}, []),
}  # fmt: skip
# of others: what of the setting is different
OTHERS = {
    "two rates, one done": ({"tried": 2}, {(3e-4, 0): 1}, [(1e-3, 0)]),
    "two rates: no further one": ({"tried": 2}, {(3e-4, 0): 1, (1e-3, 0): 2, (3e-4, 1): 1}, [(3e-4, 2)]),
    "two rates, both diverged": ({"tried": 2}, {(3e-4, 0): None, (1e-3, 0): None}, []),
    "beside the best three seeds, at the best all": (
        {"neighbours": True, "seeds": (0, 1, 2, 3)},
        SWEPT,
        [(3e-4, 1), (3e-4, 2), (1e-3, 1), (1e-3, 2), (3e-3, 1), (3e-3, 2), (1e-3, 3)],
    ),
    "three seeds choose another rate, and more beside it": (
        {"neighbours": True, "seeds": (0, 1, 2, 3)},
        {
            **SWEPT,
            **dict.fromkeys([(3e-4, 1), (3e-4, 2)], 3),
            **dict.fromkeys([(1e-3, 1), (1e-3, 2), (1e-3, 3)], 2),
            **dict.fromkeys([(3e-3, 1), (3e-3, 2)], 1),
        },
        [(1e-2, 1), (1e-2, 2), (3e-3, 3)],
    ),
    "no adapter, no rate": ({"peft_type": "NONE", "seeds": (0,)}, {}, [(0.0, 0)]),
}


@pytest.fixture(scope="module")
def runs():
    """benchmarks/runs.py, which is not installed: it lies in the root."""
    sys.path.append(str(ROOT))
    yield pytest.importorskip("benchmarks.runs")
    sys.path.remove(str(ROOT))


def made(losses, **changes):
    """Results in which validation alone chooses."""
    name = {"setting": {"name": "a"}, "held_out_loss": 0, **changes}
    return [
        {**name, "learning_rate": rate, "seed": seed, "validation_loss": loss}
        for (rate, seed), loss in losses.items()
    ]


@pytest.mark.parametrize(
    "changes, losses, missing", [({}, *case) for case in NEXT.values()] + list(OTHERS.values()), ids=[*NEXT, *OTHERS]
)  # fmt: skip
def test_what_comes_next(runs, changes, losses, missing):
    setting = runs.Setting(
        **{"name": "a", "peft_type": "NDLORA", "options": {}, "lowest": RATES[0], **changes}
    )
    assert [(run.learning_rate, run.seed) for run in runs.missing(setting, made(losses))] == missing


def test_a_rate_is_chosen_by_the_seeds_that_all_ran_and_where_none_diverged(runs):
    losses = {(1e-3, 0): 1, (1e-3, 1): 5, (3e-3, 0): 2, (3e-3, 1): 2, (1e-2, 0): 0}
    assert runs.best_rate(made(losses)) == 3e-3
    assert runs.best_rate(made({**losses, (3e-3, 1): None})) == 1e-3
    assert runs.best_rate([]) is None


def test_a_task_without_validation_chooses_by_what_is_held_out(runs):
    results = made(SWEPT)
    for result in results:
        result["held_out_loss"] = -result.pop("validation_loss")
    assert runs.best_rate(results) == RATES[0]


def test_a_line_that_a_kill_cut_short_makes_way_for_the_next(runs, tmp_path):
    path = tmp_path / "results" / "a.jsonl"
    first, second = made({(1e-3, 0): 1.0, (3e-3, 0): 2.0}, about="é")
    runs.append_result(path, first)
    with path.open("a") as lines:
        lines.write(json.dumps(second)[:40])
    assert runs.read_results(path) == [first]
    runs.append_result(path, second)
    assert runs.read_results(path) == [first, second]


def test_runs_that_trained_something_else_are_not_mixed_in(runs, tmp_path):
    # the images' source model is trained anew on each machine: another one's losses would stand in one table
    from ndlora_plugins.errors import NdLoraValueError

    path = tmp_path / "a.jsonl"
    runs.check_comparable(path, {"steps": 8})
    runs.append_result(path, made({(1e-3, 0): 1.0}, about={"steps": 7})[0])
    runs.check_comparable(path, {"steps": 7})
    with pytest.raises(NdLoraValueError, match="holds runs of {'steps': 7}, which cannot be compared"):
        runs.check_comparable(path, {"steps": 8})
    assert all(
        runs.check_comparable(file, runs.read_results(file)[0]["about"]) is None
        for file in ROOT.glob("benchmarks/*/results/*.jsonl")
    )
