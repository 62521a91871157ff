"""`make gpu`: what a GPU has to say, in parts that go on where they were stopped. `python -m benchmarks.gpu --help`.

Nothing is fetched. Each part is a process of its own: one that fails, or runs out of its time, stops no other. What
they measure goes into one JSON a GPU, where `benchmarks.speed.report` finds it; docs/development.md says what it
decides.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from benchmarks.common import write_json
from benchmarks.speed.__main__ import machine, read_results
from benchmarks.speed.cases import cases
from benchmarks.speed.report import RESULTS, bars_table, parts_table

__all__ = ["PARTS", "Part"]

ROOT = Path(__file__).resolve().parents[1]
KERNEL_TESTS = ROOT / "tests" / "core" / "compare_triton_modes.py"


@dataclass(frozen=True)
class Part:
    """The cases of `benchmarks.speed` whose names contain all of `only`; with none, the tests of the kernels."""

    name: str
    minutes: float
    only: tuple[str, ...] = ()


# 25 minutes in all, what decides first
PARTS = (
    Part("tests of the kernels", 4),
    Part("blocks of Llama-3-8B", 2, ("block stack, ",)),
    Part("layers in bfloat16", 4, ("layer, ", "bfloat16")),
    Part("training steps", 2, ("training step ",)),
    Part("generation", 2, ("generation, ",)),
    Part("torch.compile in bfloat16", 5, ("compiled, ", "bfloat16")),
    Part("layers in float32", 3, ("layer, ", "float32")),
    Part("starts", 1, ("start, ",)),
    Part("torch.compile in float32", 2, ("compiled, ", "float32")),
)
SHORTEST = 45  # seconds: with less left no part is begun


def main(
    results: Annotated[
        Path | None, typer.Option(help="The JSON. Default: one for the GPU in benchmarks/speed/results.")
    ] = None,
    minutes: Annotated[
        float, typer.Option(help="Of this call; what is missing then is for the next one.")
    ] = 25,
    device: Annotated[str, typer.Option(help="cuda, or with --quick cpu.")] = "cuda",
    quick: Annotated[
        bool, typer.Option("--quick", help="In miniature, to see that everything runs.")
    ] = False,
    triton: Annotated[
        bool, typer.Option(help="Whether to measure the Triton kernels: not if they crash.")
    ] = True,
    logs: Annotated[Path, typer.Option(help="Where the parts' output goes.")] = ROOT / ".envs" / "gpu-logs",
) -> None:
    """Test the Triton kernels and measure what adapters cost on a GPU; the last thing is a table of the parts."""
    where = torch.device(device)
    if where.type == "cuda" and not torch.cuda.is_available():
        raise typer.BadParameter(
            "this torch sees no CUDA device; `--quick --device cpu` tries it in miniature"
        )
    name = f"{where.type}-{re.sub(r'[^a-z0-9]+', '-', str(machine(where)['device']).lower()).strip('-')}"
    results = results or (logs / "quick.json" if quick else RESULTS / f"{name}.json")
    logs.mkdir(parents=True, exist_ok=True)
    end = time.monotonic() + minutes * 60
    for part in PARTS:
        found = {"parts": {}} | read_results(results, where)
        before = found["parts"].get(part.name, {"seconds": 0, "done": False})
        left = min(part.minutes * 60, end - time.monotonic())
        if before["done"] or left < SHORTEST:
            continue
        log = logs / f"{part.name.replace(' ', '-')}.log"
        print(f"{part.name}: {left:.0f} s at most, output in {log}", flush=True)
        begun = time.monotonic()
        code = _start(
            _command(part, results, where, left, quick, triton), left, log, interpret=where.type == "cpu"
        )
        seconds = round(before["seconds"] + time.monotonic() - begun)
        found = {"parts": {}} | read_results(results, where)
        found["parts"][part.name] = {"seconds": seconds, **_outcome(part, code, log, found, where, quick)}
        write_json(found, results)
    found = {"parts": {}} | read_results(results, where)
    print(f"{bars_table(found)}\n{parts_table(found)}\n{results}")
    if not all(found["parts"].get(part.name, {}).get("done") for part in PARTS):
        print("Not everything is measured: the same call goes on.")
        raise typer.Exit(1)


def _command(
    part: Part, results: Path, where: torch.device, left: float, quick: bool, triton: bool
) -> list[str]:
    if not part.only:
        # without the tests' conftest, which asks for more packages
        tests = ["-m", "pytest", "-q", "--noconftest", "-p", "no:cacheprovider", str(KERNEL_TESTS)]
        return [sys.executable, *tests, *(("-k", "same_every_time") if quick else ())]
    # the rest of the time is for the imports, and for the case that is begun last
    limits = ["--stop-after", str(max(left - 45, left / 2)), "--seconds", "0.01" if quick else "2"]
    options = [f"--only={only}" for only in part.only] + ["--quick"] * quick + ["--no-triton"] * (not triton)
    return [sys.executable, "-m", "benchmarks.speed", str(results), "--device", where.type, *limits, *options]


def _start(command: list[str], seconds: float, log: Path, interpret: bool) -> int | None:
    """The exit code, None if the time was not enough."""
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "TRITON_INTERPRET": str(int(interpret))}
    with log.open("w") as file:
        try:
            return subprocess.run(
                command, stdout=file, stderr=subprocess.STDOUT, env=environment, timeout=seconds
            ).returncode
        except subprocess.TimeoutExpired:
            return None


def _outcome(
    part: Part, code: int | None, log: Path, found: dict[str, Any], where: torch.device, quick: bool
) -> dict[str, Any]:
    """What there is of a part now: whether that is all, a few words, and what failed."""
    lines = log.read_text(errors="replace").split("\n")
    last = next((line for line in reversed(lines) if line.strip()), "no output")
    if part.only:
        names = [case.name for case in cases(quick, where.type == "cuda")]
        names = [name for name in names if all(only in name for only in part.only)]
        measured = [name for name in names if name in found["cases"]]
        done, result = len(measured) == len(names), f"{len(measured)} of {len(names)} cases"
        failures = [f"{name}: {found['failed'][name]}" for name in names if name in found.get("failed", {})]
        failures += [
            f"{name}, {variant}: {error}"
            for name in measured
            for variant, error in found["cases"][name].get("failed", {}).items()
        ]
    else:
        done, result = code == 0, last.strip("= ")
        failures = [line for line in lines if line.startswith(("FAILED ", "ERROR "))]
    if code is None:
        result += ", out of time"
    elif code and not failures:
        failures = [f"exit code {code}: {last}"]
    return {"done": done, "result": result, "failures": failures}


if __name__ == "__main__":
    typer.run(main)
