"""The two distributions hold what the tree holds, under the names that the contract gives."""

import os
import pathlib
import re
import shutil
import subprocess
import sys
import tarfile
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
# what is built into the sdist beside them
FILES = [
    "pyproject.toml",
    "MANIFEST.in",
    "README.md",
    "CHANGELOG.md",
    "CITATION.cff",
    "CONTRIBUTING.md",
    "SECURITY.md",
    "LICENSE",
    "ndlora_autoload.py",
]
# a distribution of its own, with a pyproject.toml of its own
DEMO = ROOT / "demo"
# the starts of lines of the wheel's metadata
METADATA = [
    "Author: the ndlora-plugins authors",
    "License-Expression: Apache-2.0",
    "Project-URL: Homepage, https://",
    "Project-URL: Documentation, https://",
    "Project-URL: Issues, https://",
    "Project-URL: Changelog, https://",
    "Description-Content-Type: text/markdown",
]
# the package index shows it as the long description
SHOWN_ELSEWHERE = ["README.md"]


def project(folder=ROOT):
    return tomllib.loads((folder / "pyproject.toml").read_text())


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


def test_the_demo_is_of_this_version():
    version, demo = project()["project"]["version"], project(DEMO)["project"]
    assert version == demo["version"] == metadata.version("ndlora-plugins-demo")
    assert f"ndlora-plugins=={version}" in demo["dependencies"]


def test_the_changelog_and_the_citation_are_of_this_version():
    version = project()["project"]["version"]
    dated = re.search(
        rf"^## {re.escape(version)} \((.*)\)$", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE
    )
    citation = (ROOT / "CITATION.cff").read_text()
    assert f"\nversion: {version}\n" in citation and f'\ndate-released: "{dated[1]}"\n' in citation


@pytest.mark.parametrize("page", SHOWN_ELSEWHERE)
def test_links_work_where_the_page_is_shown_alone(page):
    targets = re.findall(r"\]\(([^)\s]+)|<img[^>]* src=\"([^\"]+)", (ROOT / page).read_text())
    links = ["".join(target) for target in targets]
    assert [link for link in links if not link.startswith(("https://", "#"))] == []


def test_no_dependency_is_pinned():
    extras = project()["project"]["optional-dependencies"]
    for requirement in [
        *project()["project"]["dependencies"],
        *(r for extra in extras.values() for r in extra),
        *(r for r in project(DEMO)["project"]["dependencies"] if not r.startswith("ndlora-plugins")),
    ]:
        version, _, _marker = requirement.partition(";")
        assert "==" not in version and "<" not in version, requirement


def test_the_extras():
    assert {"trl", "axolotl", "demo", "dev"} <= set(project()["project"]["optional-dependencies"])


@pytest.fixture(scope="module")
def distribution(tmp_path_factory):
    """The folder of an sdist of the tree as it is, and of the wheel that is built from that sdist."""
    pytest.importorskip("build")
    source, target = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("dist")
    for name in FOLDERS:
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in FILES:
        shutil.copy(ROOT / name, source / name)
    build(source, target)
    return target


def build(source, target):
    command = [sys.executable, "-P", "-m", "build", "--no-isolation", "--outdir", target, source]
    subprocess.run(command, check=True, capture_output=True)


@pytest.fixture(scope="module")
def demo_distribution(tmp_path_factory):
    """As `distribution`, of the demo."""
    pytest.importorskip("build")
    source, target = tmp_path_factory.mktemp("source") / "demo", tmp_path_factory.mktemp("dist")
    shutil.copytree(DEMO, source, ignore=shutil.ignore_patterns("__pycache__", "build", "*.egg-info"))
    build(source, target)
    return target


@pytest.fixture(scope="module")
def wheel(distribution):
    return zipfile.ZipFile(next(distribution.glob("*.whl")))


def test_the_index_would_take_them(distribution, demo_distribution):
    check = pytest.importorskip("twine.commands.check")
    files = [*distribution.iterdir(), *demo_distribution.iterdir()]
    assert len(files) == 4 and not check.check([str(path) for path in files], strict=True)


def test_the_sdist_holds_what_a_reader_looks_for(distribution):
    with tarfile.open(next(distribution.glob("*.tar.gz"))) as sdist:
        names = {name.partition("/")[2] for name in sdist.getnames()}
    assert set(FILES) <= names and not [name for name in names if name.startswith(("tests", "demo"))]


def test_the_wheel_says_where_it_is_from(wheel):
    text = wheel.read(next(n for n in wheel.namelist() if n.endswith("METADATA"))).decode()
    assert [f for f in METADATA if f"\n{f}" not in text] == []


def test_the_wheel_holds_every_module(wheel):
    names = set(wheel.namelist())
    for folder, package in FOLDERS.items():
        for path in (ROOT / folder).rglob("*.py"):
            assert f"{package.replace('.', '/')}/{path.relative_to(ROOT / folder)}" in names
    assert {"ndlora_autoload.py", "ndlora_plugins/py.typed"} <= names
    tops = {name.partition("/")[0] for name in names}
    assert tops == {
        "ndlora_autoload.py",
        "ndlora_plugins",
        f"ndlora_plugins-{project()['project']['version']}.dist-info",
    }


def test_the_demos_wheel_holds_every_module_and_the_command(demo_distribution):
    wheel = zipfile.ZipFile(next(demo_distribution.glob("*.whl")))
    names = {name for name in wheel.namelist() if ".dist-info/" not in name}
    assert names == {str(path.relative_to(DEMO)) for path in (DEMO / "ndlora_demo").rglob("*.py")}
    text = wheel.read(next(n for n in wheel.namelist() if n.endswith("entry_points.txt"))).decode()
    assert "[ndlora_plugins.commands]\ndemo = ndlora_demo.command:demo" in text


@pytest.mark.parametrize("arguments", [["--steps", "1"], ["--help"]])
def test_without_its_package_the_demo_says_what_to_install(arguments, wheel, tmp_path):
    """Our wheel alone, beside what this environment holds of others."""
    others = pathlib.Path(pytest.importorskip("typer").__file__).parents[1]
    for path in others.iterdir():
        if "ndlora" not in path.name:
            (tmp_path / path.name).symlink_to(path)
    code = "from ndlora_plugins.commands.main import run; run()"
    result = subprocess.run(
        [sys.executable, "-S", "-P", "-c", code, "demo", *arguments],
        env={**os.environ, "PYTHONPATH": os.pathsep.join([wheel.filename, str(tmp_path)])},
        capture_output=True,
        text=True,
    )
    said = 'Error: `ndlora demo` is a package of its own: run `pip install "ndlora-plugins[demo]"`.\n'
    assert (result.returncode, result.stderr) == (2, said)


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
