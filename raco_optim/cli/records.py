"""Records of runs in a JSONL file: written completely or dropped, and checked when read."""

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

# Every record starts like this; it tells an incomplete record from the content of another file.
_HEAD = b'{"point": '
_PARTS = ("point", "settings", "evaluation", "training")
_COORDINATES = {"method", "weights", "seed", "c"}


def _refuse(where: str, value: object) -> NoReturn:
    raise ValueError(
        f"`{where}` must be a JSON value (mapping, list, string, number, None); got "
        f"{type(value).__name__}."
    )


def read_records(path: Path) -> list[dict[str, Any]]:
    """Reads the records of a grid, without an incomplete last one.

    Args:
        path: A file that `run_grid` wrote or is writing.

    Returns:
        The records, in the order of the file.

    Raises:
        UsageError: The file can't be read, a line is not a record, or a point occurs twice.

    Example:
        >>> import os, pathlib
        >>> from raco_optim.cli.grid import read_records
        >>> read_records(pathlib.Path(os.devnull))
        []
    """
    return _checked(path, _read(path).entries)


def point_key(point: Mapping[str, Any]) -> str:
    """Returns a key that is equal for equal points, whatever the order of the objectives.

    Args:
        point: The fields of a `Point`, as in a record.

    Example:
        >>> from raco_optim.cli.grid import point_key
        >>> point_key({"weights": {"b": 0.5, "a": 0.5}})
        '{"weights": {"a": 0.5, "b": 0.5}}'
    """
    return json.dumps(plain(point), sort_keys=True)


def _read(path: Path) -> jsonl.Records:
    try:
        found = jsonl.read(path)
    except OSError as error:
        raise UsageError(f"{path} can't be read ({error.strerror}).") from error
    except jsonl.BadLine as error:
        raise UsageError(f"{path}, line {error.number}, is not JSON ({error}).") from error
    except RecursionError as error:
        raise UsageError(f"{path} has a line with too deeply nested JSON.") from error
    if not jsonl.may_begin(found.torn, _HEAD):
        number = len(found.entries) + 1
        raise UsageError(f"{path}, line {number}, is not JSON.")
    return found


def _checked(path: Path, entries: list[Any]) -> list[dict[str, Any]]:
    seen: dict[str, int] = {}
    for number, record in enumerate(entries, start=1):
        if not _is_record(record):
            raise UsageError(
                f"{path}, line {number}, is not a record of `raco-optim sweep`, which has "
                f"{', '.join(_PARTS)}."
            )
        key = point_key(record["point"])
        if key in seen:
            raise UsageError(
                f"{path}, line {number}, repeats the point of line {seen[key]}. Remove one of them."
            )
        seen[key] = number
    return entries


def end_last_line(path: Path) -> None:
    """Drops an incomplete last line, or ends a complete one."""
    if not path.exists():
        return
    found = _read(path)
    if found.torn or not found.ended:
        with jsonl.Appender(path) as file:
            file.cut(found)
    if found.torn:
        sys.stderr.write(f"{path}: dropped an incomplete record.\n")


def append(path: Path, record: Mapping[str, Any]) -> None:
    """Appends a record and waits until it is on the disk; an error leaves the file unchanged."""
    with jsonl.Appender(path) as file:
        file.append(record)
        file.sync()


def plain(value: Any, where: str = "value", *, unknown: Callable[[str, Any], Any] = _refuse) -> Any:  # noqa: ANN401
    """Returns a value as JSON returns it, with null for NaN and Inf.

    Args:
        value: Mappings, sequences, strings, numbers and None, also of NumPy and torch.
        where: Name of the value, for messages.
        unknown: Called with name and value if JSON can't hold it; returns a substitute or raises.
    """
    if hasattr(value, "tolist"):  # arrays, tensors and NumPy scalars
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
    """Returns whether a value from JSON is a finite number."""
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
