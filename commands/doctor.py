"""`ndlora doctor`: whether the hosts here find NDLORA; exit status 0 if they do, 1 if something is in the way."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib import metadata
from typing import Annotated, Any

import typer

__all__ = ["Finding", "doctor", "examine"]

HOSTS = (
    "torch", "peft", "transformers", "trl", "axolotl", "accelerate", "ms-swift", "unsloth", "vllm", "bitsandbytes",
    "deepspeed", "triton",
)  # fmt: skip
# variable -> whether a value of it turns off that hosts find us without an import
SWITCHES = {
    "NDLORA_AUTOLOAD": lambda value: value.strip().lower() in ("0", "false", "no", "off"),
    "TORCH_DEVICE_BACKEND_AUTOLOAD": lambda value: value != "1",
}
_SECONDS = 300
# what a host that never imports us sees; one line of JSON at the end
_PROBES = {
    "peft": """
        from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING as table
        found = table.get("NDLORA")
        ours = getattr(found, "__module__", "").startswith("ndlora_plugins.integrations.peft.configuration.config")
        said = "NDLORA is one of its types" if ours else "" if found is None else f"NDLORA stands for {found!r}"
        bad = None if ours else "peft does not know NDLORA"
    """,
    "transformers": """
        import peft
        from packaging.version import Version
        from transformers.integrations import peft as theirs
        wanted = getattr(theirs, "MIN_PEFT_VERSION", "0")
        if Version(wanted) > Version(peft.__version__):
            off = f"model.add_adapter asks for PEFT {wanted}, here is {peft.__version__}: use get_peft_model"
    """,
    "trl": """
        import trl
        from ndlora_plugins.integrations.trl import NdLoraCallback
        said, bad = "NdLoraCallback can be used", None
    """,
    "axolotl": """
        import axolotl.utils.config as config
        ours = hasattr(config.validate_config, "stands_before_a_hosts")  # integrations/patches.py
        said = "`adapter: ndlora` brings the plugin" if ours else ""
        bad = None if ours else "`adapter: ndlora` alone does not bring the plugin: write it under plugins:"
    """,
}


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at.

    Attributes:
        status: "good", "off" (it is not there, or switched off on purpose) or "problem".
        remedy: what to do about a problem.
    """

    what: str
    status: str
    said: str
    remedy: str = ""


def examine(hosts: Sequence[str] | None = None) -> Iterator[Finding]:
    """Look at the entry point, the switches, each of `HOSTS`, or of these, in a process of its own, and the plugins."""
    yield _autoload()
    yield from _switches(os.environ)
    for host in HOSTS if hosts is None else hosts:
        version = _version(host)
        if version is None:
            yield Finding(host, "off", "not installed")
        elif host in _PROBES:
            yield _probe(host, version)
        else:
            yield Finding(host, "good", version)
    yield _plugins()


def _autoload() -> Finding:
    entries = metadata.entry_points(group="torch.backends")
    if not any(entry.value.startswith("ndlora_autoload:") for entry in entries):
        return Finding(
            "autoload",
            "problem",
            "torch's entry points do not name ndlora_autoload",
            "reinstall ndlora-plugins",
        )
    return Finding(
        "autoload", "good", f"ndlora-plugins {_version('ndlora-plugins')} is in torch's entry points"
    )


def _switches(environment: Mapping[str, str]) -> list[Finding]:
    findings = []
    for name, shuts in SWITCHES.items():
        value = environment.get(name)
        if value is None:
            continue
        shut = shuts(value)
        remedy = f"unset {name}, or `import ndlora_plugins` before an adapter is loaded" if shut else ""
        said = f"{name}={value}: autoload is {'off' if shut else 'on'}"
        findings.append(Finding("switch", "problem" if shut else "good", said, remedy))
    return findings


def _probe(host: str, version: str) -> Finding:
    code = textwrap.dedent(_PROBES[host])
    code = (
        f"import json\nsaid, bad, off = '', None, None\n{code}\nprint('\\n' + json.dumps([said, bad, off]))"
    )
    try:
        done = subprocess.run(
            [sys.executable, "-P", "-W", "ignore", "-c", code],
            capture_output=True,
            text=True,
            timeout=_SECONDS,
        )
    except subprocess.TimeoutExpired:
        return Finding(
            host, "problem", f"{version}: its import took over {_SECONDS} s", f"try: import {host}"
        )
    if done.returncode:
        last = done.stderr.strip().splitlines()[-1:] or [f"exit status {done.returncode}"]
        return Finding(host, "problem", f"{version}: {last[0][:300]}", f"reinstall {host} or ndlora-plugins")
    said, bad, off = json.loads(done.stdout.strip().splitlines()[-1])
    if bad is not None:
        return Finding(host, "problem", f"{version}: {bad}. {said}".strip(), "see autoload and the switches")
    if off is not None:
        return Finding(host, "off", f"{version}: {off}")
    return Finding(host, "good", f"{version}: {said}" if said else version)


def _plugins() -> Finding:
    from ndlora_plugins.registry import methods, starts

    try:
        brought = {found.plugin for found in (*methods().values(), *starts().values())}
    except Exception as error:  # a stranger's plugin may do anything
        return Finding(
            "plugins", "problem", f"{type(error).__name__}: {error}"[:300], "uninstall that plugin"
        )
    return Finding(
        "plugins",
        "good",
        f"{len(methods())} methods, {len(starts())} starts, of {', '.join(sorted(brought))}",
    )


def _version(distribution: str) -> str | None:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None


def doctor(as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False) -> None:
    """Look whether PEFT, TRL and Axolotl find NDLORA here, what is off and why. Status 1: something is in the way.

    Example: ndlora doctor
    """
    python = sys.version.split()[0]
    findings = []
    if not as_json:
        typer.echo(f"Python {python}, {sys.executable}")
    for finding in examine():  # each host's import takes seconds: what is found is shown at once
        findings.append(finding)
        if not as_json:
            remedy = f" -> {finding.remedy}" if finding.remedy else ""
            typer.echo(f"{finding.status:8} {finding.what:13} {finding.said}{remedy}")
    if as_json:
        found: dict[str, Any] = {"python": python, "findings": [asdict(finding) for finding in findings]}
        typer.echo(json.dumps(found, indent=2))
    if any(finding.status == "problem" for finding in findings):
        raise typer.Exit(1)
