"""Trainings and exports that are killed at random moments, run out of disk, or race."""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from jobs import ADAPTERS, EXPORTS, METHODS, TRAINERS, export, make_inputs, quietly, train

# what each process needs, imported once, in the one that they are forked from
PRELOAD = [
    "transformers.models.llama.modeling_llama",
    "transformers.trainer",
    "trl.trainer.sft_trainer",
    "ndlora_plugins.commands.main",
    "ndlora_plugins.integrations.peft.exports.export",
    "ndlora_plugins.integrations.trl.callback",
]
MOST_KILLS = 3
UNFINISHED = ".out-unfinished"


@dataclass
class Row:
    """One row of the table.

    Attributes:
        tried: in words.
        times: how often.
        outcomes: what came out -> how often; a run may count in several.
        failures: what should not have come out, a sentence each.
    """

    tried: str
    times: int = 0
    outcomes: Counter[str] = field(default_factory=Counter)
    failures: list[str] = field(default_factory=list)


class Chaos:
    """All that is tried, with one source of random numbers and one folder.

    Attributes:
        inputs: of the exports, -> `contents`.
        expected: (adapter, kind) -> the contents of an undisturbed export.
        seconds: kind -> how long the last undisturbed one took from the start of its process until it was whole.
    """

    def __init__(self, directory: Path, seed: int):
        self.directory = directory
        self.random = random.Random(seed)
        self.processes = multiprocessing.get_context("forkserver")
        self.processes.set_forkserver_preload(PRELOAD)
        self.log = directory / "log"
        self.finish(self.start(make_inputs, str(directory)))
        self.inputs = {name: contents(directory / name) for name in ("base", *ADAPTERS)}
        self.expected, self.seconds = {}, {}
        for adapter in ADAPTERS:
            for to in EXPORTS:
                folder = directory / f"expected-{adapter}-{to}"
                folder.mkdir()
                self.finish(self.export_undisturbed(adapter, to, folder / "out"))
                self.expected[adapter, to] = contents(folder / "out")

    def start(self, job, *arguments) -> multiprocessing.Process:
        process = self.processes.Process(target=quietly, args=(str(self.log), job, arguments))
        process.start()
        return process

    def finish(self, process: multiprocessing.Process, status: int = 0) -> float:
        """Wait; returns the seconds. Another exit status ends everything: the set-up itself is broken."""
        started = time.perf_counter()
        process.join()
        if process.exitcode != status:
            sys.exit(f"exit status {process.exitcode}, not {status}:\n{self.log.read_text()}")
        return time.perf_counter() - started

    def kill(self, process: multiprocessing.Process, seconds: float, number: int = signal.SIGKILL) -> bool:
        """Send a signal at a random moment of so many seconds; whether the process was still running."""
        process.join(self.random.uniform(0, seconds))
        running = process.is_alive()
        if running:
            os.kill(process.pid, number)
        process.join()
        return running

    def kill_while_it_writes(
        self, process: multiprocessing.Process, output: Path, expected: Path, number: int
    ) -> None:
        """Send a signal once a random part of all bytes is written."""
        enough = self.random.uniform(0, size(expected))
        unfinished = output.parent / UNFINISHED
        while (
            process.is_alive()
            and not output.exists()
            and (not unfinished.exists() or size(unfinished) < enough)
        ):
            time.sleep(0.0005)
        self.kill(process, 0, number)

    def trainings(self, times: int) -> Row:
        row = Row(
            "trainings killed with SIGKILL, up to three times each, and resumed from the last whole checkpoint"
        )
        expected, seconds = {}, {}
        cases = [(method, trainer) for method in METHODS for trainer in TRAINERS]
        for number in range(times):
            method, trainer = case = cases[number % len(cases)]
            job = (train, str(self.directory / "small"))
            if case not in expected:
                whole = self.directory / f"whole-{method}-{trainer}"
                seconds[case] = self.finish(self.start(*job, str(whole), method, trainer, None))
                expected[case] = contents(whole / "adapter")["adapter_model.safetensors"]
            output, resume = self.directory / f"training-{number}", None
            for _ in range(self.random.randint(1, MOST_KILLS)):
                killed = self.kill(self.start(*job, str(output), method, trainer, resume), seconds[case])
                row.outcomes["kills"] += killed
                resume, removed = last_whole_checkpoint(output)
                row.outcomes["checkpoints killed while they were written, and removed by hand"] += removed
            self.finish(self.start(*job, str(output), method, trainer, resume))
            row.times += 1
            row.outcomes["begun anew: no whole checkpoint yet"] += resume is None
            same = contents(output / "adapter")["adapter_model.safetensors"] == expected[case]
            row.outcomes["the same adapter as undisturbed, bit for bit"] += same
            if not same:
                row.failures.append(
                    f"{method}, {trainer}, {output}: another adapter than the undisturbed training's"
                )
        return row

    def export_undisturbed(self, adapter: str, to: str, output: Path) -> multiprocessing.Process:
        started, process = time.perf_counter(), self.start_export(adapter, to, output)
        while process.is_alive() and not output.exists():
            time.sleep(0.001)
        self.seconds[to] = time.perf_counter() - started
        process.join()
        return process

    def start_export(self, adapter: str, to: str, output: Path, largest_file: int | None = None):
        return self.start(export, str(self.directory / adapter), to, str(output), largest_file)

    def problems(self, output: Path, expected: list[dict], beside: set[str]) -> list[str]:
        """What is wrong with the output (one of `expected`; {} is none), what stands beside it, and the inputs."""
        found = []
        if (contents(output) if output.exists() else {}) not in expected:
            found.append(f"{output} is neither whole nor absent")
        extra = {path.name for path in output.parent.iterdir()} - {output.name} - beside
        if extra:
            found.append(f"left beside {output}: {sorted(extra)}")
        if {name: contents(self.directory / name) for name in self.inputs} != self.inputs:
            found.append("the base model or an adapter has changed")
        return found

    def exports(self, times: int, number: signal.Signals) -> Row:
        row = Row(
            f"exports (merged model, LoRA) stopped by {number.name}, every second one while it writes; run again"
        )
        for count in range(times):
            to = EXPORTS[count % len(EXPORTS)]
            folder = self.directory / f"{number.name}-{count}"
            folder.mkdir()
            output, whole = folder / "out", self.expected["first", to]
            process = self.start_export("first", to, output)
            if count // len(EXPORTS) % 2:
                self.kill_while_it_writes(
                    process, output, self.directory / f"expected-first-{to}" / "out", number
                )
            else:
                self.kill(process, self.seconds[to], number)
            row.times += 1
            done, left = output.exists(), (folder / UNFINISHED).exists()
            row.outcomes["left nothing under the output's name"] += not done
            row.outcomes["left a whole export: it was just done"] += done
            row.outcomes["left unfinished files, which the next run removed"] += left and not done
            found = self.problems(output, [{}, whole], {UNFINISHED} if number == signal.SIGKILL else set())
            again = (
                self.start_export("first", to, output)
                if done
                else self.export_undisturbed("first", to, output)
            )
            again.join()
            if again.exitcode != (2 if done else 0):  # nothing is overwritten
                found.append(f"{to}: the next run ended with {again.exitcode}: {self.log.read_text()}")
            found += self.problems(output, [whole], {UNFINISHED} if done else set())
            row.outcomes["whole after the next run"] += not found
            row.failures += [f"{to}, {folder}: {problem}" for problem in found]
        return row

    def full_disks(self, times: int) -> Row:
        disk = self.directory / "disk"
        disk.mkdir()
        mounted = mount(disk, 1)
        row = Row(
            "exports to a full disk (" + ("a small tmpfs)" if mounted else "a limit on the size of a file)")
        )
        for count in range(times):
            to = EXPORTS[count % len(EXPORTS)]
            whole = self.expected["first", to]
            sizes = [
                file.stat().st_size for file in (self.directory / f"expected-first-{to}" / "out").iterdir()
            ]
            room = self.random.randint(4096, sum(sizes) if mounted else max(sizes))
            if mounted:
                subprocess.run(["umount", disk], check=True)
                mount(disk, room)
            output = disk / "out"
            process = self.start_export("first", to, output, None if mounted else room)
            process.join()
            row.times += 1
            found, errors = self.problems(output, [{}, whole], set()), self.log.read_text()
            if process.exitcode == 0:
                row.outcomes["there was just room"] += 1
            elif (
                process.exitcode == 2
                and len(re.findall("^Error: ", errors, re.M)) == 1
                and "Traceback" not in errors
            ):
                row.outcomes["exit status 2, one sentence, nothing left"] += not found
            else:
                found.append(f"exit status {process.exitcode}: {errors}")
            row.failures += [f"{to}, {room} bytes: {problem}" for problem in found]
            shutil.rmtree(output, ignore_errors=True)
        if mounted:
            subprocess.run(["umount", disk], check=True)
        return row

    def races(self, times: int) -> Row:
        row = Row("two exports of different adapters to the same output at once")
        for count in range(times):
            to = EXPORTS[count % len(EXPORTS)]
            folder = self.directory / f"race-{count}"
            folder.mkdir()
            output, processes = folder / "out", {}
            for adapter in ADAPTERS:
                processes[adapter] = self.start_export(adapter, to, output)
                time.sleep(self.random.uniform(0, self.seconds[to] / 10))
            for process in processes.values():
                process.join()
            row.times += 1
            won = [adapter for adapter, process in processes.items() if process.exitcode == 0]
            statuses = sorted(process.exitcode for process in processes.values())
            found = self.problems(output, [self.expected[adapter, to] for adapter in won], set())
            if statuses != [0, 2]:
                found.append(f"exit statuses {statuses}: {self.log.read_text()}")
            row.outcomes["one is whole, the other was refused"] += not found
            row.outcomes["won by the one that was started later"] += won == ["second"]
            row.failures += [f"{to}, {folder}: {problem}" for problem in found]
        return row


def contents(directory: Path) -> dict[str, str]:
    """File -> a hash of its bytes."""
    return {
        str(path.relative_to(directory)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(directory.rglob("*"))
        if path.is_file()
    }


def size(directory: Path) -> int:
    """Bytes of all files, some of which may go meanwhile."""
    total = 0
    for folder, _, files in os.walk(directory):
        for file in files:
            with suppress(FileNotFoundError):
                total += os.lstat(os.path.join(folder, file)).st_size
    return total


def last_whole_checkpoint(output: Path) -> tuple[str | None, int]:
    """The newest checkpoint that was written to its end, and how many were not; those are removed.

    The trainer writes trainer_state.json last.
    """
    whole, removed = [], 0
    for checkpoint in sorted(output.glob("checkpoint-*"), key=lambda path: int(path.name.partition("-")[2])):
        try:
            json.loads((checkpoint / "trainer_state.json").read_text())
            whole.append(str(checkpoint))
        except (FileNotFoundError, ValueError):
            shutil.rmtree(checkpoint)
            removed += 1
    return (whole[-1] if whole else None), removed


def mount(directory: Path, size: int) -> bool:
    """A tmpfs of so many bytes; whether it could be mounted."""
    command = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(directory)]
    return subprocess.run(command, capture_output=True).returncode == 0
