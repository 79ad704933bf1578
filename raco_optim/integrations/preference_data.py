"""Preferences as columns of a data set: checks before training, and tensors in a batch."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from numbers import Real
from typing import Any

import torch
from datasets import Dataset, IterableDataset
from torch import Tensor

SIGNS = "signs"
MARGINS = "margins"
_TEXTS = ("chosen", "rejected")
# By how the name of a column begins, why it is needed.
_REMEDIES = (
    ("pref_", "Every objective in `weights` needs one with +1, -1, 0 or null."),
    ("margin_", "MODPO needs the reward margins of every objective but its own."),
    ("", "A pair is a chosen and a rejected answer, and their prompt if it is not within them."),
)


def sign_column(objective: str) -> str:
    """Names the column with the preferences of an objective: +1, -1, 0 or null."""
    return f"pref_{objective}"


def margin_column(objective: str) -> str:
    """Names the column with its reward of ``chosen`` minus that of ``rejected``."""
    return f"margin_{objective}"


def preference_columns(objectives: Iterable[str], margins: Iterable[str]) -> list[str]:
    """Names the columns that are read: preferences of all, margins of some (MODPO)."""
    return [*map(sign_column, objectives), *map(margin_column, margins)]


class PreferenceCollator:
    """Adds the preferences of a batch to what another collator makes of it.

    Args:
        collator: Makes the batch of the other columns.
        objectives: m names, in the order of the weights.
        margins: Objectives whose reward margins are added too (MODPO).
    """

    def __init__(
        self,
        collator: Callable[[list[dict[str, Any]]], dict[str, Any]],
        objectives: Sequence[str],
        margins: Sequence[str],
    ) -> None:
        self.collator = collator
        self.objectives = tuple(objectives)
        self.margins = tuple(margins)

    def __call__(self, examples: list[dict[str, Any]]) -> dict[str, Any]:
        """Returns the batch with ``signs`` ``[B, m]`` and, where asked for, ``margins``."""
        needed = preference_columns(self.objectives, self.margins)
        for example in examples:
            check_columns(example, needed, "dataset")
        batch = self.collator(examples)
        batch[SIGNS] = torch.tensor(
            [
                [as_sign(x[sign_column(o)], sign_column(o)) for o in self.objectives]
                for x in examples
            ],
            dtype=torch.int8,
        )
        if self.margins:
            # In the order of the weights; an objective without margins has 0, which is not read.
            batch[MARGINS] = torch.tensor(
                [
                    [
                        as_margin(x[margin_column(o)], margin_column(o))
                        if o in self.margins
                        else 0.0
                        for o in self.objectives
                    ]
                    for x in examples
                ]
            )
        return batch


def as_sign(value: object, column: str) -> int:
    """Returns +1, -1 or 0; a missing label (null, NaN) is 0, as a tie is.

    Raises:
        ValueError: The value is something else.
    """
    if value is None or (isinstance(value, Real) and math.isnan(value)):
        return 0
    if isinstance(value, bool) or not isinstance(value, Real) or value not in (1, 0, -1):
        raise ValueError(
            f"column `{column}` must hold +1 (prefers chosen), -1 (prefers rejected), 0 (tie) or "
            f"null (no label); got {value!r}."
        )
    return int(float(value))


def as_margin(value: object, column: str) -> float:
    """Returns a finite number.

    Raises:
        ValueError: The value is something else.
    """
    if isinstance(value, bool) or not isinstance(value, Real) or not math.isfinite(value):
        raise ValueError(
            f"column `{column}` must hold the reward of chosen minus that of rejected, a finite "
            f"number; got {value!r}."
        )
    return float(value)


def check_columns(present: Iterable[str], needed: Sequence[str], argument: str) -> None:
    """Raises `ValueError` where a data set lacks a column, with what it has."""
    columns = list(present)
    for column in needed:
        if column not in columns:
            remedy = next(text for start, text in _REMEDIES if column.startswith(start))
            raise ValueError(
                f"`{argument}` must have the column `{column}`; it has {', '.join(columns)}. "
                f"{remedy}"
            )


def check_dataset(dataset: Any, columns: Sequence[str], argument: str) -> None:  # noqa: ANN401
    """Raises `ValueError` unless a data set holds pairs, and preferences in its columns.

    Args:
        dataset: A `datasets.Dataset`, or a stream, whose columns alone are checked, from its first
            example: the values come later; or a mapping to several. What is neither is left to TRL.
        columns: Those that are needed beside the pairs, ``pref_*`` and ``margin_*``.
        argument: What it was passed as.
    """
    for one in dataset.values() if isinstance(dataset, Mapping) else []:
        check_dataset(one, columns, argument)
    if not isinstance(dataset, Dataset | IterableDataset):
        return
    stored = isinstance(dataset, Dataset)
    first = next(iter(dataset), None)
    if first is None:
        raise ValueError(f"`{argument}` must hold at least one pair; got none.")
    present = dataset.column_names if stored else list(first)
    check_columns(present, [*_TEXTS, *columns], argument)
    if {"image", "images"} & set(present):
        raise ValueError(
            f"`{argument}` must not have images; it has the columns {', '.join(present)}. Vision "
            f"models are not supported."
        )
    for column in columns if stored else []:
        values = dataset.unique(column)
        if column.startswith("margin_"):
            for value in values:
                as_margin(value, column)
        elif not {as_sign(value, column) for value in values} & {1, -1}:
            raise ValueError(
                f"`{argument}` must label at least one pair in `{column}`; all of its values are 0 "
                f"or null. Leave the objective out of `weights`."
            )


def count_labels(signs: Tensor) -> Tensor:
    """Counts the labelled pairs per objective, ``[m]``."""
    return (signs != 0).sum(0)


def without_repeats(signs: Tensor, rank: int, real: int) -> Tensor:
    """Takes the labels off those pairs that only fill the last batch of a data set up.

    Accelerate takes them from its beginning, so that all processes get as many.

    Args:
        signs: Those of the pairs of this process, ``[B, m]``.
        rank: The number of this process.
        real: How many pairs of the last batch, that of all processes, are no repeats.
    """
    signs = signs.clone()
    signs[max(0, real - rank * len(signs)) :] = 0
    return signs
