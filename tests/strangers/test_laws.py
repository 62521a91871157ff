"""Five methods as a stranger would bring them, each a file beside this one, held to the laws of every method."""

import pathlib

import pytest

from ndlora_plugins.testing import check_method

FILES = sorted(
    path for path in pathlib.Path(__file__).parent.glob("*.py") if not path.name.startswith("test_")
)


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_holds_to_the_laws(path, stranger):
    check_method(stranger(path.stem).method.name, gradient=path.stem == "lora_sb")


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_is_short(path):
    assert len(path.read_text().splitlines()) <= 80
