"""Directories: those of the hub brought here, and new ones that are whole or not there."""

from __future__ import annotations

import logging
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil
from filelock import FileLock, Timeout
from huggingface_hub import snapshot_download

from ndlora_plugins.errors import NdLoraValueError

__all__ = ["check_new", "local_directory", "new_directory"]

logger = logging.getLogger("ndlora_plugins")


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


def check_new(output: str | Path, *, replace: bool = False) -> Path:
    """Raise unless a new directory can take the name `output`; an empty directory may be there.

    Args:
        replace: whether anything else may be there too.

    Returns:
        Its absolute path; where `output` is a link, that of what it leads to.

    Raises:
        NdLoraValueError: there is something at `output`, or it is a mount point.
    """
    output = Path(os.path.realpath(output))
    if not replace and output.exists() and not (output.is_dir() and not any(output.iterdir())):
        raise NdLoraValueError(
            f"{output} exists already, and nothing is overwritten: name a new directory, or remove it."
        )
    # all of them: os.path.ismount does not see a mount from the same file system
    if str(output) in {partition.mountpoint for partition in psutil.disk_partitions(all=True)}:
        raise NdLoraValueError(
            f"{output} is a mount point, which no new directory can take the place of: name a directory inside "
            f"it, as {output / 'exported'}."
        )
    return output


@contextmanager
def new_directory(output: str | Path, *, replace: Callable[[Path], bool] | None = None) -> Iterator[Path]:
    """A directory beside `output` to write into; it takes that name at the end, and goes after an error.

    What a process that was killed left there is removed. One that is still running keeps it: it holds a lock.

    Args:
        replace: whether a file of a directory at `output` goes, too, and is not only written over. What else lies there
            stays. None: there may be nothing.

    Raises:
        NdLoraValueError: there is something at `output`, it is a mount point, or another process writes it.
        OSError: it cannot be written; the error names a file or a directory.
    """
    output = check_new(output, replace=replace is not None)
    output.parent.mkdir(parents=True, exist_ok=True)
    scratch = output.with_name(f".{output.name}-unfinished")
    files, earlier = scratch / "files", scratch / "earlier"
    lock = _lock(scratch, output)
    try:
        _clear(files, earlier, output)
        files.mkdir()
        yield files
        if check_new(output, replace=replace is not None).exists():
            for path in output.iterdir():  # none without `replace`
                if replace is not None and not replace(path) and not (files / path.name).exists():
                    _link(path, files / path.name)
            output.rename(earlier)
        files.rename(output)
    except OSError as error:
        if error.errno is not None and error.filename is None:  # a write that failed does not say where
            error.filename = str(output)
        raise
    finally:
        _clear(files, earlier, output, quietly=True)
        # the lock's file last, and while it is held: whoever comes next starts anew
        Path(lock.lock_file).unlink(missing_ok=True)
        with suppress(OSError):
            scratch.rmdir()
        lock.release()


def _link(path: str | Path, to: str | Path) -> None:
    """The same file or directory under another name too, or a copy where the file system has no links."""
    if os.path.isdir(path):
        shutil.copytree(path, to, copy_function=_link)
        return
    try:
        os.link(path, to)
    except OSError:
        shutil.copy2(path, to)


def _lock(scratch: Path, output: Path) -> FileLock:
    """Make `scratch` and lock it; the lock goes with the process."""
    scratch.mkdir(mode=0o700, exist_ok=True)
    lock = FileLock(scratch / "lock")
    try:
        lock.acquire(timeout=0)
    except (Timeout, FileNotFoundError) as error:  # not found: it was just given up
        raise NdLoraValueError(
            f"Another process is writing {output} (in {scratch}): wait for it, or name another directory."
        ) from error
    return lock


def _clear(files: Path, earlier: Path, output: Path, *, quietly: bool = False) -> None:
    """Remove what is unfinished, and what was at `output` before, or put that back if nothing took its place."""
    if earlier.exists() and not output.exists():
        earlier.rename(output)
    for directory in (files, earlier):
        if directory.exists():
            size = sum(path.lstat().st_size for path in directory.rglob("*"))
            shutil.rmtree(directory, ignore_errors=True)
            if not quietly:
                logger.warning(
                    "Removed %s (%s bytes), left by a process that was killed.", directory, f"{size:,}"
                )
