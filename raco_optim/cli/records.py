"""Records of runs in a JSONL file: written whole or dropped, and checked when they are read."""

from __future__ import annotations

import json
import math
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from raco_optim.cli.errors import UsageError

# Every record starts like this: how a line that was cut short is told from another file's content.
_HEAD = b'{"point": '
_PARTS = ("point", "settings", "evaluation", "training")
_COORDINATES = {"method", "weights", "seed", "c"}


def read_records(path: Path) -> list[dict[str, Any]]:
    """Reads the records of a grid; the end of one that is being written is left out.

    Args:
        path: A file that `run_grid` wrote or is writing.

    Returns:
        The records, in the order of the file.

    Raises:
        UsageError: The file cannot be read, a line of it is no record, or a point occurs twice.

    Example:
        >>> import os, pathlib
        >>> from raco_optim.cli.records import read_records
        >>> read_records(pathlib.Path(os.devnull))
        []
    """
    try:
        return _parse(path, path.read_bytes())
    except OSError as error:
        raise UsageError(f"{path} cannot be read ({error.strerror}).") from error


def point_key(point: Mapping[str, Any]) -> str:
    """Returns what tells a point from others; the order of the objectives does not count.

    Args:
        point: The fields of a `Point`, as a record has them.

    Example:
        >>> from raco_optim.cli.records import point_key
        >>> point_key({"weights": {"b": 0.5, "a": 0.5}})
        '{"weights": {"a": 0.5, "b": 0.5}}'
    """
    return json.dumps(plain(point), sort_keys=True)


def _parse(path: Path, data: bytes) -> list[dict[str, Any]]:
    lines = data.split(b"\n")
    tail = lines.pop()  # what stands behind the last newline: nothing, or what a kill left
    if tail and not _is_torn(tail):
        lines.append(tail)
    records: list[dict[str, Any]] = []
    seen: dict[str, int] = {}
    for number, line in enumerate(lines, start=1):
        try:
            record = json.loads(line)
        except ValueError as error:
            raise UsageError(f"{path}, line {number}, is not JSON ({error}).") from error
        if not _is_record(record):
            raise UsageError(
                f"{path}, line {number}, is no record of a run: one has {', '.join(_PARTS)}."
            )
        key = point_key(record["point"])
        if key in seen:
            raise UsageError(
                f"{path}, line {number}, repeats the point of line {seen[key]}. Remove one of them."
            )
        seen[key] = number
        records.append(record)
    return records


def end_last_line(path: Path) -> None:
    """Drops what a kill left of a line, or ends a line that is whole.

    Args:
        path: A file that `read_records` reads; nothing happens if there is none.

    Example:
        >>> import pathlib, tempfile
        >>> from raco_optim.cli.records import end_last_line
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     path = pathlib.Path(folder, "results.jsonl")
        ...     _ = path.write_text('{"point": {"meth')
        ...     end_last_line(path)
        ...     path.read_text()
        ''
    """
    if not path.exists():
        return
    data = path.read_bytes()
    tail = data[data.rfind(b"\n") + 1 :]
    if tail and _is_torn(tail):
        sys.stderr.write(f"{path}: dropped the end of a record that was cut short.\n")
        os.truncate(path, len(data) - len(tail))
    elif tail:
        with path.open("ab") as file:
            file.write(b"\n")


def _is_torn(tail: bytes) -> bool:
    # An object that is cut short is no JSON, wherever the cut is.
    if not (tail.startswith(_HEAD) or _HEAD.startswith(tail)):
        return False
    try:
        json.loads(tail)
    except ValueError:
        return True
    return False


def append(path: Path, record: Mapping[str, Any]) -> None:
    r"""Appends a record and waits until it is on the disk.

    Args:
        path: The file; it is made if there is none.
        record: What JSON can hold; see `plain`.

    Raises:
        OSError: The file cannot be written.

    Example:
        >>> import pathlib, tempfile
        >>> from raco_optim.cli.records import append
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     append(pathlib.Path(folder, "results.jsonl"), {"point": {}})
        ...     pathlib.Path(folder, "results.jsonl").read_text()
        '{"point": {}}\n'
    """
    line = json.dumps(record, allow_nan=False) + "\n"
    with path.open("ab") as file:
        file.write(line.encode())
        file.flush()
        os.fsync(file.fileno())


def plain(value: Any) -> Any:  # noqa: ANN401  # anything that JSON can hold
    """Returns a value as it comes back from JSON, with null for what JSON has no number for.

    Args:
        value: Mappings, sequences, strings, numbers and None.

    Example:
        >>> from raco_optim.cli.records import plain
        >>> plain({"range": (0.0, float("inf"))})
        {'range': [0.0, None]}
    """
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, Mapping):
        return {str(name): plain(entry) for name, entry in value.items()}
    if isinstance(value, list | tuple):
        return [plain(entry) for entry in value]
    return value


def _is_record(value: object) -> bool:
    return (
        isinstance(value, dict)
        and all(isinstance(value.get(part), dict) for part in _PARTS)
        and value["point"].keys() == _COORDINATES
        and isinstance(value["point"]["weights"], dict)
    )
