"""`ndlora check`: an adapter looked over; exit status 0 if it is sound, 1 if not."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.markup import escape
from rich.table import Table

from .tables import group_by, kind_of, spread, to_json, wide_console

if TYPE_CHECKING:
    from ndlora_plugins.integrations.peft.adapters.check import CheckReport

__all__ = ["check"]


def check(
    adapter: Annotated[str, typer.Argument(help="The adapter's directory, or its name on the hub.")],
    base: Annotated[str | None, typer.Option(help="The base model: hold the adapter against it too.")] = None,
    trust_remote_code: Annotated[bool, typer.Option(help="Run the base model's own code.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Check an adapter: everything there, finite, of the right shape and dtype, and does it do anything?

    Example: ndlora check my-adapter --base Qwen/Qwen3-1.7B
    """
    from ndlora_plugins.integrations.peft.adapters.check import check_adapter

    report = check_adapter(adapter, base, trust_remote_code=trust_remote_code)
    if as_json:
        typer.echo(to_json(_as_dict(report)))
    else:
        _show(report, adapter)
    if report.problems:
        raise typer.Exit(1)


def _as_dict(report: CheckReport) -> dict[str, Any]:
    return {
        "directory": str(report.directory),
        "method": report.method,
        "ok": report.ok,
        "problems": report.problems,
        "remarks": report.remarks,
        "trainable": report.trainable,
        "bytes": report.bytes,
        "dtypes": [str(dtype).removeprefix("torch.") for dtype in report.dtypes],
        "layers": [asdict(layer) for layer in report.layers],
    }


def _show(report: CheckReport, adapter: str) -> None:
    console = wide_console()
    table = Table(title=f"{report.method} adapter {escape(adapter)}", title_justify="left")
    for column in ("layers", "count", "trainable", "in the file", "size of the update", "idle"):
        table.add_column(column, justify="left" if column == "layers" else "right")
    for kind, layers in group_by(report.layers, lambda layer: kind_of(layer.name)).items():
        norms = [layer.norm for layer in layers if layer.norm is not None]
        table.add_row(
            kind,
            str(len(layers)),
            f"{sum(layer.trainable for layer in layers):,}",
            f"{sum(layer.numbers for layer in layers):,}",
            spread(norms) if norms else "needs --base",
            str(sum(layer.idle for layer in layers)),
        )
    console.print(table)
    dtypes = ", ".join(str(dtype).removeprefix("torch.") for dtype in report.dtypes)
    console.print(
        f"{report.trainable:,} trainable numbers, {dtypes}; {report.bytes:,} bytes of tensors", end=""
    )
    console.print(f" ({len(report.others)} tensors are not the method's)." if report.others else ".")
    for remark in report.remarks:
        console.print(f"[yellow]Note:[/yellow] {escape(remark)}", highlight=False, soft_wrap=True)
    for problem in report.problems:
        console.print(f"[red]Problem:[/red] {escape(problem)}", highlight=False, soft_wrap=True)
    console.print("[red]Not fit for use.[/red]" if report.problems else "[green]Sound.[/green]")
