"""The command line: `python -m benchmarks.tracks --help`."""

from __future__ import annotations

import time
import warnings
from pathlib import Path
from typing import Annotated

import torch
import typer

from benchmarks.runs import append_result, check_comparable, missing, of_setting, read_results
from benchmarks.tracks.images import Images
from benchmarks.tracks.rl import Arithmetic
from benchmarks.tracks.sentences import Sentences
from benchmarks.tracks.settings import settings_for
from benchmarks.tracks.track import run
from ndlora_plugins.errors import NdLoraError

TRACKS = {"sentences": Sentences, "images": Images, "rl": Arithmetic}


def main(
    track: Annotated[str, typer.Argument(help=f"One of {', '.join(TRACKS)}.")],
    data: Annotated[Path, typer.Option(help="Where `make tracks-data` put the packages.")],
    results: Annotated[Path, typer.Option(help="A folder: TRACK.jsonl, one line a run.")],
    setting: Annotated[list[str] | None, typer.Option(help="A setting's name; may be repeated.")] = None,
    minutes: Annotated[float | None, typer.Option(help="Begin no run after so many minutes.")] = None,
    threads: Annotated[int, typer.Option(min=1)] = 1,
    plan: Annotated[bool, typer.Option("--plan", help="Only print what is missing.")] = False,
) -> None:
    """Run what is missing: a sweep of rates for each setting, then other seeds at the best. A killed call goes on."""
    torch.set_num_threads(threads)
    if track not in TRACKS:
        raise typer.BadParameter(f"{track!r}: choose one of {', '.join(TRACKS)}")
    path = results / f"{track}.jsonl"
    chosen = [each for each in settings_for(track) if setting is None or each.name in setting]
    if plan:
        done = read_results(path)
        for each in chosen:
            some = missing(each, of_setting(done, each.name))
            typer.echo(
                f"{each.name}: {', '.join(f'{r.learning_rate:g} seed {r.seed}' for r in some) or 'done'}"
            )
        return
    loaded, end = TRACKS[track](data), time.monotonic() + 60 * (minutes or 1e9)
    try:  # the images' source model, trained anew, differs from machine to machine
        check_comparable(path, loaded.about)
    except NdLoraError as error:
        raise SystemExit(f"Error: {error}") from error
    while chosen and time.monotonic() < end:
        done = read_results(path)
        each = min(chosen, key=lambda one: len(of_setting(done, one.name)))  # so that all get on alike
        runs = missing(each, of_setting(done, each.name))
        if not runs:
            chosen.remove(each)
            continue
        wanted = runs[0]
        try:
            result = loaded.run(wanted) if isinstance(loaded, Arithmetic) else run(loaded, wanted)
        except Exception as error:  # one that cannot run does not end the night's queue
            typer.echo(f"{each.name}: {type(error).__name__}: {error}", err=True)
            chosen.remove(each)
            continue
        append_result(path, result)
        typer.echo(
            f"{wanted}: {result['held_out_loss']}, {result['parameters']:,} parameters, {result['seconds']} s"
        )


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    typer.run(main)
