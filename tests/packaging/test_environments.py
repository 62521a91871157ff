"""The locks of environments/ are complete and exact, and this environment holds what its lock says."""

import importlib.util
import pathlib
import re
import sys
from importlib import metadata

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = pathlib.Path(__file__).resolve().parents[2]
FOLDER = ROOT / "environments"
# what was chosen in each
LOCKS = {
    "demo": ["torch"],
    "newest": ["torch"],
    "axolotl": ["torch", "axolotl"],
    "swift": ["torch"],
    "vllm": ["torch"],
    "llamacpp": [],
    "docs": [],
}
LINE = re.compile(r"[a-z0-9][a-z0-9._-]*==[0-9][0-9a-z.]*")  # no address, no marker, no local tag
OF_TORCHS_OWN_BUILD = re.compile(r"(nvidia|cuda)-(?!ml-py)")  # which a machine's own torch asks for, or not

MOVED = [  # locked, installed, what is told
    ({"a": "1"}, {"a": "1"}, []),
    ({"a": "1", "b": "2"}, {"a": "1.1", "b": "2"}, ["a 1 -> 1.1"]),
    ({"a": "1"}, {"a": "1", "c": "3"}, ["c (none) -> 3"]),
    ({"a": "1", "b": "2"}, {"b": "2"}, ["a 1 -> (none)"]),
]


def load():
    spec = importlib.util.spec_from_file_location("moved", FOLDER / "moved.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("name", LOCKS)
def test_a_lock_is_plain_names_and_exact_versions(name):
    lines = (FOLDER / f"{name}.txt").read_text().splitlines()
    assert [line for line in lines if not LINE.fullmatch(line) or OF_TORCHS_OWN_BUILD.match(line)] == []


@pytest.mark.parametrize(("name", "chosen"), LOCKS.items())
def test_a_lock_has_what_was_chosen(name, chosen):
    lock, choices = (load().locked(FOLDER / file) for file in (f"{name}.txt", "chosen.txt"))
    assert {package: lock[package] for package in chosen} == {package: choices[package] for package in chosen}


@pytest.mark.parametrize(("before", "after", "told"), MOVED)
def test_what_moved(before, after, told):
    assert load().moved(before, after) == told


@pytest.fixture
def lock():
    """The lock of the environment that runs this, if it is one of ours."""
    name = pathlib.Path(sys.prefix).name
    if pathlib.Path(sys.prefix).parent != ROOT / ".envs" or name not in LOCKS:
        pytest.skip(f"{sys.prefix} was not made from a lock")
    return FOLDER / f"{name}.txt"


def test_this_environment_is_its_lock(lock):
    module = load()
    assert module.moved(module.locked(lock), module.installed()) == []


def needed(requirements):
    """Names of what the requirements ask for, and all that they ask for in turn, as what is installed says."""
    names, seen, todo = set(), set(), [*requirements]
    while todo:
        requirement = todo.pop()
        name = canonicalize_name(requirement.name)
        names.add(name)
        for extra in {"", *requirement.extras}:
            if (name, extra) not in seen:
                seen.add((name, extra))
                asked = asked_by(name)
                todo += [one for one in asked if not one.marker or one.marker.evaluate({"extra": extra})]
    return names


def asked_by(name):
    try:
        return [Requirement(line) for line in metadata.requires(name) or []]
    except metadata.PackageNotFoundError:
        return []


def test_a_lock_has_what_its_extras_need_and_no_more(lock):
    """`pip check` does not look at extras, such as the one of `fsspec[http]`."""
    extras = re.search(rf"^{lock.stem}_EXTRAS = (.*)$", (ROOT / "Makefile").read_text(), re.MULTILINE)
    ours = Requirement(f"ndlora-plugins[{','.join(extras[1].split()[1::2])}]")
    names = {n for n in needed([ours, Requirement("setuptools")]) if not OF_TORCHS_OWN_BUILD.match(n)}
    assert names - load()._BESIDE_THE_LOCK == set(load().locked(lock))


def test_locked_versions_do_not_forbid_each_other(lock, request):
    try:
        request.getfixturevalue("transformers_adapters")
    except pytest.skip.Exception as skipped:
        pytest.fail(f"{lock.name} holds versions whose tests are skipped: {skipped}")
