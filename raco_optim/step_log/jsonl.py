"""Reads and writes JSON lines that survive a kill, for the whole package."""

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
    """The complete lines of a file."""

    entries: list[Any]
    size: int  # in bytes, without `torn`
    torn: bytes  # an incomplete last line
    ended: bool  # whether the last complete line has its newline


class BadLine(ValueError):
    """A line that is not JSON; `number` counts from 1."""

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
    """Returns a value as JSON returns it; `nonfinite` replaces NaN and infinities."""
    if isinstance(value, float) and not math.isfinite(value):
        return nonfinite(value)
    if isinstance(value, Mapping):
        return {str(name): plain(entry, nonfinite) for name, entry in value.items()}
    if isinstance(value, list | tuple):
        return [plain(entry, nonfinite) for entry in value]
    return value


def read(path: Path) -> Records:
    """Reads all complete lines; a last line without a newline may be complete or torn."""
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
                # An incomplete object is never valid JSON.
                return Records(entries, size, line, True)
            size += len(line)
    return Records(entries, size, b"", ended)


def may_begin(torn: bytes, head: bytes) -> bool:
    """Returns whether a torn line may come from a line that began with `head`."""
    return torn.startswith(head) or head.startswith(torn)


class Appender:
    """Appends records to a file, each completely or not at all, except after a kill."""

    def __init__(self, path: Path, *, new: bool = False) -> None:
        self._path = path
        self._file = io.FileIO(path, "x" if new else "a")
        self._size = os.fstat(self._file.fileno()).st_size

    def cut(self, found: Records) -> None:
        """Removes a torn last line, or ends a complete one."""
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
                f"another process has changed. Use a separate file for each run."
            )
        line = json.dumps(record, allow_nan=False).encode() + b"\n"  # see `plain`
        with self._taken_back_on_error():
            self._write(line)

    def sync(self) -> None:
        """Waits until everything is on the disk, safe even from a power failure."""
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
            # An incomplete line would corrupt the next one.
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
    """Returns an error that says why `path` can't be written."""
    return OSError(
        f"`path` must be a writable file; got {str(path)!r} ({error.strerror}). Free disk space, "
        f"or choose another path."
    )


def _refuse(constant: str) -> NoReturn:
    raise FloatingPointError(f"{constant} is not JSON; a number must be finite")
