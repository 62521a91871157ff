"""`ndlora tune`: a short sweep of learning rates and settings on the user's own model and data."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ndlora_plugins.errors import NdLoraValueError

if TYPE_CHECKING:
    from ndlora_plugins.integrations.trl.tune import Trial

__all__ = ["tune"]


def tune(
    config: Annotated[Path, typer.Argument(help="The YAML of `ndlora sft`.")],
    output: Annotated[Path, typer.Option(help="Where the trials are kept; the same again goes on.")] = Path(
        "tune-output"
    ),
    rate: Annotated[
        list[float] | None, typer.Option(help="A learning rate; again for several. Default: 3e-4 to 1e-2.")
    ] = None,
    setting: Annotated[
        list[str] | None,
        typer.Option(help="A method, or JSON as the YAML's ndlora: takes it; again for several."),
    ] = None,
    steps: Annotated[int, typer.Option(help="Of each training.")] = 100,
    held_out: Annotated[
        int,
        typer.Option(
            help="Rows to compare on: the first of the test split, or kept from the training split."
        ),
    ] = 64,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Find the learning rate, and the best of a few settings, by short trainings on your model and data.

    Example: ndlora tune run.yaml --setting crossed --setting svfit --steps 100
    """
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    from ndlora_plugins.integrations.trl.tune import RATES, tune

    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
    )
    with _without_bars(), Progress(*columns, console=Console(stderr=as_json), transient=True) as progress:
        bar = progress.add_task("", total=steps, visible=False)
        trials = tune(
            config,
            output,
            rates=tuple(rate or RATES),
            settings=tuple(setting or (None,)),
            steps=steps,
            held_out=held_out,
            report=lambda trial: typer.echo(
                f"{_named(trial.setting, trial.rate)}: {_ended(trial)}", err=as_json
            ),
            watch=lambda setting, rate, step: progress.update(
                bar, completed=step, visible=True, description=_named(setting, rate)
            ),
        )
    if as_json:
        typer.echo(json.dumps([asdict(trial) for trial in trials], indent=2))
        return
    best = trials[0]
    if best.loss is None or best.stopped:
        raise NdLoraValueError("Every training diverged: try lower rates (--rate).")
    typer.echo(f"Best: {_named(best.setting, best.rate)}, held-out loss {best.loss:.4f} after {steps} steps.")
    if len(rates := sorted({trial.rate for trial in trials})) > 1 and best.rate in (rates[0], rates[-1]):
        typer.echo(f"It is at the edge of the rates: try one beyond {best.rate:g} too.")
    typer.echo(f"In the YAML:\n  learning_rate: {best.rate:g}")
    if best.setting is not None:
        typer.echo(f"  ndlora: {best.setting}")
        if fields := _as_fields(best.setting):
            typer.echo(f"In Python: NdLoraConfig({fields})")


@contextmanager
def _without_bars() -> Iterator[None]:
    """Keep transformers and datasets from drawing bars of their own for every training."""
    from datasets.utils import logging as of_datasets
    from transformers.utils import logging as of_transformers

    drawn = of_datasets.is_progress_bar_enabled(), of_transformers.is_progress_bar_enabled()
    of_datasets.disable_progress_bar()
    of_transformers.disable_progress_bar()
    try:
        yield
    finally:
        if drawn[0]:
            of_datasets.enable_progress_bar()
        if drawn[1]:
            of_transformers.enable_progress_bar()


def _named(setting: Any, rate: float) -> str:
    return f"{setting or 'the YAML'} at {rate:g}"


def _ended(trial: Trial) -> str:
    if trial.loss is None:
        return "diverged"
    return f"held-out loss {trial.loss:.4f}" + (", stopped: it was behind" if trial.stopped else "")


def _as_fields(setting: str) -> str:
    """NdLoraConfig's arguments; "" where a budget chooses them."""
    if not setting.lstrip().startswith("{"):
        return f'method="{setting}"'
    options = json.loads(setting)
    if "parameters" in options:
        return ""
    return ", ".join(f"{name}={value!r}" for name, value in options.items() if name != "callback")
