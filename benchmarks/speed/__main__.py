"""The command line: `python -m benchmarks.speed --help`."""

from __future__ import annotations

import json
import os
import platform
import time
import warnings
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from benchmarks.common import write_json
from benchmarks.speed.cases import cases
from benchmarks.speed.picture import draw
from benchmarks.speed.report import bars_table
from benchmarks.speed.variants import ON_CUDA

__all__ = ["machine", "read_results"]


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
    only: Annotated[
        list[str] | None,
        typer.Option(help="Only cases whose name contains this; given again, all of them."),
    ] = None,
    triton: Annotated[
        bool, typer.Option(help="On a GPU: whether to measure the Triton kernels, too.")
    ] = True,
    quick: Annotated[
        bool, typer.Option("--quick", help="A few small cases, to see that everything runs.")
    ] = False,
) -> None:
    """Measure layers, starts, a training step and generation; write JSON after every case, and a picture."""
    warnings.simplefilter("ignore")
    console = Console()
    where = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    if where.type == "cuda":
        # float32 for all as the kernels take it, and LoRA's float32 adapter in a bfloat16 model as fast as it can be
        torch.set_float32_matmul_precision("high")
    if not triton:
        ON_CUDA.clear()
    found = {"failed": {}} | read_results(results, where)
    wanted = [
        case
        for case in cases(quick, where.type == "cuda")
        if all(part in case.name for part in only or ()) and case.name not in found["cases"]
    ]
    failed = found["failed"]
    wanted.sort(key=lambda case: case.name in failed)  # those that failed before come last
    begun = time.monotonic()
    columns = (BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TextColumn("{task.description}"))
    with Progress(*columns, console=console) as progress:
        bar = progress.add_task("", total=len(wanted))
        for case in wanted:
            if stop_after is not None and time.monotonic() - begun > stop_after:
                break
            progress.update(bar, description=case.name)
            failed[case.name] = "did not end"  # for the next call, if this one is killed
            write_json(found, results)
            try:
                found["cases"][case.name] = case.run(where, seconds)
                del failed[case.name]
            except Exception as error:
                failed[case.name] = f"{type(error).__name__}: {error}"[:300]
                console.print(f"failed: {case.name}: {failed[case.name]}", markup=False)
            write_json(found, results)
            progress.advance(bar)
            if case.name in failed and not answers(where):
                break
    if found["cases"]:
        console.print(bars_table(found), markup=False)
        draw(found, results.with_suffix(".png"))
    if any(case.name in failed for case in wanted):
        raise typer.Exit(1)


def read_results(path: Path, device: torch.device) -> dict[str, Any]:
    """What was measured there on this machine; an error if it was another."""
    found = json.loads(path.read_text()) if path.exists() else {"machine": machine(device), "cases": {}}
    if found["machine"] != machine(device):
        raise typer.BadParameter(
            f"{path} was measured on {found['machine']}, this is {machine(device)}: ratios of different machines "
            f"do not mix. Name another file."
        )
    return found


def answers(device: torch.device) -> bool:
    """Whether the device still works: after some errors a process has lost its GPU."""
    try:
        return torch.ones(1, device=device).item() == 1
    except RuntimeError:
        return False


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
    } | ({"cuda": str(torch.version.cuda)} if device.type == "cuda" else {})


if __name__ == "__main__":
    typer.run(main)
