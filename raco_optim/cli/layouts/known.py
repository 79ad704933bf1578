"""The layouts of data sets that people use -> pairs of answers, with what each objective says."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

from raco_optim.cli.layouts.pairs import Answer, Label, Pair, Score, compared, paired
from raco_optim.cli.layouts.rules import Preference, Rules
from raco_optim.cli.layouts.values import Fields, as_number

_ASPECTS = ("helpfulness", "honesty", "instruction_following", "truthfulness")
_ATTRIBUTES = ("helpfulness", "correctness", "coherence", "complexity", "verbosity")


@dataclass(frozen=True)
class Layout:
    """How a data set is laid out.

    Attributes:
        fields: Names that each record has.
        read: Records, and a counter of what is left out -> pairs. The objective ``""`` stands for
            the one that the user names.
        scaled: Whether strengths are known, not signs alone.
        recognises: What a record has beyond the fields.

    Example:
        >>> from raco_optim.cli.layouts.known import LAYOUTS
        >>> LAYOUTS["helpsteer3"].fields
        ('context', 'response1', 'response2', 'overall_preference')
    """

    fields: tuple[str, ...]
    read: Callable[[Iterable[Fields], Counter[str]], Iterator[Pair]]
    scaled: bool = True
    recognises: Callable[[Fields], bool] = lambda record: True


def of_rules(rules: Rules) -> Layout:
    """Returns the layout that rules describe.

    Args:
        rules: Which fields are what.

    Example:
        >>> from raco_optim.cli.layouts.known import of_rules
        >>> from raco_optim.cli.layouts.pairs import Score
        >>> from raco_optim.cli.layouts.rules import Rules
        >>> of_rules(Rules(("answer",), "question", {"brief": Score(("words",))})).scaled
        False
    """
    scaled = all(score.largest for score in rules.scores.values())
    return Layout(rules.fields, rules.pairs, scaled)


def _beavertails(records: Iterable[Fields], left_out: Counter[str]) -> Iterator[Pair]:
    """Some answers were marked several times: their score is the share of marks that say so."""
    groups: dict[str, dict[str, list[dict[str, float]]]] = {}
    for record in records:
        prompt, text = record["prompt"], record["response"]
        if not isinstance(prompt, str) or not isinstance(text, str):
            raise ValueError(f"`prompt` and `response` must be texts; got {prompt!r:.60}")
        safe = as_number(record["is_safe"], "`is_safe`")
        if safe is None:
            left_out["records without `is_safe`"] += 1
            continue
        harms = record["category"]
        harms = json.loads(harms) if isinstance(harms, str) else harms  # of a CSV file
        if not isinstance(harms, dict):
            raise ValueError(f"`category` must hold a truth value for each; got {harms!r:.60}")
        said = {
            name.partition(",")[0]: as_number(value, f"`category`, {name}") or 0.0
            for name, value in harms.items()
        }
        groups.setdefault(prompt, {}).setdefault(text, []).append({"harmless": safe, **said})
    for prompt, by_text in groups.items():
        answers = [
            Answer(
                text, {name: sum(x.get(name, 0.0) for x in marks) / len(marks) for name in marks[0]}
            )
            for text, marks in by_text.items()
        ]
        scores = {
            name: Score((name,), lower=name != "harmless", largest=1) for name in answers[0].numbers
        }
        if len(answers) == 1:
            left_out["prompts with one answer"] += 1
        for pair in compared(prompt, answers, scores, left_out):
            if pair.labels["harmless"].strength:
                yield pair
            else:
                left_out["pairs of answers as safe as each other"] += 1


def _chosen_rejected(records: Iterable[Fields], left_out: Counter[str]) -> Iterator[Pair]:
    for record in records:
        pair = paired(record.get("prompt"), record["chosen"], record["rejected"], left_out)
        if pair is not None:
            yield pair._replace(labels={"": Label(1.0)})


def _labelled(
    prefix: str,
) -> Callable[[Iterable[Fields], Counter[str]], Iterator[Pair]]:
    """Pairs with columns of labels in [-1, 1]; beside ours there may be columns of weights."""

    def read(records: Iterable[Fields], left_out: Counter[str]) -> Iterator[Pair]:
        for record in records:
            pair = paired(record.get("prompt"), record["chosen"], record["rejected"], left_out)
            if any(name.startswith("margin_") for name in record):
                raise ValueError("columns `margin_<objective>` would get lost")
            if pair is not None:
                for column, value in record.items():
                    if column.startswith(prefix):
                        name = column.removeprefix(prefix)
                        weight = as_number(record.get(f"weight_{name}"), f"`weight_{name}`")
                        label = Preference(column).label(value)
                        pair.labels[name] = label._replace(weight=weight)
                yield pair

    return read


def _is_transcripts(record: Fields) -> bool:
    texts = (record["chosen"], record["rejected"])
    return all(isinstance(text, str) and text.startswith("\n\nHuman:") for text in texts)


LAYOUTS: dict[str, Layout] = {
    "pku-saferlhf": of_rules(
        Rules(
            ("response_0", "response_1"),
            "prompt",
            preferences={
                "helpful": Preference("better_response_id", (0,), (1,)),
                "harmless": Preference("safer_response_id", (0,), (1,)),
            },
            scores={"safe": Score(("is_response_0_safe", "is_response_1_safe"), largest=1)},
        )
    ),
    "helpsteer2": of_rules(
        Rules(("response",), "prompt", {name: Score((name,), largest=4) for name in _ATTRIBUTES})
    ),
    "helpsteer2-preference": of_rules(
        Rules(
            ("response_1", "response_2"),
            "prompt",
            preferences={"overall": Preference("preference_strength", (-3,), (3,))},
        )
    ),
    "helpsteer3": of_rules(
        Rules(
            ("response1", "response2"),
            "context",
            preferences={"overall": Preference("overall_preference", (-3,), (3,))},
        )
    ),
    "ultrafeedback": of_rules(
        Rules(
            ("completions[].response",),
            "instruction",
            {
                name: Score((f"completions[].annotations.{name}.Rating",), largest=4)
                for name in _ASPECTS
            },
        )
    ),
    "ultrafeedback-binarized": of_rules(
        Rules(
            ("chosen", "rejected"),
            scores={"overall": Score(("score_chosen", "score_rejected"), largest=10)},
        )
    ),
    "beavertails": Layout(("prompt", "response", "category", "is_safe"), _beavertails),
    "hh-rlhf": Layout(
        ("chosen", "rejected"),
        _chosen_rejected,
        recognises=lambda record: len(record) == 2 and _is_transcripts(record),
    ),
    "raco": Layout(
        ("chosen", "rejected"),
        _labelled("raco_s_"),
        recognises=lambda record: any(name.startswith("raco_s_") for name in record),
    ),
    "raco-raw": of_rules(
        Rules(
            ("Summary_A", "Summary_B"),
            preferences={
                name.lower(): Preference(
                    name,
                    (1, "A", "Summary_A", "A>B", "A > B", "chosen", "left", "first"),
                    (-1, "B", "Summary_B", "B>A", "B > A", "rejected", "right", "second"),
                    (0, "tie", "equal", "same"),
                )
                for name in ("Quality", "Verbosity")
            },
        )
    ),
    # Those that `raco-optim align` reads.
    "pairs": Layout(
        ("chosen", "rejected"),
        _labelled("pref_"),
        recognises=lambda record: any(name.startswith("pref_") for name in record),
    ),
    # Its fields say too little to be recognised by.
    "chosen-rejected": Layout(
        ("chosen", "rejected"), _chosen_rejected, recognises=lambda record: False
    ),
}


def layout_of(record: Fields) -> str:
    """Recognises a layout by a record's fields.

    Args:
        record: A record.

    Returns:
        Its name in `LAYOUTS`.

    Raises:
        ValueError: No layout has such fields, or several.

    Example:
        >>> from raco_optim.cli.layouts.known import layout_of
        >>> layout_of({"Summary_A": [], "Summary_B": [], "Quality": "A", "Verbosity": "B"})
        'raco-raw'
    """
    found = [
        name
        for name, layout in LAYOUTS.items()
        if set(layout.fields) <= set(record) and layout.recognises(record)
    ]
    if len(found) != 1:
        which = f"those of {' and '.join(found)}" if found else "those of no layout that is known"
        raise ValueError(
            f"its fields are {which}; it has {', '.join(map(str, record))}. Name one by "
            f"`--layout`: {', '.join(LAYOUTS)}, or a YAML file with rules of your own"
        )
    return found[0]


def check_fields(name: str, layout: Layout, record: Fields) -> None:
    """Raises `ValueError` unless a record has the fields of a layout.

    Args:
        name: What the layout is called.
        layout: The layout.
        record: A record.

    Raises:
        ValueError: With the names of those that are missing.

    Example:
        >>> from raco_optim.cli.layouts.known import LAYOUTS, check_fields
        >>> check_fields("raco-raw", LAYOUTS["raco-raw"], {"Summary_A": []})
        Traceback (most recent call last):
        ValueError: it lacks Summary_B, Quality, Verbosity of the layout raco-raw; it has Summary_A
    """
    missing = [field for field in layout.fields if field not in record]
    if missing:
        raise ValueError(
            f"it lacks {', '.join(missing)} of the layout {name}; it has {', '.join(record)}"
        )
