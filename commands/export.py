"""`ndlora export`: an NDLORA adapter as plain LoRA or LoKr, or merged into its base model."""

from __future__ import annotations

import signal
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from enum import Enum
from pathlib import Path
from types import FrameType
from typing import Annotated

import typer
from rich.markup import escape
from rich.table import Table

from ndlora_plugins.errors import NdLoraValueError, NdLoraWarning

from .tables import group_by, kind_of, to_json, wide_console

__all__ = ["export"]


class Kind(str, Enum):
    """What `--to` takes."""

    lora = "lora"
    lokr = "lokr"
    gguf = "gguf"
    lycoris = "lycoris"
    merged = "merged"
    ndlora = "ndlora"


class Dtype(str, Enum):
    """What `--dtype` takes."""

    float32 = "float32"
    float16 = "float16"
    bfloat16 = "bfloat16"


def export(
    adapter: Annotated[str, typer.Argument(help="The adapter's directory, or its name on the hub.")],
    to: Annotated[
        Kind,
        typer.Option(
            help="lora; gguf, that LoRA for llama.cpp; lokr; lycoris, that LoKr for image tools; merged; or a "
            "smaller ndlora."
        ),
    ],
    output: Annotated[Path, typer.Option(help="A directory that does not exist yet, or is empty.")],
    base: Annotated[
        str | None, typer.Option(help="The base model, if not where the adapter's configuration says.")
    ] = None,
    rank: Annotated[int | None, typer.Option(help="LoRA's rank, in every layer.")] = None,
    energy: Annotated[
        float | None, typer.Option(help="LoRA's rank by the share of squared singular values kept, as 0.99.")
    ] = None,
    max_error: Annotated[
        float | None, typer.Option(help="LoRA's rank by the largest relative error allowed, as 0.05.")
    ] = None,
    nested: Annotated[
        bool,
        typer.Option(
            help="--rank counts the first rank units, as of nested ranks; no SVD. --to ndlora always does this."
        ),
    ] = False,
    dtype: Annotated[
        Dtype | None, typer.Option(help="Of the exported adapter; the adapter's by default.")
    ] = None,
    any_size: Annotated[
        bool,
        typer.Option(
            help="Also a LoRA that is larger than the layers' weights, or of a rank that vLLM does not serve."
        ),
    ] = False,
    self_test: Annotated[
        bool, typer.Option(help="Beside it what `ndlora verify` asks a server for: loads the base model.")
    ] = False,
    prompts: Annotated[
        Path | None, typer.Option(help="Of the self-test: a text file, one prompt a line.")
    ] = None,
    trust_remote_code: Annotated[bool, typer.Option(help="Run the base model's own code.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Write an adapter as plain LoRA or LoKr, GGUF, the merged model, or a smaller one of ours.

    Example: ndlora export my-adapter --to lora --output my-lora
    """
    import torch

    from ndlora_plugins.integrations.peft.exports.export import export_adapter

    with _sigterm_raises(), warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", NdLoraWarning)
        report = export_adapter(
            adapter,
            output,
            to.value,
            base=base,
            rank=rank,
            energy=energy,
            max_error=max_error,
            nested=nested,
            dtype=None if dtype is None else getattr(torch, dtype.value),
            any_size=any_size,
            self_test=_read_prompts(prompts) if prompts else self_test,
            trust_remote_code=trust_remote_code,
        )
    notes = [str(entry.message) for entry in caught if issubclass(entry.category, NdLoraWarning)]
    if as_json:
        found = {
            "directory": str(report.directory),
            "kind": report.kind,
            "largest_error": report.largest_error,
            "notes": notes,
            "layers": [asdict(layer) for layer in report.layers],
        }
        typer.echo(to_json(found))
        return
    console = wide_console()
    error = "lost to rounding" if to is Kind.merged else "relative error"
    table = Table(title=f"{escape(adapter)} to {to.value}", title_justify="left")
    for column in ("layers", "count", "form", "numbers", error):
        table.add_column(column, justify="left" if column == "layers" else "right")
    alike = group_by(report.layers, lambda layer: (kind_of(layer.name), layer.form))
    for (kind, form), layers in alike.items():
        numbers = sum(layer.parameters for layer in layers)
        table.add_row(
            kind, str(len(layers)), form, f"{numbers:,}", _error(max(layer.error for layer in layers))
        )
    console.print(table)
    for note in notes:
        console.print(f"[yellow]Note:[/yellow] {escape(note)}", highlight=False, soft_wrap=True)
    numbers = sum(layer.parameters for layer in report.layers)
    console.print(
        f"{len(report.layers)} layers, {numbers:,} numbers, {error} at most {_error(report.largest_error)}: "
        f"{output}",
        soft_wrap=True,
    )
    if report.server_flags:
        console.print(f"vLLM serves it with {escape(report.server_flags)}", highlight=False, soft_wrap=True)


def _read_prompts(path: Path) -> list[str]:
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise NdLoraValueError(f"{path} is no text in UTF-8: {error}.") from error
    found = [line for line in text.splitlines() if line.strip()]
    if not found:
        raise NdLoraValueError(f"{path} holds no prompt: write one a line.")
    return found


@contextmanager
def _sigterm_raises() -> Iterator[None]:
    """Let SIGTERM end the process by an exception, so that what is unfinished is removed; only the first counts."""

    def stop(number: int, frame: FrameType | None) -> None:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        raise SystemExit(128 + number)

    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _error(error: float) -> str:
    return f"{error:.2g}" if error >= 1e-7 else "<1e-07"  # smaller ones are not resolved
