"""Rules that assign meanings to the fields of a record, built in or from a user's file."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from raco_optim.cli.layouts.conversations import Messages, as_messages
from raco_optim.cli.layouts.pairs import Answer, Label, Pair, Score, compared
from raco_optim.cli.layouts.values import (
    Fields,
    as_number,
    is_missing,
    is_same,
    value_at,
    values_at,
)


@dataclass(frozen=True)
class Preference:
    """An objective that names the better of two answers.

    Attributes:
        path: Path of its value.
        first: Values that prefer the first answer; numbers are the end of a scale.
        second: Values that prefer the second answer.
        tie: Values for a tie.
    """

    path: str
    first: Sequence[Any] = (1,)
    second: Sequence[Any] = (-1,)
    tie: Sequence[Any] = ()

    def label(self, value: object) -> Label:
        """Returns the label of a value; raises `ValueError` if it has no meaning."""
        given = (self.first, self.second) == ((1,), (-1,))
        for values, strength in ((self.first, 1.0), (self.second, -1.0), (self.tie, 0.0)):
            if any(is_same(value, known) for known in values):
                return Label(strength, given)
        if is_missing(value):
            return Label(None, given)
        start, end = (next(filter(_is_number, x), None) for x in (self.first, self.second))
        if start is not None and end is not None and not isinstance(value, bool):
            number = as_number(value, f"`{self.path}`")
            if number is not None and min(start, end) <= number <= max(start, end):
                return Label((start + end - 2 * number) / (end - start), given)
        known = ", ".join(repr(x) for x in (*self.first, *self.second, *self.tie))
        raise ValueError(f"`{self.path}` must be one of {known}; got {value!r:.60}")


@dataclass(frozen=True)
class Rules:
    """The meanings of the fields of a record.

    A path is the name of a field, or leads into it: ``"a.b"``; ``"a[].b"`` is one value for each
    element of the list ``a``.

    Attributes:
        responses: Paths of the answers. A single path without ``[]`` means one answer per record,
            which is paired with the answers of other records to the same prompt.
        prompt: Path of the prompt; None if the answers begin with it.
        scores: By objective.
        preferences: By objective, for records with two answers.
        weights: Paths of weights, by objective, for records with two answers.
    """

    responses: Sequence[str]
    prompt: str | None = None
    scores: Mapping[str, Score] = field(default_factory=dict)
    preferences: Mapping[str, Preference] = field(default_factory=dict)
    weights: Mapping[str, str] = field(default_factory=dict)

    @property
    def fields(self) -> tuple[str, ...]:
        """Names of the fields that each record must have."""
        paths = [
            *([] if self.prompt is None else [self.prompt]),
            *self.responses,
            *(path for score in self.scores.values() for path in score.fields),
            *(preference.path for preference in self.preferences.values()),
            *self.weights.values(),
        ]
        return tuple(dict.fromkeys(path.split("[]")[0].split(".")[0] for path in paths))

    def pairs(self, records: Iterable[Fields], left_out: Counter[str]) -> Iterator[Pair]:
        """Yields pairs from the records of one source; `left_out` counts reasons for none."""
        if len(self.responses) == 1 and "[]" not in self.responses[0]:
            yield from self._across_records(records, left_out)
            return
        for record in records:
            answers = self._answers(record)
            if len(answers) < 2:
                left_out["records with fewer than two answers"] += 1
            said = {name: p.label(value_at(record, p.path)) for name, p in self.preferences.items()}
            weights = {name: _weight(value_at(record, x), x) for name, x in self.weights.items()}
            for pair in compared(self._prompt(record), answers, self.scores, left_out):
                labels = {
                    name: label._replace(weight=weights.get(name))
                    for name, label in {**said, **pair.labels}.items()
                }
                yield pair._replace(labels=labels)

    def _across_records(self, records: Iterable[Fields], left_out: Counter[str]) -> Iterator[Pair]:
        groups: dict[str, tuple[Messages, list[Answer]]] = {}
        for record in records:
            prompt = as_messages(self._prompt(record))
            key = json.dumps(prompt, sort_keys=True)
            groups.setdefault(key, (prompt, []))[1].extend(self._answers(record))
        for prompt, answers in groups.values():
            if len(answers) == 1:
                left_out["records with the only answer to their prompt"] += 1
            yield from compared(prompt, answers, self.scores, left_out)

    def _answers(self, record: Fields) -> list[Answer]:
        texts = values_at(record, self.responses)
        numbers = {name: values_at(record, score.fields) for name, score in self.scores.items()}
        for name, values in numbers.items():
            if len(values) != len(texts):
                raise ValueError(
                    f"{name!r} must score each of {len(texts)} answers; got {len(values)} scores"
                )
        return [
            Answer(
                None if text is None else as_messages(text, "assistant"),
                {name: as_number(x[i], f"the score of {name!r}") for name, x in numbers.items()},
            )
            for i, text in enumerate(texts)
        ]

    def _prompt(self, record: Fields) -> object:
        return None if self.prompt is None else value_at(record, self.prompt)


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _weight(value: object, name: str) -> float | None:
    number = as_number(value, f"`{name}`")
    if number is not None and number < 0:
        raise ValueError(f"`{name}` must be a weight >= 0; got {value!r:.60}")
    return number
