"""Values of a record, however deep they stand and however a file writes them."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

Fields = Mapping[str, Any]

# How data sets write that a value is missing.
_MISSING = {"", "n/a", "na", "nan", "none", "null"}


def value_at(record: Fields, path: str) -> Any:  # noqa: ANN401
    """Returns the value that a path leads to; None where a part of the way is missing.

    Args:
        record: A record.
        path: The name of a field, or names with dots between them.

    Raises:
        ValueError: The record has no field of the first name, or the path leads through something
            without names.

    Example:
        >>> from raco_optim.cli.layouts.values import value_at
        >>> value_at({"ratings": {"help": {"Rating": "3"}}}, "ratings.help.Rating")
        '3'
    """
    if path in record:
        return record[path]
    name, *rest = path.split(".")
    if name not in record:
        raise ValueError(f"there is no field `{name}`; it has {', '.join(map(str, record))}")
    value = record[name]
    for name in rest:
        value = _decoded(value)
        if isinstance(value, list) and len(value) == 1:
            value = value[0]  # as in the files that UltraFeedback was made from
        if value is None:
            return None
        if not isinstance(value, dict):
            raise ValueError(f"`{path}` leads through {value!r:.60}, which has no names")
        value = value.get(name)
    return value


def is_missing(value: object) -> bool:
    """Returns whether a label or a number is missing: null, NaN, or a word such as "N/A".

    Args:
        value: As a record has it.

    Example:
        >>> from raco_optim.cli.layouts.values import is_missing
        >>> [is_missing(value) for value in (None, "N/A", 0)]
        [True, True, False]
    """
    if isinstance(value, str):
        return value.strip().lower() in _MISSING
    return value is None or (isinstance(value, float) and math.isnan(value))


def as_number(value: object, name: str) -> float | None:
    """Returns a number, also of a text or a truth value; None where it is missing.

    Args:
        value: As a record has it.
        name: What it is, for the message.

    Raises:
        ValueError: It is something else, or infinite.

    Example:
        >>> from raco_optim.cli.layouts.values import as_number
        >>> as_number("3", "Rating"), as_number(True, "is_safe"), as_number("N/A", "Rating")
        (3.0, 1.0, None)
    """
    if is_missing(value):
        return None
    if isinstance(value, str) and value.strip().lower() in ("true", "false"):
        return float(value.strip().lower() == "true")
    try:
        number = float(value) if isinstance(value, str | int | float) else math.inf
    except (ValueError, OverflowError):
        number = math.inf
    if not math.isfinite(number):
        raise ValueError(f"{name} must be a number; got {value!r:.60}")
    return number


def values_at(record: Fields, paths: Sequence[str]) -> list[Any]:
    """Returns the values that paths lead to; of one path with ``[]``, those of each element.

    Args:
        record: A record.
        paths: Paths as for `value_at`, or one that goes through a list.

    Raises:
        ValueError: As `value_at`, or what should be a list is none.

    Example:
        >>> from raco_optim.cli.layouts.values import values_at
        >>> values_at({"answers": [{"text": "Yes."}, {"text": "No."}]}, ["answers[].text"])
        ['Yes.', 'No.']
    """
    if len(paths) != 1 or "[]" not in paths[0]:
        return [value_at(record, path) for path in paths]
    start, _, rest = paths[0].partition("[]")
    elements = _decoded(value_at(record, start))
    if not isinstance(elements, list):
        raise ValueError(f"`{start}` must be a list; got {elements!r:.60}")
    rest = rest.removeprefix(".")
    return [value_at({"": x}, f".{rest}") if rest else x for x in elements]


def is_same(value: object, known: object) -> bool:
    """Returns whether a value is the one that is meant, however a file writes it.

    Args:
        value: As the record has it.
        known: A text, a number or a truth value.

    Example:
        >>> from raco_optim.cli.layouts.values import is_same
        >>> is_same("1", 1), is_same("a", "A"), is_same(True, 1)
        (True, True, False)
    """
    if isinstance(value, bool) or isinstance(known, bool | str):
        return str(value).strip().lower() == str(known).lower()
    try:
        return float(value) == known  # type: ignore[arg-type]
    except (TypeError, ValueError, OverflowError):
        return False


def _decoded(value: object) -> object:
    """A list or a mapping comes as JSON where a file holds texts alone."""
    if isinstance(value, str):
        try:
            return json.loads(value)
        except ValueError as error:
            raise ValueError(f"JSON is needed; got {value!r:.60} ({error})") from error
    return value
