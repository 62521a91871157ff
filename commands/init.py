"""`ndlora init`: a fresh adapter directory."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

__all__ = ["init"]


def init(
    model: Annotated[str, typer.Argument(help="The base model's directory, or its name on the hub.")],
    output: Annotated[Path, typer.Option(help="A directory that does not exist yet, or is empty.")],
    method: Annotated[str | None, typer.Option(help="One that `ndlora methods` lists.")] = None,
    r: Annotated[int | None, typer.Option(help="The rank, or the number of Kronecker terms.")] = None,
    alpha: Annotated[float | None, typer.Option(help="lora_alpha.")] = None,
    start: Annotated[str | None, typer.Option("--init", help="The name of a start.")] = None,
    option: Annotated[
        list[str] | None, typer.Option(help="An option of the method's own, NAME=JSON; may be repeated.")
    ] = None,
    target: Annotated[list[str] | None, typer.Option(help="A target module; may be repeated.")] = None,
    field: Annotated[
        list[str] | None,
        typer.Option(
            help="Any other field of NdLoraConfig, NAME=JSON; may be repeated: --field lora_dropout=0.1."
        ),
    ] = None,
    seed: Annotated[int, typer.Option(help="random_seed: makes the start reproducible.")] = 0,
    trust_remote_code: Annotated[bool, typer.Option(help="Run the base model's own code.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Write a fresh adapter, for hosts that resume any adapter's directory. The model is not loaded.

    Example: ndlora init Qwen/Qwen3-1.7B --output fresh --method metatt --r 16
    """
    from ndlora_plugins.errors import NdLoraValueError
    from ndlora_plugins.integrations.peft.adapters.start import init_adapter
    from ndlora_plugins.integrations.peft.configuration.config import NdLoraConfig
    from ndlora_plugins.integrations.peft.configuration.validation import fields_to_set

    from .plan import parse_options

    fields = {
        "method": method,
        "r": r,
        "lora_alpha": alpha,
        "init_lora_weights": start,
        "options": parse_options(option or []),
        "target_modules": target,
        "random_seed": seed,
    }
    given = {name: value for name, value in fields.items() if value not in (None, {}, [])}
    more = parse_options(field or [], "--field")
    known = {each.name for each in fields_to_set(NdLoraConfig)} | {"task_type"}
    twice = sorted(set(more) & set(fields))
    if twice:
        raise NdLoraValueError(f"--field: {twice} have flags of their own: see `ndlora init --help`.")
    unknown = sorted(set(more) - known)
    if unknown:
        raise NdLoraValueError(f"--field: unknown fields {unknown}. Known: {', '.join(sorted(known))}.")
    report = init_adapter(model, output, NdLoraConfig(**(more | given)), trust_remote_code=trust_remote_code)
    if as_json:
        typer.echo(json.dumps(asdict(report) | {"directory": str(output)}, indent=2))
        return
    typer.echo(
        f"{report.method} on {report.layers} layers, {report.trainable:,} trainable numbers, {report.numbers:,} in the "
        f"file: {output}"
    )
