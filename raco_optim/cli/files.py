"""Files that survive a kill: complete or absent, and written by one process at a time."""

from __future__ import annotations

import contextlib
import hashlib
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

from raco_optim.cli.errors import UsageError


def write_atomically(path: Path, text: str) -> None:
    """Writes a text file; readers see the old text or the new one, never a part."""
    path = path.resolve()  # to replace the file, not a link to it
    temporary = path.with_name(f".{path.name}.part")
    try:
        with open(temporary, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise UsageError(f"{path} can't be written ({error.strerror}).") from error


def check_writable(path: Path, option: str) -> None:
    """Raises `UsageError` unless a file can be written at `path`; creates its folder."""
    try:
        if path.exists() and not path.is_file():
            raise UsageError(
                f"`{option}` must be a file to write to; got {path}, which is not a file."
            )
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.exists():
            path.open("ab").close()
        else:
            tempfile.TemporaryFile(dir=path.parent).close()
    except (OSError, ValueError) as error:
        if isinstance(error, UsageError):
            raise
        reason = getattr(error, "strerror", None) or error
        raise UsageError(
            f"`{option}` must be a file to write to; got {path} ({reason})."
        ) from error


def make_folder(folder: Path, option: str) -> None:
    """Creates a folder and those above it; raises `UsageError` unless it is writable."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        raise UsageError(
            f"`{option}` must be a folder to write to; got {folder} ({error.strerror})."
        ) from error


@contextlib.contextmanager
def held(path: Path, option: str) -> Iterator[None]:
    """Keeps other processes from writing to `path`, by a lock on ``.<name>.lock`` beside it.

    The operating system releases the lock when the process ends. The lock file is removed too,
    except after a kill.
    """
    from filelock import FileLock, Timeout  # torch brings it

    path = path.resolve()
    lock = FileLock(path.with_name(f".{path.name}.lock"))
    try:
        lock.acquire(timeout=0)
    except Timeout as error:
        raise UsageError(
            f"`{option}` must be written by one process at a time; got {path}, which another "
            f"process is writing. Wait for it to end, or choose another path."
        ) from error
    except OSError as error:
        raise UsageError(f"`{option}` must be writable; got {path} ({error.strerror}).") from error
    try:
        yield
    finally:
        with contextlib.suppress(OSError):
            os.unlink(lock.lock_file)
        lock.release()


def sha256(path: Path) -> str:
    """Returns the SHA-256 of a file's bytes in hexadecimal."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
