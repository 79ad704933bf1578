"""Records of runs in a JSONL file: written whole or dropped, and checked when they are read."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Callable, Mapping
from numbers import Real
from pathlib import Path
from typing import Any, NoReturn

from raco_optim.cli.errors import UsageError
from raco_optim.step_log import jsonl

# Every record starts like this: how a line that was cut short is told from another file's content.
_HEAD = b'{"point": '
_PARTS = ("point", "settings", "evaluation", "training")
_COORDINATES = {"method", "weights", "seed", "c"}


def _refuse(where: str, value: object) -> NoReturn:
    raise ValueError(
        f"`{where}` must be what JSON can hold (mappings, lists, strings, numbers, None); got "
        f"{type(value).__name__}."
    )


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
    return _checked(path, _read(path).entries)


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


def _read(path: Path) -> jsonl.Records:
    try:
        found = jsonl.read(path)
    except OSError as error:
        raise UsageError(f"{path} cannot be read ({error.strerror}).") from error
    except jsonl.BadLine as error:
        raise UsageError(f"{path}, line {error.number}, is not JSON ({error}).") from error
    except RecursionError as error:
        raise UsageError(f"{path} has a line that is nested too deeply.") from error
    if not jsonl.may_begin(found.torn, _HEAD):
        number = len(found.entries) + 1
        raise UsageError(f"{path}, line {number}, is not JSON, and no record that was cut short.")
    return found


def _checked(path: Path, entries: list[Any]) -> list[dict[str, Any]]:
    seen: dict[str, int] = {}
    for number, record in enumerate(entries, start=1):
        if not _is_record(record):
            raise UsageError(
                f"{path}, line {number}, is no record of a run: one has {', '.join(_PARTS)}, as "
                f"`raco-optim sweep` writes them."
            )
        key = point_key(record["point"])
        if key in seen:
            raise UsageError(
                f"{path}, line {number}, repeats the point of line {seen[key]}. Remove one of them."
            )
        seen[key] = number
    return entries


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
    found = _read(path)
    if found.torn or not found.ended:
        with jsonl.Appender(path) as file:
            file.cut(found)
    if found.torn:
        sys.stderr.write(f"{path}: dropped the end of a record that was cut short.\n")


def append(path: Path, record: Mapping[str, Any]) -> None:
    r"""Appends a record and waits until it is on the disk.

    Args:
        path: The file; it is made if there is none.
        record: What JSON can hold; see `plain`.

    Raises:
        OSError: The file cannot be written. It is as it was.
        ValueError: A number is NaN or infinite, for which JSON has none.

    Example:
        >>> import pathlib, tempfile
        >>> from raco_optim.cli.records import append
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     append(pathlib.Path(folder, "results.jsonl"), {"point": {}})
        ...     pathlib.Path(folder, "results.jsonl").read_text()
        '{"point": {}}\n'
    """
    with jsonl.Appender(path) as file:
        file.append(record)
        file.sync()


def plain(value: Any, where: str = "value", *, unknown: Callable[[str, Any], Any] = _refuse) -> Any:  # noqa: ANN401
    """Returns a value as it comes back from JSON, with null for what JSON has no number for.

    Args:
        value: Mappings, sequences, strings, numbers and None; NumPy's and torch's among them.
        where: Name of the value, for messages.
        unknown: Gets the name and the value of what JSON can't hold, and returns what to keep.

    Raises:
        ValueError: JSON can't hold it; unless `unknown` does something else.

    Example:
        >>> import torch
        >>> from raco_optim.cli.records import plain
        >>> plain({"range": (0.0, float("inf")), "loss": torch.tensor(0.5)})
        {'range': [0.0, None], 'loss': 0.5}
    """
    if hasattr(value, "tolist"):  # arrays and tensors, and scalars of NumPy
        value = value.tolist()
    if value is None or isinstance(value, bool | int | str):
        return value
    if isinstance(value, Real):
        return float(value) if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {
            str(key): plain(entry, f"{where}[{key!r}]", unknown=unknown)
            for key, entry in value.items()
        }
    if isinstance(value, list | tuple):
        return [plain(entry, f"{where}[{i}]", unknown=unknown) for i, entry in enumerate(value)]
    return unknown(where, value)


def is_number(value: object) -> bool:
    """Returns whether a value from JSON is a finite number.

    Args:
        value: The value.

    Example:
        >>> from raco_optim.cli.records import is_number
        >>> is_number(0.5), is_number(True), is_number(10**400)
        (True, False, False)
    """
    most = sys.float_info.max
    return isinstance(value, int | float) and not isinstance(value, bool) and -most <= value <= most


def _is_record(value: object) -> bool:
    if not isinstance(value, dict) or not all(isinstance(value.get(p), dict) for p in _PARTS):
        return False
    point = value["point"]
    return (
        point.keys() == _COORDINATES
        and isinstance(point["method"], str)
        and isinstance(point["seed"], int)
        and (point["c"] is None or is_number(point["c"]))
        and isinstance(point["weights"], dict)
        and len(point["weights"]) > 0
        and all(map(is_number, point["weights"].values()))
        and all(isinstance(scores, dict) for scores in value["evaluation"].values())
        and all(isinstance(value.get(part, {}), dict) for part in ("extra", "environment"))
    )
