"""The plugin of examples/plugin is what docs/write_a_method.md shows, installs, and is found without an import."""

import os
import pathlib
import re
import shutil
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).resolve().parents[2]
PLUGIN = ROOT / "examples" / "plugin"
PAGE = ROOT / "docs" / "write_a_method.md"
# what the page shows -> the block's language
SHOWN = {"ndlora_cosine.py": "python", "pyproject.toml": "toml", "test_ndlora_cosine.py": "python"}


@pytest.mark.parametrize(("name", "language"), SHOWN.items())
def test_the_page_shows_the_files(name, language):
    assert f"```{language}\n{(PLUGIN / name).read_text()}```" in PAGE.read_text()


def test_the_page_has_no_other_code():
    assert len(re.findall(r"^```(?:python|toml)$", PAGE.read_text(), re.MULTILINE)) == len(SHOWN)


@pytest.mark.slow
def test_it_installs_and_passes_its_own_tests(tmp_path):
    source, target = tmp_path / "source", tmp_path / "installed"
    shutil.copytree(PLUGIN, source, ignore=shutil.ignore_patterns("__pycache__", "build", "*.egg-info"))
    pip = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--no-build-isolation", "--target"]
    subprocess.run([*pip, target, source], check=True, capture_output=True)
    command = [sys.executable, "-P", "-m", "pytest", "-q", "-p", "no:cacheprovider", "test_ndlora_cosine.py"]
    tests = subprocess.run(
        command,
        cwd=source,
        env={**os.environ, "PYTHONPATH": str(target)},
        capture_output=True,
        text=True,
    )
    assert tests.returncode == 0, tests.stdout
