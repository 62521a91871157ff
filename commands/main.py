"""`ndlora`: the command line. Each command is a thin layer over a function of the package."""

from __future__ import annotations

import json
import os
import shutil
import sys
import warnings
from importlib import metadata
from typing import Annotated

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from ndlora_plugins.errors import MissingExtraError, NdLoraError, NdLoraValueError

from .check import check
from .combine import combine
from .diff import diff
from .doctor import doctor
from .export import export
from .init import init
from .prune import prune
from .tables import wide_console
from .tune import tune
from .verify import verify

app = typer.Typer(
    help="Adapters with fewer parameters than LoRA, for PEFT, TRL and Axolotl. "
    "`ndlora COMMAND --help` shows an example.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)
console = wide_console()
# for a command that looks at its options, `--help` among them, by itself
TAKES_ANYTHING = {
    "add_help_option": False,
    "context_settings": {"allow_extra_args": True, "ignore_unknown_options": True},
}


def run() -> None:
    """The console script: an error is shown as one line, without a traceback, and ends with status 2.

    What goes wrong inside `ndlora sft`'s training keeps its traceback, and with NDLORA_TRACEBACK=1 everything.
    """
    if not sys.warnoptions:
        warnings.simplefilter("ignore", FutureWarning)  # among the hosts; nothing for the user to do
    try:
        app(prog_name="ndlora")  # however it was started: completion asks for it
    except BrokenPipeError as error:  # whoever read our output has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise SystemExit(1) from error
    except Exception as error:
        expected = isinstance(error, (NdLoraError, OSError))
        if os.environ.get("NDLORA_TRACEBACK") or (not expected and sys.argv[1:2] == ["sft"]):
            raise
        said = _in_one_line(error) if isinstance(error, OSError) else str(error)
        if not expected:
            said = f"{type(error).__name__}: {' '.join(said.split())} (NDLORA_TRACEBACK=1 shows where)"
        _complain(said)
        raise SystemExit(2) from error


def _complain(text: str) -> None:
    Console(stderr=True).print(f"[red]Error:[/red] {escape(text)}", highlight=False, soft_wrap=True)


def _in_one_line(error: OSError) -> str:
    """What and where: "No space left on device: /models/merged/model.safetensors"."""
    if isinstance(error, shutil.Error):  # of copytree: (source, target, reason) of each file
        return error.args[0][0][2]
    what = error.strerror or next(iter(str(error).splitlines()), type(error).__name__)
    where = " -> ".join(os.fsdecode(path) for path in (error.filename, error.filename2) if path is not None)
    return f"{what}: {where}" if where else what


def _show_version(wanted: bool) -> None:
    if wanted:
        from ndlora_plugins import __version__

        typer.echo(f"ndlora-plugins {__version__}")
        raise typer.Exit


@app.callback()
def main(
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """What holds for all commands; the text of the help is in `app`."""


@app.command()
def plan(
    model: Annotated[
        str, typer.Argument(help="A model's directory, its config.json, or its name on the hub.")
    ],
    method: Annotated[str | None, typer.Option(help="One that `ndlora methods` lists.")] = None,
    r: Annotated[int | None, typer.Option(help="The rank, or the number of Kronecker terms.")] = None,
    init: Annotated[str | None, typer.Option(help="The name of a start.")] = None,
    anchor: Annotated[str | None, typer.Option(help="snapshot or none.")] = None,
    num_modes: Annotated[int | None, typer.Option(help="Into how many modes a dimension is split.")] = None,
    crossed_modes: Annotated[
        int | None, typer.Option(help="The size of the small modes, of modes that cross.")
    ] = None,
    option: Annotated[
        list[str] | None, typer.Option(help="An option of the method's own, NAME=JSON; may be repeated.")
    ] = None,
    target: Annotated[list[str] | None, typer.Option(help="A target module; may be repeated.")] = None,
    lora_rank: Annotated[int, typer.Option(min=1, help="The rank of plain LoRA to compare with.")] = 8,
    parameters: Annotated[
        str | None, typer.Option(help="Choose the best known adapter of at most so many: 1M, 250k.")
    ] = None,
    file_bytes: Annotated[
        str | None, typer.Option("--bytes", help="Choose one whose file has at most so many bytes: 2MB.")
    ] = None,
    like_lora_r: Annotated[
        int | None,
        typer.Option(min=1, help="Choose one with as many parameters as plain LoRA of this rank."),
    ] = None,
    fraction: Annotated[str | None, typer.Option(help="Of --like-lora-r's parameters: 1/16.")] = None,
    lora_rate: Annotated[
        float, typer.Option(help="With a budget: the learning rate that you would give LoRA r=8.")
    ] = 2e-4,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
) -> None:
    """Show what an adapter would cost, layer by layer, against LoRA; or choose one for a budget. No weights are loaded.

    Example: ndlora plan Qwen/Qwen3-1.7B --parameters 1M
    """
    from .choose import as_dict, as_text, choose_for_config
    from .plan import parse_options, plan_from_model_config

    if not (parameters is None and file_bytes is None and like_lora_r is None and fraction is None):
        if any((method, r, init, anchor, num_modes, crossed_modes, option, lora_rank != 8)):
            raise NdLoraValueError(
                "A budget chooses the method and its options, and is compared with LoRA r=8: leave --lora-rank and "
                "those of the method out."
            )
        choice = choose_for_config(
            model,
            parameters=parameters,
            file_bytes=file_bytes,
            like_lora_r=like_lora_r,
            fraction=fraction,
            lora_rate=lora_rate,
            **({"target_modules": target} if target else {}),
        )
        typer.echo(json.dumps(as_dict(choice), indent=2) if as_json else as_text(choice))
        return
    budget = plan_from_model_config(
        model,
        lora_rank=lora_rank,
        method=method,
        r=r,
        init_lora_weights=True if init is None else init,
        anchor=anchor,
        num_modes=num_modes,
        crossed_modes=crossed_modes,
        options=parse_options(option or []),
        target_modules=target or None,
    )
    header, rows = budget.table()
    if as_json:
        typer.echo(
            json.dumps(
                {
                    "layers": [dict(zip(header, row, strict=True)) for row in rows[:-1]],
                    "parameters": budget.parameters,
                    "saved": budget.saved,
                    "frozen": budget.frozen,
                    "multiply_adds": budget.multiply_adds,
                    "lora_rank": lora_rank,
                    "lora_parameters": budget.lora_parameters,
                },
                indent=2,
            )
        )
        return
    name = budget.rows[0].adapter.method.name
    table = Table(title=f"{name} on {model}", title_justify="left")
    for column in header:
        table.add_column(
            column, justify="left" if column in ("layer", "modes (out x in)", "note") else "right"
        )
    for row in rows:
        if row is rows[-1]:
            table.add_section()
        table.add_row(*row)
    console.print(table)
    console.print(budget.summary)


@app.command()
def methods(
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of tables.")] = False,
) -> None:
    """List the methods, the starts and the schedules, where each came from, and the versions in use.

    Example: ndlora methods --json
    """
    from .methods import describe_methods, describe_schedules, describe_starts
    from .plan import versions

    tables = {
        "methods": describe_methods(),
        "starts": describe_starts(),
        "schedules": describe_schedules(),
    }
    if as_json:
        typer.echo(json.dumps({**tables, "versions": versions()}, indent=2))
        return
    for title, rows in tables.items():
        table = Table(*rows[0], title=title.capitalize(), title_justify="left")
        for row in rows:
            cells = [cell if isinstance(cell, list) else [cell] for cell in row.values()]
            table.add_row(*(", ".join(map(str, cell)) for cell in cells))
        console.print(table)
    console.print(", ".join(f"{name} {version}" for name, version in versions().items()))


@app.command(**TAKES_ANYTHING)
def sft(context: typer.Context) -> None:
    """Fine-tune with TRL: the YAML and the options of `trl sft`, and an `ndlora:` block.

    Example: ndlora sft --config run.yaml
    """
    from ndlora_plugins.integrations.trl.sft import main

    main(context.args)


def no_demo(_context: typer.Context) -> None:
    """Not installed: `pip install "ndlora-plugins[demo]"` brings it."""
    raise MissingExtraError(
        '`ndlora demo` is a package of its own: run `pip install "ndlora-plugins[demo]"`.'
    )


for command in (tune, init, check, export, verify, combine, prune, diff):
    app.command()(command)
try:  # one package is asked, not every one that is installed: each start of `ndlora` waits for it
    demo = metadata.distribution("ndlora-plugins-demo").entry_points["demo"]
except metadata.PackageNotFoundError:
    app.command("demo", **TAKES_ANYTHING)(no_demo)
else:
    app.command("demo")(demo.load())
app.command()(doctor)


if __name__ == "__main__":
    run()
