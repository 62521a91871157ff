"""The core imports torch and pluggy and nothing above them; importing it registers but loads nothing heavy."""

import ast
import pathlib
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).resolve().parents[2]

ALLOWED = {"torch", "pluggy", "ndlora_plugins", "ndlora_autoload", "__future__"}
ALLOWED_IN = {"triton_modes.py": {"triton"}}  # what nothing imports unless it is switched on
CORE = sorted((ROOT / "ndlora_plugins").rglob("*.py"))
# folder -> which other integrations it may import
HOSTS = {"peft": set(), "trl": {"peft"}, "axolotl": {"peft", "trl"}}


def imported(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module


@pytest.mark.parametrize("path", CORE, ids=lambda path: path.name)
def test_the_core_knows_no_host(path):
    names = set(imported(path))
    tops = {name.partition(".")[0] for name in names}
    assert tops - ALLOWED - ALLOWED_IN.get(path.name, set()) <= set(sys.stdlib_module_names)
    assert not {
        name for name in names if name.startswith(("ndlora_plugins.integrations", "ndlora_plugins.commands"))
    }


@pytest.mark.parametrize("host", HOSTS)
def test_hosts_know_only_those_below(host):
    for path in (ROOT / "integrations" / host).rglob("*.py"):
        for name in imported(path):
            assert not name.startswith("ndlora_plugins.commands"), path
            if name.startswith("ndlora_plugins.integrations."):
                assert name.split(".")[2] in HOSTS[host] | {host}, path


def test_importing_the_package_imports_no_host():
    hosts = {"peft", "transformers", "trl", "axolotl", "pluggy"}
    code = f"import ndlora_plugins, sys; assert not {hosts} & set(sys.modules)"
    subprocess.run([sys.executable, "-P", "-c", code], check=True)
