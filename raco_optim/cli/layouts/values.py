"""Values of a record, also nested ones and those that a file stores as text."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

Fields = Mapping[str, Any]

# Spellings of a missing value.
_MISSING = {"", "n/a", "na", "nan", "none", "null"}


def value_at(record: Fields, path: str) -> Any:  # noqa: ANN401
    """Returns the value at a path such as ``"a.b"``, None if a part of it is missing; or raises."""
    if path in record:
        return record[path]
    name, *rest = path.split(".")
    if name not in record:
        raise ValueError(f"the record has no field `{name}`; it has {', '.join(map(str, record))}")
    value = record[name]
    for name in rest:
        value = _decoded(value)
        if isinstance(value, list) and len(value) == 1:
            value = value[0]  # as in the raw files of UltraFeedback
        if value is None:
            return None
        if not isinstance(value, dict):
            raise ValueError(f"`{path}` must lead through mappings; got {value!r:.60}")
        value = value.get(name)
    return value


def is_missing(value: object) -> bool:
    """Returns whether a value is missing: null, NaN, or a word such as "N/A"."""
    if isinstance(value, str):
        return value.strip().lower() in _MISSING
    return value is None or (isinstance(value, float) and math.isnan(value))


def as_number(value: object, name: str) -> float | None:
    """Returns a number, also from a text or a truth value; None if missing; or raises."""
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
    """Returns the values at paths; for one path with ``[]``, a value per element; or raises."""
    if len(paths) != 1 or "[]" not in paths[0]:
        return [value_at(record, path) for path in paths]
    start, _, rest = paths[0].partition("[]")
    elements = _decoded(value_at(record, start))
    if not isinstance(elements, list):
        raise ValueError(f"`{start}` must be a list; got {elements!r:.60}")
    rest = rest.removeprefix(".")
    return [value_at({"": x}, f".{rest}") if rest else x for x in elements]


def is_same(value: object, known: object) -> bool:
    """Returns whether a value equals a known text, number or truth value, also as text."""
    if isinstance(value, bool) or isinstance(known, bool | str):
        return str(value).strip().lower() == str(known).lower()
    try:
        return float(value) == known  # type: ignore[arg-type]
    except (TypeError, ValueError, OverflowError):
        return False


def _decoded(value: object) -> object:
    """Parses JSON, because some files store lists and mappings as text."""
    if isinstance(value, str):
        try:
            return json.loads(value)
        except ValueError as error:
            raise ValueError(f"a value must be JSON; got {value!r:.60} ({error})") from error
    return value
