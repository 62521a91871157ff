"""What the core may import and know, and how large it may be; importing it registers but loads nothing heavy."""

import ast
import graphlib
import pathlib
import re
import subprocess
import sys
from collections import Counter
from dataclasses import fields

import pytest

from ndlora_plugins.registry import methods

ROOT = pathlib.Path(__file__).resolve().parents[2]
CORE = ROOT / "ndlora_plugins"
# package -> its folder
FOLDERS = {
    "ndlora_plugins": CORE,
    "ndlora_plugins.integrations": ROOT / "integrations",
    "ndlora_plugins.commands": ROOT / "commands",
    "ndlora_demo": ROOT / "demo" / "ndlora_demo",
}
# files of the core -> what they may import besides the standard library and what all may
ALL_MAY = {"torch", "pluggy", "ndlora_plugins", "ndlora_autoload"}
SOME_MAY = {"structures/einsum.py": {"opt_einsum"}, "kernels/triton_modes.py": {"triton"}}
# folder -> which other integrations it may import
HOSTS = {
    "peft": {"serving"},
    "serving": set(),
    "trl": {"peft"},
    "axolotl": {"peft", "trl"},
    "diffusers": {"peft"},
    "ms_swift": {"peft"},
}
MOST_LINES_OF_A_MODULE = 350
MOST_FILES_OF_A_ROOM = 10
MOST_LINES_OF_THE_CORE = 2460  # the aim is 1,800
RECORDS = ("methods", "starts", "schedules", "kernels")  # folders of the core that are not counted with it
KNOW_METHODS = [
    *(CORE / name for name in ("methods", "starts", "structures", "builtin.py")),
    ROOT / "demo" / "ndlora_demo" / "run.py",  # an example, which shows some of them
]


def module_files():
    """Every module of the project, with its file."""
    for package, folder in FOLDERS.items():
        for path in sorted(folder.rglob("*.py")):
            parts = path.relative_to(folder).with_suffix("").parts
            yield ".".join((package, *parts)).removesuffix(".__init__"), path


MODULES = dict(module_files()) | {"ndlora_autoload": ROOT / "ndlora_autoload.py"}
each_module = pytest.mark.parametrize("module", MODULES)


def imported(module, path):
    """(module, name or None) of every import, those inside functions too."""
    package = module if path.name == "__init__.py" else module.rpartition(".")[0]
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from ((alias.name, None) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            parents = package.split(".")[: len(package.split(".")) - node.level + 1]
            source = ".".join([*parents, *filter(None, [node.module])]) if node.level else node.module
            yield from ((source, alias.name) for alias in node.names)


def names_of(module, path):
    return {source for source, _ in imported(module, path)}


@pytest.mark.parametrize("path", sorted(CORE.rglob("*.py")), ids=lambda path: str(path.relative_to(CORE)))
def test_the_core_knows_no_host(path):
    names = names_of("ndlora_plugins", path)
    allowed = ALL_MAY | SOME_MAY.get(str(path.relative_to(CORE)), set()) | set(sys.stdlib_module_names)
    assert {name.partition(".")[0] for name in names} <= allowed
    assert not [
        name for name in names if name.startswith(("ndlora_plugins.integrations", "ndlora_plugins.commands"))
    ]


@pytest.mark.parametrize("host", HOSTS)
def test_hosts_know_only_those_below(host):
    package = f"ndlora_plugins.integrations.{host}"
    for module, path in MODULES.items():
        for name in names_of(module, path) if module.startswith(package) else ():
            assert not name.startswith("ndlora_plugins.commands"), path
            if name.startswith("ndlora_plugins.integrations."):
                assert name.split(".")[2] in HOSTS[host] | {host, "patches"}, path


@pytest.mark.parametrize("package", ["ndlora_plugins.integrations", "ndlora_plugins.commands", "ndlora_demo"])
def test_a_room_names_its_own_modules_by_where_they_lie(package):
    absolute = re.compile(rf"^\s*from {re.escape(package)}\b", re.MULTILINE)
    assert [path for path in FOLDERS[package].rglob("*.py") if absolute.search(path.read_text())] == []


def test_nothing_below_the_demo_imports_it():
    below = {module: path for module, path in MODULES.items() if not module.startswith("ndlora_demo")}
    known = {module: names_of(module, path) for module, path in below.items()}
    assert not [module for module in known if any(name.startswith("ndlora_demo") for name in known[module])]


def test_no_module_imports_itself_by_way_of_others():
    graph = {
        module: {
            f"{source}.{name}" if f"{source}.{name}" in MODULES else source
            for source, name in imported(module, path)
        }
        for module, path in MODULES.items()
    }
    graphlib.TopologicalSorter(graph).prepare()  # a CycleError names the circle


@each_module
def test_no_module_is_long(module):
    assert len(MODULES[module].read_text().splitlines()) <= MOST_LINES_OF_A_MODULE


def test_no_room_of_pefts_is_crowded():
    rooms = [path.parent for path in MODULES.values() if path.is_relative_to(ROOT / "integrations" / "peft")]
    assert max(Counter(rooms).values()) <= MOST_FILES_OF_A_ROOM


def test_the_core_is_small():
    counted = [path for path in CORE.rglob("*.py") if path.relative_to(CORE).parts[0] not in RECORDS]
    assert sum(len(path.read_text().splitlines()) for path in counted) <= MOST_LINES_OF_THE_CORE


def words(path):
    """Identifiers, and the words of strings that are no docstrings."""
    tree = ast.parse(path.read_text())
    docstrings = {
        id(node.body[0].value)
        for node in ast.walk(tree)
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef))
        and ast.get_docstring(node) is not None
    }
    for node in ast.walk(tree):
        for _, value in ast.iter_fields(node):
            for text in value if isinstance(value, list) else [value]:
                if isinstance(text, str) and id(node) not in docstrings:
                    yield from re.findall(r"\w+", text)


@pytest.mark.parametrize(
    "path",
    [path for path in MODULES.values() if not any(map(path.is_relative_to, KNOW_METHODS))],
    ids=lambda path: str(path.relative_to(ROOT)),
)
def test_no_methods_name_where_it_does_not_belong(path):
    options = {field.name for found in methods().values() for field in fields(found.value.Options)}
    names = {*methods()} - {"rows", "columns"}  # plain English
    found = {word for word in words(path) if word not in options and {word, *word.lower().split("_")} & names}
    assert not found


def test_importing_the_package_and_its_command_line_imports_no_host():
    hosts = {"torch", "peft", "transformers", "trl", "axolotl", "pluggy"}
    code = f"import ndlora_plugins.commands.main, sys; assert not {hosts} & set(sys.modules)"
    subprocess.run([sys.executable, "-P", "-c", code], check=True)
