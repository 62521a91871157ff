"""`ndlora prune`: an adapter without the rank units that are zero."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

__all__ = ["prune"]


def prune(
    adapter: Annotated[str, typer.Argument(help="The adapter's directory, or its name on the hub.")],
    output: Annotated[Path, typer.Option(help="A directory that does not exist yet, or is empty.")],
    tolerance: Annotated[
        float,
        typer.Option(help="Units go too that add at most this share of their layer's update, each, as 0.01."),
    ] = 0.0,
    base: Annotated[
        str | None, typer.Option(help="The base model, if not where the adapter's configuration says.")
    ] = None,
    trust_remote_code: Annotated[bool, typer.Option(help="Run the base model's own code.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Write a smaller adapter with equal answers: without rank units that are zero, a rank for each layer.

    Example: ndlora prune my-sora --output my-small-sora
    """
    from ndlora_plugins.integrations.peft.adapters.smaller import prune_adapter

    report = prune_adapter(adapter, output, tolerance, base=base, trust_remote_code=trust_remote_code)
    if as_json:
        layers = [asdict(layer) for layer in report.layers]
        typer.echo(
            json.dumps({"directory": str(output), "numbers": report.numbers, "layers": layers}, indent=2)
        )
        return
    units = [sum(getattr(layer, name) for layer in report.layers) for name in ("rank_before", "rank")]
    gone = sum(not layer.rank for layer in report.layers)
    typer.echo(
        f"{units[1]:,} of {units[0]:,} rank units kept, {gone} of {len(report.layers)} layers left out, "
        f"{report.numbers:,} numbers, relative error at most {report.largest_error:.2g}: {output}"
    )
