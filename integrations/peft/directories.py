"""Directories: those of the hub brought here, and new ones that are whole or not there."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from huggingface_hub import snapshot_download

from ndlora_plugins.errors import NdLoraValueError

__all__ = ["check_new", "local_directory", "new_directory"]


def local_directory(name: str, must_hold: str, *, revision: str | None = None, download: bool = True) -> Path:
    """The directory `name`, or that of a repository of the hub.

    Args:
        must_hold: a file without which it is not what is looked for.
        download: whether a repository that is not on this machine is fetched.

    Raises:
        NdLoraValueError: there is none.
    """
    directory = Path(name)
    if not directory.is_dir():
        try:
            directory = Path(snapshot_download(name, revision=revision, local_files_only=not download))
        except (OSError, ValueError) as error:  # huggingface_hub's errors are one or the other
            where = (
                "a repository of the hub that can be reached" if download else "in the local cache of the hub"
            )
            raise NdLoraValueError(
                f"{name!r} is neither a directory nor {where}: {str(error).splitlines()[0]}"
            ) from error
    if not (directory / must_hold).is_file():
        raise NdLoraValueError(f"{name} has no {must_hold}: name the directory that holds it.")
    return directory


def check_new(output: str | Path) -> Path:
    """Raise if there is something at `output`; an empty directory may be.

    Raises:
        NdLoraValueError: nothing is ever overwritten.
    """
    output = Path(output).absolute()
    if output.exists() and not (output.is_dir() and not any(output.iterdir())):
        raise NdLoraValueError(
            f"{output} exists already, and nothing is overwritten: name a new directory, or remove it."
        )
    return output


@contextmanager
def new_directory(output: str | Path) -> Iterator[Path]:
    """A directory beside `output` to write into; it takes that name at the end, and goes after an error.

    Raises:
        NdLoraValueError: there is something at `output`.
    """
    output = check_new(output)
    output.parent.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(dir=output.parent, prefix=f".{output.name}-"))
    try:
        yield scratch
        mask = os.umask(0)
        os.umask(mask)
        scratch.chmod(0o777 & ~mask)  # mkdtemp lets nobody else in
        if check_new(output).is_dir():
            output.rmdir()
        scratch.rename(output)
    except BaseException:
        shutil.rmtree(scratch, ignore_errors=True)
        raise
