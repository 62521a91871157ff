"""The command line: `python -m benchmarks.tracks --help`."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from benchmarks.quality import sweep
from benchmarks.tracks.images import images
from benchmarks.tracks.sentences import sentences
from benchmarks.tracks.settings import SETTINGS
from benchmarks.tracks.track import run
from ndlora_plugins.errors import NdLoraError

TRACKS = {"sentences": sentences, "images": images}
RESULTS = Path(__file__).parent / "results"
SEEDS = (0, 1, 2, 3, 4)


def read(path: Path) -> list[dict[str, Any]]:
    """Every run that is done on one track, in the order in which they were."""
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def main(
    track: Annotated[str, typer.Argument(help=f"One of {', '.join(TRACKS)}.")],
    data: Annotated[Path, typer.Option(help="A folder with the track's data; its module says which files.")],
    results: Annotated[Path, typer.Option(help="A folder: a file a track, a line of JSON a run.")] = RESULTS,
    setting: Annotated[list[str] | None, typer.Option(help="Only this one; repeat it for several.")] = None,
) -> None:
    """Sweep the learning rate of every setting, then train four more seeds at its best.

    A run that is done is a line in RESULTS, so a killed call goes on with the next one.
    """
    console, path = Console(), results / f"{track}.jsonl"
    found, chosen = TRACKS[track](data), [s for s in SETTINGS if not setting or s.name in setting]
    path.parent.mkdir(parents=True, exist_ok=True)
    for some in chosen:
        while missing := sweep.missing(some, sweep.of_setting(read(path), some.name), SEEDS):
            try:
                result = run(found, some, missing[0].learning_rate, missing[0].seed)
            except (NdLoraError, ValueError, TypeError) as error:
                console.print(f"{some.name}: {error}", highlight=False)
                break
            with path.open("a") as file:
                file.write(json.dumps(result) + "\n")
            console.print(
                f"{some.name}, lr {missing[0].learning_rate:g}, seed {missing[0].seed}: {result['held_out']}, "
                f"{result['parameters']:,} parameters",
                highlight=False,
            )


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    typer.run(main)
