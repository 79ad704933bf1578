"""Reads `Rules` from a YAML or JSON file, and refuses unknown entries."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from raco_optim.cli.errors import UsageError, one_line
from raco_optim.cli.layouts.pairs import Score
from raco_optim.cli.layouts.rules import Preference, Rules

SUFFIXES = (".yaml", ".yml", ".json")


def load_rules(path: Path, option: str) -> Rules:
    """Reads rules from a file with one of `SUFFIXES`; raises `UsageError` if it can't."""
    try:
        text = path.read_text(encoding="utf-8")
        content = json.loads(text) if path.suffix == ".json" else _yaml(text, path, option)
        return rules_of(content)
    except UsageError:
        raise
    except Exception as error:  # YAML raises many kinds
        raise UsageError(f"`{option}` {path}: {one_line(error)}") from error


def rules_of(content: object) -> Rules:
    """Returns rules from the content of a file; raises `ValueError` for unknown entries."""
    parts = ("prompt", "responses", "scores", "preferences", "weights")
    given = _mapping(content, "the file", parts)
    responses = _names(given.get("responses"), "`responses`")
    across = len(responses) == 1 and "[]" not in responses[0]
    prompt = given.get("prompt")
    if prompt is not None and not isinstance(prompt, str):
        raise ValueError(f"`prompt` must be the name of a field; got {prompt!r}")
    if across and prompt is None:
        raise ValueError("`prompt` must be given, to match answers to the same prompt")
    scores = {
        name: _score(value, f"`scores`, {name}", len(responses))
        for name, value in _mapping(given.get("scores", {}), "`scores`").items()
    }
    preferences = {
        name: _preference(value, f"`preferences`, {name}")
        for name, value in _mapping(given.get("preferences", {}), "`preferences`").items()
    }
    weights = _mapping(given.get("weights", {}), "`weights`")
    objectives = [*scores, *preferences]
    if not objectives:
        raise ValueError("`scores` or `preferences` must name at least one objective")
    for name in objectives:
        if objectives.count(name) > 1 or "=" in name or "," in name:
            raise ValueError(f"an objective must have a unique name without = and ,; got {name!r}")
    if preferences and len(responses) != 2:
        raise ValueError(f"`preferences` need 2 responses; got {len(responses)}")
    if weights and across:
        raise ValueError("`weights` need records with two answers; got one `responses` path")
    for name, path in weights.items():
        if name not in objectives or not isinstance(path, str):
            raise ValueError(
                f"`weights` must name a field for objectives ({', '.join(objectives)}); got "
                f"{name!r}: {path!r}"
            )
    return Rules(responses, prompt, scores, preferences, weights)


def _score(value: object, what: str, responses: int) -> Score:
    if not isinstance(value, Mapping):
        value = {"fields": value}
    given = _mapping(value, what, ("fields", "better", "margin", "largest"))
    fields = _names(given.get("fields"), f"{what}: `fields`")
    if len(fields) != responses:
        raise ValueError(
            f"{what}: `fields` must have one field per response, {responses}; got {fields}"
        )
    better = given.get("better", "higher")
    if better not in ("higher", "lower"):
        raise ValueError(f"{what}: `better` must be higher or lower; got {better!r}")
    for name in ("margin", "largest"):
        number = given.get(name, 1)
        if isinstance(number, bool) or not isinstance(number, int | float) or not number > 0:
            raise ValueError(f"{what}: `{name}` must be a number above 0; got {number!r}")
    return Score(fields, better == "lower", float(given.get("margin", 0)), given.get("largest"))


def _preference(value: object, what: str) -> Preference:
    if isinstance(value, str):
        return Preference(value)
    given = _mapping(value, what, ("field", "first", "second", "tie"))
    if not isinstance(given.get("field"), str):
        raise ValueError(f"{what}: `field` must be the name of a field; got {given.get('field')!r}")
    if ("first" in given) != ("second" in given) or len(given) == 1:
        raise ValueError(f"{what}: `first` and `second` must both be given, or neither")
    values = {name: _list(given[name]) for name in ("first", "second", "tie") if name in given}
    return Preference(given["field"], **values)


def _list(value: Any) -> tuple[Any, ...]:  # noqa: ANN401
    return tuple(value) if isinstance(value, list) else (value,)


def _names(value: object, what: str) -> tuple[str, ...]:
    names = _list(value)
    if not names or not all(isinstance(name, str) for name in names):
        raise ValueError(f"{what} must be names of fields; got {value!r}")
    return names


def _mapping(value: object, what: str, known: Iterable[str] = ()) -> Mapping[str, Any]:
    if not isinstance(value, Mapping) or not all(isinstance(name, str) for name in value):
        raise ValueError(f"{what} must have names and values; got {value!r:.60}")
    unknown = [name for name in value if known and name not in known]
    if unknown:
        raise ValueError(f"{what} must have only {', '.join(known)}; got {unknown[0]!r}")
    return value


def _yaml(text: str, path: Path, option: str) -> object:
    try:
        import yaml
    except ImportError as error:
        raise UsageError(
            f"`{option}` {path} needs PyYAML. Run `pip install pyyaml`, or use a .json file."
        ) from error
    return yaml.safe_load(text)
