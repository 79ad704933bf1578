"""The layouts of well-known data sets."""

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
    """The layout of a data set.

    Attributes:
        fields: Names of the fields of each record.
        read: Yields pairs from records, and counts the others. The user names an objective that is
            called ``""``.
        scaled: Whether strengths are known, not only signs.
        recognises: A further condition on a record.
    """

    fields: tuple[str, ...]
    read: Callable[[Iterable[Fields], Counter[str]], Iterator[Pair]]
    scaled: bool = True
    recognises: Callable[[Fields], bool] = lambda record: True


def of_rules(rules: Rules) -> Layout:
    """Returns the layout that rules describe."""
    scaled = all(score.largest for score in rules.scores.values())
    return Layout(rules.fields, rules.pairs, scaled)


def _beavertails(records: Iterable[Fields], left_out: Counter[str]) -> Iterator[Pair]:
    """Answers may be rated several times; their score is the fraction of such ratings."""
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
        harms = json.loads(harms) if isinstance(harms, str) else harms  # from a CSV file
        if not isinstance(harms, dict):
            raise ValueError(f"`category` must map categories to truth values; got {harms!r:.60}")
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
                left_out["pairs of equally safe answers"] += 1


def _chosen_rejected(records: Iterable[Fields], left_out: Counter[str]) -> Iterator[Pair]:
    for record in records:
        pair = paired(record.get("prompt"), record["chosen"], record["rejected"], left_out)
        if pair is not None:
            yield pair._replace(labels={"": Label(1.0)})


def _labelled(
    prefix: str,
) -> Callable[[Iterable[Fields], Counter[str]], Iterator[Pair]]:
    """Returns a reader of pairs with columns of labels in [-1, 1], and maybe of weights."""

    def read(records: Iterable[Fields], left_out: Counter[str]) -> Iterator[Pair]:
        for record in records:
            pair = paired(record.get("prompt"), record["chosen"], record["rejected"], left_out)
            if any(name.startswith("margin_") for name in record):
                raise ValueError(
                    "columns `margin_<objective>` are not supported here and would be lost"
                )
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
    # The layout that `raco-optim align` reads.
    "pairs": Layout(
        ("chosen", "rejected"),
        _labelled("pref_"),
        recognises=lambda record: any(name.startswith("pref_") for name in record),
    ),
    # Too common to be recognised.
    "chosen-rejected": Layout(
        ("chosen", "rejected"), _chosen_rejected, recognises=lambda record: False
    ),
}


def layout_of(record: Fields) -> str:
    """Returns the name of the only layout that fits the fields of a record; or raises."""
    found = [
        name
        for name, layout in LAYOUTS.items()
        if set(layout.fields) <= set(record) and layout.recognises(record)
    ]
    if len(found) != 1:
        which = f"several layouts ({' and '.join(found)})" if found else "no known layout"
        raise ValueError(
            f"its fields fit {which}; it has {', '.join(map(str, record))}. Name one with "
            f"`--layout`: {', '.join(LAYOUTS)}, or a YAML file with rules"
        )
    return found[0]


def check_fields(name: str, layout: Layout, record: Fields) -> None:
    """Raises `ValueError` unless a record has the fields of a layout."""
    missing = [field for field in layout.fields if field not in record]
    if missing:
        raise ValueError(
            f"the layout {name} needs {', '.join(missing)}; the record has {', '.join(record)}"
        )
