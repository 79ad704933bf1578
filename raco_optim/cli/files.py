"""Files that outlive a killed process: whole or not at all, and written by one at a time."""

from __future__ import annotations

import contextlib
import hashlib
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

from raco_optim.cli.errors import UsageError


def write_atomically(path: Path, text: str) -> None:
    """Writes a text file: whoever reads `path` finds the old text or the new one, never a part.

    Args:
        path: The file to make or to replace.
        text: Its new content.

    Raises:
        UsageError: The folder of `path` cannot be written to.

    Example:
        >>> import pathlib, tempfile
        >>> from raco_optim.cli.files import write_atomically
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     write_atomically(pathlib.Path(folder, "a.txt"), "whole")
        ...     pathlib.Path(folder, "a.txt").read_text()
        'whole'
    """
    path = path.resolve()  # the file, not a link to it, is replaced
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
        raise UsageError(f"{path} cannot be written ({error.strerror}).") from error


def check_writable(path: Path, option: str) -> None:
    """Raises `UsageError` unless a file can be written at `path`; makes the folders above it.

    Args:
        path: The file to be written later.
        option: The option that named it, for the message.

    Raises:
        UsageError: It is a folder or a device, or its folder cannot be made or written to.

    Example:
        >>> import pathlib
        >>> from raco_optim.cli.files import check_writable
        >>> check_writable(pathlib.Path("/"), "--output")
        Traceback (most recent call last):
        raco_optim.cli.errors.UsageError: `--output` must be a file to write to; got /, which \
is no file.
    """
    try:
        if path.exists() and not path.is_file():
            raise UsageError(
                f"`{option}` must be a file to write to; got {path}, which is no file."
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
    """Makes a folder that files can be written to, and the folders above it.

    Args:
        folder: The folder; it may be there already.
        option: The option that named it, for the message.

    Raises:
        UsageError: It cannot be made or written to.

    Example:
        >>> import pathlib, tempfile
        >>> from raco_optim.cli.files import make_folder
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     make_folder(pathlib.Path(folder, "a", "b"), "--output_dir")
        ...     pathlib.Path(folder, "a", "b").is_dir()
        True
    """
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

    The operating system releases the lock when the process ends, however it ends. The lock file is
    removed then, except after a kill.

    Args:
        path: A file or folder, which need not exist; the folder that it stands in must.
        option: The option that named it, for the message.

    Raises:
        UsageError: Another process holds it.

    Example:
        >>> import pathlib, tempfile
        >>> from raco_optim.cli.files import held
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     with held(pathlib.Path(folder, "results.jsonl"), "--output"):
        ...         print("nobody else writes")
        nobody else writes
    """
    from filelock import FileLock, Timeout  # torch brings it

    path = path.resolve()
    lock = FileLock(path.with_name(f".{path.name}.lock"))
    try:
        lock.acquire(timeout=0)
    except Timeout as error:
        raise UsageError(
            f"`{option}` must be written by one process at a time; got {path}, which another one "
            f"holds. Wait for it, or choose another."
        ) from error
    except OSError as error:
        raise UsageError(f"`{option}` must be writable; got {path} ({error.strerror}).") from error
    try:
        yield
    finally:
        with contextlib.suppress(OSError):  # who waits for a file without a name opens the next one
            os.unlink(lock.lock_file)
        lock.release()


def sha256(path: Path) -> str:
    """Returns the SHA-256 of a file's bytes in hexadecimal.

    Args:
        path: The file.

    Returns:
        64 hexadecimal digits.

    Raises:
        OSError: It cannot be read.

    Example:
        >>> import os, pathlib
        >>> from raco_optim.cli.files import sha256
        >>> sha256(pathlib.Path(os.devnull))[:8]
        'e3b0c442'
    """
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
