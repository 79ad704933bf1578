"""Pairs of answers to a prompt, with the label of each objective."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from raco_optim.cli.layouts.conversations import Messages, as_messages, split


class Label(NamedTuple):
    """The label of an objective for a pair.

    Attributes:
        strength: In [-1, 1]: > 0 if the first answer is better, 0 for a tie; None if unknown.
        given: Whether the data contain the strength as a label, to keep unchanged.
        weight: Weight of the pair, or None.
    """

    strength: float | None
    given: bool = False
    weight: float | None = None


class Pair(NamedTuple):
    """Two answers to a prompt, with a label per objective."""

    prompt: Messages
    first: Messages
    second: Messages
    labels: dict[str, Label]


@dataclass(frozen=True)
class Score:
    """An objective that gives each answer a number.

    Attributes:
        fields: Paths of the numbers, one per answer.
        lower: Whether lower numbers are better.
        margin: Numbers that differ by less are a tie.
        largest: The largest possible difference, which has strength 1; None if unknown.
    """

    fields: Sequence[str]
    lower: bool = False
    margin: float = 0.0
    largest: float | None = None

    def label(self, first: float | None, second: float | None) -> Label:
        """Compares the numbers of two answers; ValueError if they differ by too much."""
        if first is None or second is None:
            return Label(None)
        difference = second - first if self.lower else first - second
        # In floats, 0.3 - 0.1 is a little below 0.2.
        if abs(difference) < self.margin * (1 - 1e-9):
            return Label(0.0)
        largest = self.largest or abs(difference) or 1.0
        if abs(difference) > largest * (1 + 1e-9):
            raise ValueError(
                f"scores must not differ by more than `largest`, {largest:g}; got {first:g} and "
                f"{second:g} in {' and '.join(self.fields)}"
            )
        return Label(difference / largest)


class Answer(NamedTuple):
    """An answer as the record has it, and its number for each objective, or None."""

    text: object
    numbers: Mapping[str, float | None]


def compared(
    prompt: object,
    answers: Sequence[Answer],
    scores: Mapping[str, Score],
    left_out: Counter[str],
) -> Iterator[Pair]:
    """Yields all pairs of answers to one prompt, with the labels that the scores give.

    `prompt` is None if the answers begin with it; `left_out` counts reasons for making no pair.
    """
    for one, other in itertools.combinations(answers, 2):
        pair = paired(prompt, one.text, other.text, left_out)
        if pair is not None:
            for name, score in scores.items():
                pair.labels[name] = score.label(one.numbers[name], other.numbers[name])
            yield pair


def paired(prompt: object, one: object, other: object, left_out: Counter[str]) -> Pair | None:
    """Returns a pair without labels; None if an answer is missing or the answers are equal."""
    if one is None or other is None:
        left_out["pairs with a missing answer"] += 1
        return None
    first, second = as_messages(one, "assistant"), as_messages(other, "assistant")
    if first == second:
        left_out["pairs of equal answers"] += 1
        return None
    if first[0]["role"] != "assistant" and second[0]["role"] != "assistant":
        before, first, second = split(first, second)  # they include the prompt
    elif prompt is None:
        before = []
    else:
        before = as_messages(prompt)
    if not before:
        left_out["pairs without a common prompt"] += 1
        return None
    if first[0]["role"] != "assistant" or second[0]["role"] != "assistant":
        left_out["pairs that differ before the answer"] += 1
        return None
    return Pair(before, first, second, {})
