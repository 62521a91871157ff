"""`ndlora tune`: which learning rate, and which of a few settings, by short trainings on the user's model and data."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

from transformers import PrinterCallback, TrainerCallback

from ndlora_plugins.errors import MissingExtraError, NdLoraValueError

from ..peft.configuration.config import NdLoraConfig
from .callback import NdLoraCallback
from .sft import Run, load_data, make_config, make_trainer, read_run

try:
    import optuna
    from optuna.storages import JournalStorage
    from optuna.storages.journal import JournalFileBackend
except ModuleNotFoundError as error:
    if error.name != "optuna":
        raise
    raise MissingExtraError(
        '`ndlora tune` searches with Optuna: run `pip install "ndlora-plugins[trl,tune]"`.'
    ) from error

__all__ = ["RATES", "Trial", "tune"]

RATES = (3e-4, 1e-3, 3e-3, 1e-2)
PARTS = 4  # of a training, each ends with the held-out loss; a run that is behind stops there
_TASK, _TRIALS = "tune.json", "trials.log"
# one that was interrupted is neither, and runs again
_ENDED = (optuna.trial.TrialState.COMPLETE, optuna.trial.TrialState.PRUNED)


@dataclass(frozen=True)
class Trial:
    """One short training.

    Attributes:
        setting: as `ndlora:` takes it; None is what the YAML says.
        loss: the held-out one of its last part; None if it diverged or failed.
        stopped: whether it ended early, as it was behind.
    """

    setting: Any
    rate: float
    loss: float | None
    stopped: bool


def tune(
    config: str | Path,
    output: str | Path,
    *,
    rates: Sequence[float] = RATES,
    settings: Sequence[Any] = (None,),
    steps: int = 100,
    held_out: int = 64,
    report: Callable[[Trial], None] = lambda trial: None,
    watch: Callable[[Any, float, int], None] = lambda setting, rate, step: None,
) -> list[Trial]:
    """Train every setting at every rate for a few steps; goes on where a killed call stopped.

    Args:
        config: the YAML of `ndlora sft`.
        output: a directory for the journal of the trials; of an earlier call with the same arguments, or new.
        rates: learning rates, three or more, a factor of about 3 apart.
        settings: each as the YAML's `ndlora:` takes it; None for what stands there.
        steps: of one training, with the YAML's schedule, batch size and data.
        held_out: rows to compare on: the first of the YAML's test split, or kept from the training split.
        report: called with each trial that ends.
        watch: called after each step with the setting, the rate and the steps so far; the trainer prints nothing.

    Returns:
        The trials, best first.

    Raises:
        NdLoraValueError: before anything is trained: an unknown option, too little data, another task's output.
    """
    if steps < PARTS or held_out < 1 or not rates or any(not rate > 0 for rate in rates):
        raise NdLoraValueError(
            f"steps={steps}, held_out={held_out}, rates={list(rates)}: give {PARTS} steps or more, a held-out row or "
            f"more, and rates above 0."
        )
    runs = [_run(config, output, rate, steps) for rate in rates]
    for setting in settings:  # wrong ones are found before the first training
        _configure(runs[0], setting)
    training_data, kept = _split(runs[0], held_out)
    output = Path(output)
    _check_task(
        output,
        {
            "config": Path(config).read_text(encoding="utf-8"),
            "rates": list(rates),
            "settings": list(settings),
            "steps": steps,
            "held_out": held_out,
        },
    )
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    grid = {"setting": list(range(len(settings))), "rate": list(range(len(rates)))}
    wanted = [dict(zip(grid, pair, strict=True)) for pair in product(*grid.values())]
    random.Random(0).shuffle(wanted)  # the first trials, which no other is behind, are of any rate
    study = optuna.create_study(
        storage=JournalStorage(JournalFileBackend(str(output / _TRIALS))),
        study_name="tune",
        sampler=optuna.samplers.RandomSampler(),  # never asked: every trial is given
        pruner=optuna.pruners.MedianPruner(n_startup_trials=2),
        load_if_exists=True,
    )

    def train(trial: optuna.Trial) -> float:
        setting = settings[trial.suggest_categorical("setting", grid["setting"])]
        run = runs[trial.suggest_categorical("rate", grid["rate"])]
        chosen, callback = _configure(run, setting)
        watcher = _Watcher(trial, lambda step: watch(setting, run.training.learning_rate, step))
        trainer = make_trainer(run, chosen, [callback, watcher], training_data, kept)
        trainer.remove_callback(PrinterCallback)
        trainer.train()
        if watcher.behind or not math.isfinite(watcher.loss):
            raise optuna.TrialPruned
        return watcher.loss

    def tell(study: optuna.Study, trial: optuna.trial.FrozenTrial) -> None:
        report(_trial(trial, settings, rates))

    def missing() -> list[dict[str, int]]:
        done = [trial.params for trial in study.get_trials(states=_ENDED)]
        return [pair for pair in wanted if pair not in done]

    while pairs := missing():
        study.enqueue_trial(pairs[0])
        study.optimize(train, n_trials=1, callbacks=[tell])
    found = [_trial(trial, settings, rates) for trial in study.get_trials(states=_ENDED)]
    return sorted(found, key=lambda trial: (trial.stopped, math.inf if trial.loss is None else trial.loss))


class _Watcher(TrainerCallback):
    """Reports steps and held-out losses, and stops a training that is behind the median of the others."""

    def __init__(self, trial: optuna.Trial, report: Callable[[int], None]):
        self.trial, self.report, self.loss, self.behind = trial, report, math.nan, False

    def on_step_end(self, args, state, control, **kwargs):
        self.report(state.global_step)

    def on_evaluate(self, args, state, control, metrics=None, **kwargs):
        self.loss = (metrics or {}).get("eval_loss", math.nan)
        self.trial.report(self.loss, state.global_step)
        if state.global_step < state.max_steps and (
            not math.isfinite(self.loss) or self.trial.should_prune()
        ):
            self.behind = control.should_training_stop = True


def _configure(run: Run, setting: Any) -> tuple[NdLoraConfig, NdLoraCallback]:
    return make_config(run, run.ndlora if setting is None else setting)


def _run(config: str | Path, output: str | Path, rate: float, steps: int) -> Run:
    flags = {
        "learning_rate": rate,
        "max_steps": steps,
        "eval_strategy": "steps",
        "eval_steps": steps // PARTS,
        "save_strategy": "no",
        "load_best_model_at_end": False,
        "push_to_hub": False,
        "report_to": "none",
        "disable_tqdm": True,
        "output_dir": Path(output) / "trainer",
    }
    if not Path(config).is_file():
        raise NdLoraValueError(f"{config} is no file: name the YAML of `ndlora sft`.")
    words = (str(word) for flag, value in flags.items() for word in (f"--{flag}", value))
    return read_run(["--config", str(config), *words], "ndlora tune")


def _split(run: Run, held_out: int) -> tuple[Any, Any]:
    data, script = load_data(run), run.script
    if script.dataset_streaming:
        raise NdLoraValueError("dataset_streaming: true: the trials read the same rows again; take it out.")
    training = data[script.dataset_train_split]
    if script.dataset_test_split in data and script.dataset_test_split != script.dataset_train_split:
        kept = data[script.dataset_test_split]
        return training, kept.select(range(min(held_out, len(kept))))
    if len(training) <= held_out:
        raise NdLoraValueError(
            f"{len(training)} rows to train on, and {held_out} are to be held out: add rows, or hold out fewer "
            f"(--held-out)."
        )
    parts = training.train_test_split(test_size=held_out, seed=0)
    return parts["train"], parts["test"]


def _check_task(output: Path, task: dict[str, Any]) -> None:
    """Write the task into a new directory, or find the same one in it."""
    file = output / _TASK
    if file.is_file():
        if json.loads(file.read_text(encoding="utf-8")) != task:
            raise NdLoraValueError(
                f"{output} holds trials of another configuration, rates, settings, steps or held-out rows: choose "
                f"another --output."
            )
    elif output.exists() and any(output.iterdir()):
        raise NdLoraValueError(f"{output} is not empty, and not of `ndlora tune`: choose another --output.")
    else:
        output.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(task, indent=1), encoding="utf-8")


def _trial(trial: optuna.trial.FrozenTrial, settings: Sequence[Any], rates: Sequence[float]) -> Trial:
    last = (
        trial.value if trial.value is not None else next(reversed(trial.intermediate_values.values()), None)
    )
    loss = last if last is not None and math.isfinite(last) else None
    stopped = trial.state != optuna.trial.TrialState.COMPLETE
    return Trial(settings[trial.params["setting"]], rates[trial.params["rate"]], loss, stopped)
