"""`ndlora diff`: two adapters compared; exit status 0 if they answer alike, 1 if not."""

from __future__ import annotations

from dataclasses import asdict
from typing import Annotated

import typer
from rich.markup import escape
from rich.table import Table

from .tables import group_by, kind_of, spread, to_json, wide_console

__all__ = ["diff"]


def diff(
    first: Annotated[str, typer.Argument(help="An adapter's directory, or its name on the hub.")],
    second: Annotated[str, typer.Argument(help="Another one's, of the same base model.")],
    base: Annotated[
        str | None, typer.Option(help="The base model, if not where the configurations say.")
    ] = None,
    trust_remote_code: Annotated[bool, typer.Option(help="Run the base model's own code.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Compare two adapters: fields of the configuration, and the update of each layer. Status 1: they differ.

    Example: ndlora diff checkpoint-100 checkpoint-200
    """
    from ndlora_plugins.integrations.peft.adapters.diff import diff_adapters
    from ndlora_plugins.integrations.peft.configuration.validation import shorten

    found = diff_adapters(first, second, base=base, trust_remote_code=trust_remote_code)
    if as_json:
        typer.echo(to_json(asdict(found) | {"same": found.same}))
    else:
        console = wide_console()
        for name, (one, other) in found.fields.items():
            console.print(f"{name}: {escape(shorten(one))} -> {escape(shorten(other))}", highlight=False)
        table = Table("layers", "count", "||A||", "||B||", "||B - A|| / ||A||", "cosine")
        for kind, layers in group_by(found.layers, lambda layer: kind_of(layer.name)).items():
            cosines = [layer.cosine for layer in layers if layer.cosine is not None]
            table.add_row(
                kind,
                str(len(layers)),
                *(spread([layer.norms[side] for layer in layers]) for side in (0, 1)),
                spread([layer.change for layer in layers]),
                spread(cosines) if cosines else "-",
            )
        if found.layers:
            console.print(table)
        for side, names in zip("AB", found.only, strict=True):
            if names:
                console.print(f"Only {side} adapts {len(names)} layers: {escape(shorten(list(names)))}")
        for key in found.beside:
            console.print(f"Differs: {escape(key)}", highlight=False)
        console.print("They answer alike." if found.same else "They differ.")
    if not found.same:
        raise typer.Exit(1)
