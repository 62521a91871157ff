"""The distribution holds what the tree holds, under the names that the contract gives."""

import pathlib
import subprocess
import sys
import zipfile
from importlib import metadata

import pytest

try:
    import tomllib
except ModuleNotFoundError:  # Python 3.10
    import tomli as tomllib

ROOT = pathlib.Path(__file__).resolve().parents[2]
# folder -> package
FOLDERS = {
    "ndlora_plugins": "ndlora_plugins",
    "integrations": "ndlora_plugins.integrations",
    "commands": "ndlora_plugins.commands",
}


def project():
    return tomllib.loads((ROOT / "pyproject.toml").read_text())


def packages_in_the_tree():
    for folder, package in FOLDERS.items():
        for path in (ROOT / folder).rglob("__init__.py"):
            yield ".".join([package, *path.parent.relative_to(ROOT / folder).parts])


def test_every_package_is_listed():
    assert sorted(project()["tool"]["setuptools"]["packages"]) == sorted(packages_in_the_tree())


def test_no_tests_folder_is_a_package():
    assert not list((ROOT / "tests").rglob("__init__.py"))


def test_no_second_copy_is_imported():
    assert not {"integrations", "commands"} & set(sys.modules)


def test_versions_agree():
    import ndlora_plugins

    assert ndlora_plugins.__version__ == project()["project"]["version"] == metadata.version("ndlora-plugins")


def test_no_dependency_is_pinned():
    extras = project()["project"]["optional-dependencies"]
    for requirement in [
        *project()["project"]["dependencies"],
        *(r for extra in extras.values() for r in extra),
    ]:
        version, _, _marker = requirement.partition(";")
        assert "==" not in version and "<" not in version, requirement


def test_the_extras():
    assert {"trl", "axolotl", "demo", "dev"} <= set(project()["project"]["optional-dependencies"])


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """The names in a wheel that is built from the tree as it is."""
    pytest.importorskip("setuptools", minversion="77")
    import shutil

    source = tmp_path_factory.mktemp("source")
    for name in (*FOLDERS, "pyproject.toml", "README.md", "LICENSE", "ndlora_autoload.py"):
        path = ROOT / name
        shutil.copytree(path, source / name) if path.is_dir() else shutil.copy(path, source / name)
    target = tmp_path_factory.mktemp("wheel")
    subprocess.run(
        [
            sys.executable,
            "-m",
            "pip",
            "wheel",
            "-q",
            "--no-deps",
            "--no-build-isolation",
            "-w",
            target,
            source,
        ],
        check=True,
        capture_output=True,
    )
    return zipfile.ZipFile(next(target.glob("*.whl")))


def test_the_wheel_holds_every_module(wheel):
    names = set(wheel.namelist())
    for folder, package in FOLDERS.items():
        for path in (ROOT / folder).rglob("*.py"):
            assert f"{package.replace('.', '/')}/{path.relative_to(ROOT / folder)}" in names
    assert {"ndlora_autoload.py", "ndlora_plugins/py.typed"} <= names
    assert not [name for name in names if name.startswith(("integrations/", "commands/", "tests/"))]


def test_the_wheel_names_its_entry_points(wheel):
    text = wheel.read(next(n for n in wheel.namelist() if n.endswith("entry_points.txt"))).decode()
    assert "[torch.backends]\nndlora_plugins = ndlora_autoload:autoload" in text
    assert "ndlora = ndlora_plugins.commands.main:run" in text


def test_the_source_speaks_of_itself_only():
    unwanted = ["/work" + "/", "/root" + "/", "/opt/" + "pypi"]
    for path in ROOT.rglob("*"):
        hidden = any(part.startswith(".") and part != ".ci" for part in path.relative_to(ROOT).parts)
        if path.is_file() and not hidden and path.suffix in {".py", ".md", ".toml", ".yml", ".yaml", ""}:
            text = path.read_text(errors="ignore")
            assert not [word for word in unwanted if word in text], path
