"""`ndlora doctor`: whether the hosts here find NDLORA; exit status 0 if they do, 1 if something is in the way."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib import metadata
from typing import Annotated, Any

import typer

__all__ = ["Finding", "doctor", "examine"]

HOSTS = (
    "torch", "peft", "transformers", "trl", "axolotl", "accelerate", "ms-swift", "unsloth", "vllm", "bitsandbytes",
    "deepspeed", "triton",
)  # fmt: skip
# variable -> whether a value of it shuts the door
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


def examine(hosts: Sequence[str] | None = None) -> list[Finding]:
    """Look at the door, the switches, each of `HOSTS`, or of these, in a process of its own, and the plugins."""
    findings = [_door(), *_switches(os.environ)]
    for host in HOSTS if hosts is None else hosts:
        version = _version(host)
        if version is None:
            findings.append(Finding(host, "off", "not installed"))
        elif host in _PROBES:
            findings.append(_probe(host, version))
        else:
            findings.append(Finding(host, "good", version))
    return [*findings, _plugins()]


def _door() -> Finding:
    entries = metadata.entry_points(group="torch.backends")
    if not any(entry.value.startswith("ndlora_autoload:") for entry in entries):
        return Finding(
            "door", "problem", "torch's entry points do not name ndlora_autoload", "reinstall ndlora-plugins"
        )
    return Finding("door", "good", f"ndlora-plugins {_version('ndlora-plugins')} is in torch's entry points")


def _switches(environment: Mapping[str, str]) -> list[Finding]:
    findings = []
    for name, shuts in SWITCHES.items():
        value = environment.get(name)
        if value is None:
            continue
        shut = shuts(value)
        remedy = f"unset {name}, or `import ndlora_plugins` before an adapter is loaded" if shut else ""
        said = f"{name}={value}: the door is {'shut' if shut else 'open'}"
        findings.append(Finding("switch", "problem" if shut else "good", said, remedy))
    return findings


def _probe(host: str, version: str) -> Finding:
    code = textwrap.dedent(_PROBES[host])
    code = f"import json\nsaid, bad = '', None\n{code}\nprint('\\n' + json.dumps([said, bad]))"
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
    said, bad = json.loads(done.stdout.strip().splitlines()[-1])
    if bad is not None:
        return Finding(host, "problem", f"{version}: {bad}. {said}".strip(), "see the door and the switches")
    return Finding(host, "good", f"{version}: {said}")


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
    findings = examine()
    python = sys.version.split()[0]
    if as_json:
        found: dict[str, Any] = {"python": python, "findings": [asdict(finding) for finding in findings]}
        typer.echo(json.dumps(found, indent=2))
    else:
        typer.echo(f"Python {python}, {sys.executable}")
        for finding in findings:
            remedy = f" -> {finding.remedy}" if finding.remedy else ""
            typer.echo(f"{finding.status:8} {finding.what:13} {finding.said}{remedy}")
    if any(finding.status == "problem" for finding in findings):
        raise typer.Exit(1)
