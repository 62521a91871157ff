"""`ndlora verify`: does a running server serve this adapter?"""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import Annotated

import typer

from ndlora_plugins.errors import NdLoraValueError

__all__ = ["verify"]


def verify(
    directory: Annotated[str, typer.Argument(help="What `ndlora export --self-test` wrote.")],
    model: Annotated[str, typer.Option(help="The name under which the server has the adapter.")],
    url: Annotated[str, typer.Option(help="The server's API.")] = "http://127.0.0.1:8000/v1",
    body: Annotated[
        str | None,
        typer.Option(help='Further JSON for each request, as \'{"lora": [{"id": 0, "scale": 1}]}\'.'),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Ask a running server whether it serves an adapter, its base model or something else. Status 0: the adapter.

    Example: ndlora verify my-lora --url http://127.0.0.1:8000/v1 --model my-lora
    """
    from ndlora_plugins.integrations.serving.verify import verify_server

    try:
        more = json.loads(body or "{}")
        if not isinstance(more, dict):
            raise ValueError("not an object")
    except ValueError as error:
        raise NdLoraValueError(f"--body {body!r} is no JSON object: {error}.") from error
    verdict = verify_server(directory, url, model, body=more)
    typer.echo(json.dumps(asdict(verdict), indent=2) if as_json else str(verdict))
    if verdict.serves != "adapter":
        raise typer.Exit(1)
