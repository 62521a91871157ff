"""Five methods as a stranger would bring them, each a file beside this one, held to the laws of every method."""

import importlib.util
import pathlib

import pytest

from ndlora_plugins import register_plugin, unregister_plugin
from ndlora_plugins.testing import check_method

FILES = sorted(
    path for path in pathlib.Path(__file__).parent.glob("*.py") if not path.name.startswith("test_")
)


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_holds_to_the_laws(path):
    spec = importlib.util.spec_from_file_location(f"strangers_{path.stem}", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    register_plugin(module, name=path.stem)
    try:
        check_method(module.method.name, gradient=path.stem == "lora_sb")
    finally:
        unregister_plugin(module)


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_is_short(path):
    assert len(path.read_text().splitlines()) <= 80
