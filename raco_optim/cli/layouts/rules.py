"""Rules that say which fields of a record are what; of built-in layouts, or from a user's file."""

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
    """An objective that says which of two answers is better.

    Attributes:
        path: Where it says so.
        first: Values for the first answer; a number is an end of a scale.
        second: Values for the second.
        tie: Values for neither.

    Example:
        >>> from raco_optim.cli.layouts.rules import Preference
        >>> [Preference("overall", (-3,), (3,)).label(value).strength for value in (-3, 0, 1)]
        [1.0, 0.0, -0.3333333333333333]
    """

    path: str
    first: Sequence[Any] = (1,)
    second: Sequence[Any] = (-1,)
    tie: Sequence[Any] = ()

    def label(self, value: object) -> Label:
        """Reads a value.

        Args:
            value: As the record has it.

        Raises:
            ValueError: It is none of those that are known, nor on the scale.
        """
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
    """Which fields of a record are what.

    A path is the name of a field, or leads into it: ``"a.b"``; ``"a[].b"`` is one value for each
    element of the list in ``a``.

    Attributes:
        responses: Paths of the answers. One alone, without ``[]``, means that each record has one
            answer, to be paired with those of other records with the same prompt.
        prompt: Path of the prompt, or None where the answers begin with it.
        scores: By objective.
        preferences: By objective, for records with two answers.
        weights: Paths of weights, by objective, for records with two answers.

    Example:
        >>> from raco_optim.cli.layouts.pairs import Score
        >>> from raco_optim.cli.layouts.rules import Rules
        >>> Rules(("answer",), "question", {"brief": Score(("words",), lower=True)}).fields
        ('question', 'answer', 'words')
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
        """Reads pairs.

        Args:
            records: Those of one source.
            left_out: Counts what makes no pair, by reason.

        Raises:
            ValueError: A value is not of its kind.
        """
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
        raise ValueError(f"`{name}` must be a weight of 0 or more; got {value!r:.60}")
    return number
