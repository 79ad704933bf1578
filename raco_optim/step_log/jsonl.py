"""JSON lines that survive a killed process: the one reader and the one writer of the package."""

from __future__ import annotations

import contextlib
import io
import json
import math
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple, NoReturn


class Records(NamedTuple):
    """What a file holds, as far as it is whole."""

    entries: list[Any]
    size: int  # in bytes, without `torn`
    torn: bytes  # the beginning of a last line that was cut short
    ended: bool  # the last whole line has its newline


class BadLine(ValueError):
    """A line that is no JSON; `number` counts from 1."""

    def __init__(self, number: int, reason: str) -> None:
        super().__init__(reason)
        self.number = number


def name_of_nonfinite(value: float) -> str:
    """Returns "NaN", "Infinity" or "-Infinity"; `float` reads each of them back."""
    return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"


def plain(
    value: Any,  # noqa: ANN401  # anything that JSON can hold
    nonfinite: Callable[[float], str | None] = name_of_nonfinite,
) -> Any:  # noqa: ANN401
    """Returns a value as it comes back from JSON; `nonfinite` replaces NaN and infinities."""
    if isinstance(value, float) and not math.isfinite(value):
        return nonfinite(value)
    if isinstance(value, Mapping):
        return {str(name): plain(entry, nonfinite) for name, entry in value.items()}
    if isinstance(value, list | tuple):
        return [plain(entry, nonfinite) for entry in value]
    return value


def read(path: Path) -> Records:
    """Reads all whole lines; a last line without its newline may be whole or torn."""
    entries: list[Any] = []
    size, ended = 0, True
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            ended = line.endswith(b"\n")
            try:
                entries.append(json.loads(line, parse_constant=_refuse))
            except (ValueError, FloatingPointError) as error:
                if ended or isinstance(error, FloatingPointError):
                    raise BadLine(number, str(error)) from error
                # An object that was cut short is no JSON, wherever the cut is.
                return Records(entries, size, line, True)
            size += len(line)
    return Records(entries, size, b"", ended)


def may_begin(torn: bytes, head: bytes) -> bool:
    """Whether a torn line may be what is left of one that began with `head`."""
    return torn.startswith(head) or head.startswith(torn)


class Appender:
    """Appends records to a file, each whole or not at all.

    A failed write is taken back. A process that is killed while it writes leaves the beginning of
    a last line, which `read` sets apart and `cut` removes.
    """

    def __init__(self, path: Path, *, new: bool = False) -> None:
        self._path = path
        self._file = io.FileIO(path, "x" if new else "a")
        self._size = os.fstat(self._file.fileno()).st_size

    def cut(self, found: Records) -> None:
        """Removes a torn line, or gives a whole last line its newline."""
        self._size = found.size
        with self._taken_back_on_error():
            self._truncate()
            if not found.ended:
                self._write(b"\n")

    def append(self, record: Mapping[str, Any]) -> None:
        """Writes one line."""
        if os.fstat(self._file.fileno()).st_size != self._size:
            raise OSError(
                f"`path` must be written by one process at a time; got {str(self._path)!r}, which "
                f"another one has changed. Give each run a file of its own."
            )
        line = json.dumps(record, allow_nan=False).encode() + b"\n"  # see `plain`
        with self._taken_back_on_error():
            self._write(line)

    def sync(self) -> None:
        """Waits until all is on the disk, so that not even a power failure loses it."""
        os.fsync(self._file.fileno())

    def close(self) -> None:
        """Closes the file."""
        self._file.close()

    def __enter__(self) -> Appender:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @contextlib.contextmanager
    def _taken_back_on_error(self) -> Iterator[None]:
        try:
            yield
        except BaseException as error:
            # A part of a line would spoil those that come after it.
            with contextlib.suppress(OSError):
                self._truncate()
            if isinstance(error, OSError):
                raise not_writable(self._path, error) from error
            raise

    def _write(self, data: bytes) -> None:
        left = memoryview(data)
        while left:
            left = left[self._file.write(left) :]
        self._size += len(data)

    def _truncate(self) -> None:
        self._file.truncate(self._size)
        self._file.seek(self._size)


def not_writable(path: Path, error: OSError) -> OSError:
    """Returns the error that says so in words."""
    return OSError(
        f"`path` must be a file that can be written; got {str(path)!r} ({error.strerror}). Make "
        f"room, or choose another."
    )


def _refuse(constant: str) -> NoReturn:
    raise FloatingPointError(f"{constant} is no JSON; a number must be finite")
