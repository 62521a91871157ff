"""Adapters of the demo in a real server: exported, served, and asked for by `ndlora verify`.

`python -m benchmarks.serving vllm .envs/vllm/bin/python demo-output` writes benchmarks/serving/results/vllm.json, from
which tests/test_docs.py makes the tables of docs/serving.md. Each method's adapter is `ndlora demo`'s.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any
from urllib.error import URLError
from urllib.request import Request, urlopen

import typer

from benchmarks.common import write_json
from benchmarks.serving.servers import SERVERS, Server, versions_in
from ndlora_plugins.errors import NdLoraValueError
from ndlora_plugins.integrations.peft.exports.export import export_adapter
from ndlora_plugins.integrations.serving.verify import verify_server

METHODS = ("crossed", "shared_crossed", "slora", "nlora", "inttune", "lora_xs", "metatt", "svfit")
"""Some of those with an exact LoRA."""
LATE = "svfit"  # loaded when the server runs, where it can
RESULTS = Path(__file__).with_name("results")


def main(
    server: Annotated[str, typer.Argument(help=f"One of {', '.join(SERVERS)}.")],
    python: Annotated[Path, typer.Argument(help="The interpreter of the server's environment.")],
    trained: Annotated[Path, typer.Argument(help="What `ndlora demo --output` wrote.")],
    methods: Annotated[list[str] | None, typer.Option("--method", help="Again for several.")] = None,
    results: Annotated[Path, typer.Option(help="Where the JSON goes.")] = RESULTS,
) -> None:
    """Export, serve, verify, and write down what came of it."""
    with tempfile.TemporaryDirectory() as folder:
        found = measure(SERVERS[server], python.absolute(), trained, methods or METHODS, Path(folder))
    write_json(found, results / f"{server}.json")
    wrong = [row["method"] for row in found["adapters"] if row["serves"] != "adapter"]
    wrong += [case for case, row in found["others"].items() if not row["right"]]
    print(f"Not as expected: {', '.join(wrong) or 'nothing'}")
    raise typer.Exit(bool(wrong))


def measure(
    server: Server, python: Path, trained: Path, methods: tuple[str, ...], folder: Path
) -> dict[str, Any]:
    """Every method's verdict, and those on the base, another adapter and a name that is not there."""
    base, seconds = trained / "base", {}
    for method in methods:
        begin = time.perf_counter()
        export_adapter(trained / method, folder / method, server.form, base=str(base), self_test=True)
        seconds[method] = time.perf_counter() - begin
        print(f"{method}: exported in {seconds[method]:.0f} s", flush=True)
    begin = time.perf_counter()
    late = LATE if server.load is not None and LATE in methods else None
    early = [method for method in methods if method != late]
    with running(server, python, base, [folder / method for method in early], folder) as url:
        starting = time.perf_counter() - begin
        if late:
            _post(
                f"{url.removesuffix('/v1')}{server.load}",
                {"lora_name": late, "lora_path": str(folder / late)},
            )
        rows = []
        for method in methods:
            begin = time.perf_counter()
            model, body = server.ask(method, early)
            verdict = verify_server(folder / method, url, model, body=body, timeout=600)
            print(f"{method}: {verdict}", flush=True)
            rows.append(
                {
                    "method": method,
                    "serves": verdict.serves,
                    "equal_answers": verdict.equal_answers,
                    "prompts": verdict.prompts,
                    "to_adapter": round(verdict.to_adapter, 4),
                    "between": round(verdict.between, 4),
                    "loaded": "at run time" if method == late else "at the start",
                    "export_seconds": round(seconds[method], 1),
                    "verify_seconds": round(time.perf_counter() - begin, 1),
                }
            )
        others = _others(server, url, folder, early)
    return {
        "server": server.name,
        "versions": {
            **versions_in(python, server.packages),
            "peft": version("peft"),
            "torch": version("torch"),
        },
        "start_seconds": round(starting, 1),
        "adapters": rows,
        "others": others,
    }


def _others(server: Server, url: str, folder: Path, served: list[str]) -> dict[str, dict[str, Any]]:
    """What is said where the server serves something else than the first adapter, which is asked for."""
    found = {}
    for case, (model, body, expected) in server.others(served).items():
        try:
            verdict = verify_server(folder / served[0], url, model, body=body, timeout=600)
            said, serves = str(verdict), verdict.serves
        except NdLoraValueError as error:
            said, serves = str(error).replace(url, "http://127.0.0.1:8000/v1"), "error"
        print(f"{case}: {said}", flush=True)
        found[case] = {"serves": serves, "right": serves == expected, "said": said}
    return found


@contextmanager
def running(server: Server, python: Path, base: Path, adapters: list[Path], folder: Path) -> Iterator[str]:
    """The server's process; gives the address of its API."""
    port = 8124
    command, environment = server.command(python, base, adapters, port, folder)
    log = folder / "server.log"
    with log.open("w") as output:
        process = subprocess.Popen(command, stdout=output, stderr=output, env=environment, cwd=folder)
    try:
        for _ in range(600):
            if process.poll() is not None:
                sys.exit(f"The server ended:\n{log.read_text()[-4000:]}")
            try:
                urlopen(f"http://127.0.0.1:{port}/health", timeout=5).close()
                break
            except (URLError, OSError):
                time.sleep(1)
        else:
            sys.exit(f"The server did not come up in ten minutes:\n{log.read_text()[-4000:]}")
        yield f"http://127.0.0.1:{port}/v1"
    finally:
        process.terminate()
        try:
            process.wait(30)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _post(url: str, body: dict[str, Any]) -> None:
    urlopen(
        Request(url, json.dumps(body).encode(), {"Content-Type": "application/json"}), timeout=300
    ).close()


if __name__ == "__main__":
    typer.run(main)
