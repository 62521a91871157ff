"""`ndlora tune`: a short sweep of learning rates and settings on the user's own model and data."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

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
    held_out: Annotated[int, typer.Option(help="Rows to compare on, where there is no test split.")] = 64,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Find the learning rate, and the best of a few settings, by short trainings on your model and data.

    Example: ndlora tune run.yaml --setting crossed --setting svfit --steps 100
    """
    from ndlora_plugins.integrations.trl.tune import RATES, tune

    def report(trial: Trial) -> None:
        typer.echo(f"{_named(trial)}: {_ended(trial)}", err=as_json)

    trials = tune(
        config,
        output,
        rates=tuple(rate or RATES),
        settings=tuple(setting or (None,)),
        steps=steps,
        held_out=held_out,
        report=report,
    )
    if as_json:
        typer.echo(json.dumps([asdict(trial) for trial in trials], indent=2))
        return
    best = trials[0]
    if best.loss is None or best.stopped:
        raise NdLoraValueError("Every training diverged: try lower rates (--rate).")
    typer.echo(f"Best: {_named(best)}, held-out loss {best.loss:.4f} after {steps} steps.")
    if len(rates := sorted({trial.rate for trial in trials})) > 1 and best.rate in (rates[0], rates[-1]):
        typer.echo(f"It is at the edge of the rates: try one beyond {best.rate:g} too.")
    typer.echo(f"In the YAML:\n  learning_rate: {best.rate:g}")
    if best.setting is not None:
        typer.echo(f"  ndlora: {best.setting}\nIn Python: NdLoraConfig({_as_fields(best.setting)})")


def _named(trial: Trial) -> str:
    return f"{trial.setting or 'the YAML'} at {trial.rate:g}"


def _ended(trial: Trial) -> str:
    if trial.loss is None:
        return "diverged"
    return f"held-out loss {trial.loss:.4f}" + (", stopped: it was behind" if trial.stopped else "")


def _as_fields(setting: str) -> str:
    if not setting.lstrip().startswith("{"):
        return f'method="{setting}"'
    return ", ".join(f"{name}={value!r}" for name, value in json.loads(setting).items() if name != "callback")
