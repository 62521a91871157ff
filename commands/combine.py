"""`ndlora combine`: several adapters as one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

__all__ = ["combine"]


def combine(
    adapters: Annotated[list[str], typer.Argument(help="The adapters' directories, or names on the hub.")],
    output: Annotated[Path, typer.Option(help="A directory that does not exist yet, or is empty.")],
    combination_type: Annotated[
        str,
        typer.Option(
            help="cat, the exact sum; svd, ties_svd, dare_linear_svd, dare_ties_svd or magnitude_prune_svd, the "
            "leading part of the pruned sum; cluster, k-means of the rank units; keep_down, the first adapter's down."
        ),
    ] = "cat",
    weights: Annotated[
        str | None, typer.Option(help="One for each adapter, with commas: 0.7,0.3. Default: 1 for each.")
    ] = None,
    svd_rank: Annotated[
        int | None, typer.Option(help="The rank to keep, with cluster and what ends in svd.")
    ] = None,
    density: Annotated[
        float | None, typer.Option(help="The share of entries that pruning keeps, as 0.2.")
    ] = None,
    majority_sign_method: Annotated[str, typer.Option(help="total or frequency, with ties.")] = "total",
    model: Annotated[
        str | None, typer.Option(help="The base model, if not where the adapters' configurations say.")
    ] = None,
    trust_remote_code: Annotated[bool, typer.Option(help="Run the base model's own code.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Write one adapter whose update is the weighted sum of those of others.

    Example: ndlora combine maths style --weights 0.7,0.3 --output both
    """
    from ndlora_plugins.errors import NdLoraValueError
    from ndlora_plugins.integrations.peft.adapters.combine import combine_adapters
    from ndlora_plugins.integrations.peft.combining.combination import Combination

    try:
        numbers = None if weights is None else [float(weight) for weight in weights.split(",")]
    except ValueError:
        raise NdLoraValueError(f"--weights {weights!r}: give numbers with commas, as 0.7,0.3.") from None
    combination = Combination(combination_type, svd_rank, density, majority_sign_method)
    report = combine_adapters(
        adapters, output, numbers, combination, base=model, trust_remote_code=trust_remote_code
    )
    ranks = set(report.layers.values())
    if as_json:
        found = {
            "directory": str(report.directory),
            "method": report.method,
            "numbers": report.numbers,
            "ranks": dict(report.layers),
        }
        typer.echo(json.dumps(found, indent=2))
        return
    spread = f"rank {ranks.pop()}" if len(ranks) == 1 else f"rank {min(ranks)} to {max(ranks)}"
    typer.echo(
        f"{len(report.layers)} layers, {report.method}, {spread}, {report.numbers:,} numbers: {output}"
    )
