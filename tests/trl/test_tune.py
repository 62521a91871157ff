"""`ndlora tune`: every setting at every rate, the best first; goes on where it stopped; refuses before it trains."""

import json

import pytest
import yaml
from typer.testing import CliRunner

from ndlora_plugins.commands.main import app
from ndlora_plugins.errors import NdLoraValueError

pytest.importorskip("trl")
pytest.importorskip("optuna")

# arguments -> words of the error
REFUSED = {
    "an unknown method": ({"settings": ["lora"]}, "method='lora' is no known method"),
    "an unknown option": ({"settings": ['{"rank": 4}']}, r"unknown options \['rank'\]"),
    "no rates": ({"rates": []}, "rates above 0"),
    "a rate of zero": ({"rates": [0.0]}, "rates above 0"),
    "too few steps": ({"steps": 1}, "4 steps or more"),
    "too little data": ({"held_out": 1000}, r"\d+ rows to train on, and 1000 are to be held out"),
}


@pytest.fixture
def config(base, options, datasets_by_form, tmp_path):
    """The YAML of `ndlora sft` with a tiny model."""
    (tmp_path / "data").mkdir()
    datasets_by_form["text"].to_json(tmp_path / "data/train.jsonl")
    of_one_training = {"load_best_model_at_end": True, "push_to_hub": True}  # and not of a trial
    keys = {
        **options,
        **of_one_training,
        "model_name_or_path": base,
        "dataset_name": str(tmp_path / "data"),
        "seed": 0,
    }
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(keys), encoding="utf-8")
    return tmp_path / "run.yaml"


@pytest.mark.slow
def test_the_best_comes_first_and_what_is_done_is_not_done_again(config, tmp_path):
    from ndlora_plugins.integrations.trl.tune import tune

    seen = []
    task = {
        "rates": [1e-6, 3e-2],
        "settings": ["crossed", '{"method": "slora", "r": 2}'],
        "steps": 4,
        "held_out": 2,
        "report": seen.append,
    }
    trials = tune(config, tmp_path / "out", **task)
    assert {(trial.setting, trial.rate) for trial in trials} == {
        (setting, rate) for setting in task["settings"] for rate in task["rates"]
    }
    losses = [trial.loss for trial in trials if not trial.stopped]
    assert losses == sorted(losses) and trials[0].rate == 3e-2 and len(seen) == 4
    assert tune(config, tmp_path / "out", **task) == trials and len(seen) == 4
    for other in ({"steps": 8}, {"held_out": 3}):
        with pytest.raises(NdLoraValueError, match="trials of another configuration"):
            tune(config, tmp_path / "out", **{**task, **other})


def test_a_training_that_was_interrupted_runs_again(config, tmp_path):
    from ndlora_plugins.integrations.trl.tune import tune

    def interrupt(*_):
        raise KeyboardInterrupt

    task = {"rates": [1e-3], "settings": ["slora"], "steps": 4, "held_out": 2}
    with pytest.raises(KeyboardInterrupt):
        tune(config, tmp_path / "out", watch=interrupt, **task)
    (trial,) = tune(config, tmp_path / "out", **task)
    assert trial.loss is not None and not trial.stopped


def test_a_training_that_diverged_has_ended(config, tmp_path):
    from ndlora_plugins.integrations.trl.tune import tune

    seen = []
    task = {"rates": [1e30], "settings": ["slora"], "steps": 4, "held_out": 2, "report": seen.append}
    for _ in range(2):
        (trial,) = tune(config, tmp_path / "out", **task)
        assert trial.loss is None and trial.stopped and seen == [trial]


@pytest.mark.slow
def test_the_command_ends_with_lines_to_paste(config, tmp_path):
    words = f"tune {config} --output {tmp_path / 'out'} --rate 0.03 --setting slora --steps 4 --held-out 2"
    result = CliRunner().invoke(app, words.split())
    assert result.exit_code == 0, result.output
    for line in ("Best: slora at 0.03, held-out loss", "  learning_rate: 0.03", "  ndlora: slora"):
        assert line in result.output
    assert 'NdLoraConfig(method="slora")' in result.output


@pytest.mark.parametrize("case", REFUSED)
def test_refused_before_anything_is_written(case, config, tmp_path):
    from ndlora_plugins.integrations.trl.tune import tune

    arguments, message = REFUSED[case]
    with pytest.raises(NdLoraValueError, match=message):
        tune(config, tmp_path / "out", **arguments)
    assert not (tmp_path / "out").exists()


def test_a_wrong_schedule_of_the_yaml_is_found_before_anything_is_written(config, tmp_path):
    from ndlora_plugins.integrations.trl.tune import tune

    config.write_text(config.read_text() + "schedules: nobody\n")
    with pytest.raises(NdLoraValueError, match="nobody"):
        tune(config, tmp_path / "out", held_out=2)
    assert not (tmp_path / "out").exists()


def test_a_directory_of_something_else_is_left_alone(config, tmp_path):
    from ndlora_plugins.integrations.trl.tune import tune

    (tmp_path / "out").mkdir()
    (tmp_path / "out/mine.json").write_text(json.dumps([1]))
    with pytest.raises(NdLoraValueError, match="is not empty, and not of `ndlora tune`"):
        tune(config, tmp_path / "out", held_out=2)
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["mine.json"]
