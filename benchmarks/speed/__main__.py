"""The command line: `python -m benchmarks.speed --help`."""

from __future__ import annotations

import json
import os
import platform
import time
import warnings
from importlib.metadata import version
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from benchmarks.common import write_json
from benchmarks.speed.cases import cases
from benchmarks.speed.picture import draw
from benchmarks.speed.report import bars_table


def main(
    results: Annotated[
        Path, typer.Argument(help="The JSON to write; cases that it has are not measured again.")
    ],
    device: Annotated[
        str | None, typer.Option(help="cpu, cuda, ... Default: CUDA where there is one.")
    ] = None,
    seconds: Annotated[
        float, typer.Option(help="At least so long for a layer, five times for a model.")
    ] = 4.0,
    stop_after: Annotated[
        float | None, typer.Option(help="Begin no case after so many seconds; the next call goes on.")
    ] = None,
    only: Annotated[str, typer.Option(help="Only cases whose name contains this.")] = "",
    quick: Annotated[
        bool, typer.Option("--quick", help="A few small cases, to see that everything runs.")
    ] = False,
) -> None:
    """Measure layers, starts, a training step and generation; write JSON after every case, and a picture."""
    warnings.simplefilter("ignore")
    console = Console()
    where = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    found = json.loads(results.read_text()) if results.exists() else {"machine": machine(where), "cases": {}}
    if found["machine"] != machine(where):
        raise typer.BadParameter(
            f"{results} was measured on {found['machine']}, this is {machine(where)}: ratios of different machines "
            f"do not mix. Name another file."
        )
    wanted = [case for case in cases(quick) if only in case.name and case.name not in found["cases"]]
    begun = time.monotonic()
    columns = (BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TextColumn("{task.description}"))
    with Progress(*columns, console=console) as progress:
        bar = progress.add_task("", total=len(wanted))
        for case in wanted:
            if stop_after is not None and time.monotonic() - begun > stop_after:
                break
            progress.update(bar, description=case.name)
            found["cases"][case.name] = case.run(where, seconds)
            write_json(found, results)
            progress.advance(bar)
    if found["cases"]:
        console.print(bars_table(found), markup=False)
        draw(found, results.with_suffix(".png"))


def machine(device: torch.device) -> dict[str, str | int]:
    """What the figures depend on."""
    name = platform.processor() or platform.machine()
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
    elif os.path.exists("/proc/cpuinfo"):
        with open("/proc/cpuinfo") as file:
            name = next((line.split(":")[1].strip() for line in file if line.startswith("model name")), name)
    return {
        "device": name,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "peft": version("peft"),
    }


if __name__ == "__main__":
    typer.run(main)
