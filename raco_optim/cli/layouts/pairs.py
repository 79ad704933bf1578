"""Answers to a prompt -> pairs, with what each objective says of them."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from raco_optim.cli.layouts.conversations import Messages, as_messages, split


class Label(NamedTuple):
    """What an objective says of a pair.

    Attributes:
        strength: In [-1, 1], above 0 where the first answer is better, 0 for a tie; None where
            nothing is said.
        given: Whether the strength is a label of the data, to be kept as it is.
        weight: How much the pair counts, or None.

    Example:
        >>> from raco_optim.cli.layouts.pairs import Label
        >>> Label(-0.5).weight is None
        True
    """

    strength: float | None
    given: bool = False
    weight: float | None = None


class Pair(NamedTuple):
    """Two answers to a prompt.

    Attributes:
        prompt: What both answer.
        first: An answer.
        second: Another answer.
        labels: By objective.

    Example:
        >>> from raco_optim.cli.layouts.conversations import as_messages
        >>> from raco_optim.cli.layouts.pairs import Label, Pair
        >>> say = lambda text: as_messages(text, "assistant")
        >>> Pair(as_messages("Why?"), say("So."), say("No."), {"brief": Label(1)}).labels["brief"]
        Label(strength=1, given=False, weight=None)
    """

    prompt: Messages
    first: Messages
    second: Messages
    labels: dict[str, Label]


@dataclass(frozen=True)
class Score:
    """An objective that gives each answer a number.

    Attributes:
        fields: Paths of the numbers, as many as there are paths of answers.
        lower: Whether a lower number is better.
        margin: Numbers that differ by less are a tie.
        largest: The largest possible difference, which is a strength of 1, or None.

    Example:
        >>> from raco_optim.cli.layouts.pairs import Score
        >>> Score(("a", "b"), margin=2).label(3, 2).strength
        0.0
    """

    fields: Sequence[str]
    lower: bool = False
    margin: float = 0.0
    largest: float | None = None

    def label(self, first: float | None, second: float | None) -> Label:
        """Compares the numbers of two answers.

        Args:
            first: That of the first, or None.
            second: That of the second, or None.

        Raises:
            ValueError: They differ by more than `largest`.
        """
        if first is None or second is None:
            return Label(None)
        difference = second - first if self.lower else first - second
        # What is written as 0.3 - 0.1 is a little below 0.2.
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
    """An answer with the numbers that objectives give it.

    Attributes:
        text: As the record has it.
        numbers: By objective; None where there is none.

    Example:
        >>> from raco_optim.cli.layouts.pairs import Answer
        >>> Answer("Yes.", {"helpful": 3.0}).numbers
        {'helpful': 3.0}
    """

    text: object
    numbers: Mapping[str, float | None]


def compared(
    prompt: object,
    answers: Sequence[Answer],
    scores: Mapping[str, Score],
    left_out: Counter[str],
) -> Iterator[Pair]:
    """Makes all pairs of the answers to one prompt.

    Args:
        prompt: As the record has it; None where the answers begin with it.
        answers: Two or more.
        scores: By objective.
        left_out: Counts what makes no pair, by reason.

    Raises:
        ValueError: An answer or the prompt is neither a text nor messages.

    Example:
        >>> from collections import Counter
        >>> from raco_optim.cli.layouts.pairs import Answer, Score, compared
        >>> answers = [Answer("Yes.", {"brief": 4}), Answer("No.", {"brief": 3})]
        >>> [pair] = compared("Really?", answers, {"brief": Score((), lower=True)}, Counter())
        >>> pair.labels["brief"].strength
        -1.0
    """
    for one, other in itertools.combinations(answers, 2):
        pair = paired(prompt, one.text, other.text, left_out)
        if pair is not None:
            for name, score in scores.items():
                pair.labels[name] = score.label(one.numbers[name], other.numbers[name])
            yield pair


def paired(prompt: object, one: object, other: object, left_out: Counter[str]) -> Pair | None:
    """Makes a pair without labels, unless one of the answers is missing or both are equal.

    Args:
        prompt: As the record has it; None where the answers begin with it.
        one: The first answer: a text, messages, or a transcript, with or without the prompt.
        other: The second.
        left_out: Counts what makes no pair, by reason.

    Raises:
        ValueError: An answer or the prompt is neither a text nor messages.

    Example:
        >>> from collections import Counter
        >>> from raco_optim.cli.layouts.pairs import paired
        >>> paired("Really?", "Yes.", "No.", Counter()).prompt
        [{'role': 'user', 'content': 'Really?'}]
    """
    if one is None or other is None:
        left_out["pairs with an answer missing"] += 1
        return None
    first, second = as_messages(one, "assistant"), as_messages(other, "assistant")
    if first == second:
        left_out["pairs of equal answers"] += 1
        return None
    if first[0]["role"] != "assistant" and second[0]["role"] != "assistant":
        before, first, second = split(first, second)  # they hold the prompt themselves
    elif prompt is None:
        before = []
    else:
        before = as_messages(prompt)
    if not before:
        left_out["pairs without a prompt that both answer"] += 1
        return None
    if first[0]["role"] != "assistant" or second[0]["role"] != "assistant":
        left_out["pairs that part before an answer"] += 1
        return None
    return Pair(before, first, second, {})
