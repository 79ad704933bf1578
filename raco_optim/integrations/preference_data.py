"""Preferences in the columns of a data set: checked before training, tensors in a batch."""

from __future__ import annotations

import math
import sys
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from numbers import Real
from typing import Any, NamedTuple

import numpy as np
import torch
from datasets import Dataset, IterableDataset
from numpy.typing import NDArray
from torch import Tensor
from trl import DPOConfig

SIGNS = "signs"
MARGINS = "margins"
PAIR_WEIGHTS = "pair_weights"
_TEXTS = ("chosen", "rejected")
# Prefix of a missing column -> why it is needed.
_REMEDIES = (
    ("pref_", "Every objective in `weights` needs one, with numbers in [-1, 1] or null."),
    ("margin_", "MODPO needs the reward margins of all objectives but `modpo_objective`."),
    ("", "A pair is a chosen and a rejected answer, with the prompt inside or in a column."),
)


def sign_column(objective: str) -> str:
    """Returns the column of an objective's preferences: numbers in [-1, 1], or null."""
    return f"pref_{objective}"


def weight_column(objective: str) -> str:
    """Returns the optional column of the weights of the pairs for an objective."""
    return f"weight_{objective}"


def margin_column(objective: str) -> str:
    """Returns the column of an objective's reward margins, r(chosen) - r(rejected)."""
    return f"margin_{objective}"


def preference_columns(objectives: Iterable[str], margins: Iterable[str]) -> list[str]:
    """Returns the columns to read: preferences of `objectives`, reward margins of `margins`."""
    return [*map(sign_column, objectives), *map(margin_column, margins)]


class Preferences(NamedTuple):
    """Preferences of m objectives over B pairs, on the CPU.

    Attributes:
        signs: ``[B, m]`` in [-1, 1]; 0 where there is no label.
        weights: ``[B, m]``, >= 0.
        margins: ``[B, m]`` for MODPO, else None.
    """

    signs: Tensor
    weights: Tensor
    margins: Tensor | None

    @classmethod
    def of(cls, batch: Mapping[str, Tensor]) -> Preferences:
        """Reads the preferences from a batch."""
        signs, weights = batch[SIGNS].cpu(), batch[PAIR_WEIGHTS].cpu()
        return cls(signs * (weights > 0), weights, batch.get(MARGINS))

    def sums(self) -> Tensor:
        """Returns the total weight of the pairs that each objective labels, ``[m]``, float64."""
        return (self.weights.double() * (self.signs != 0)).sum(0)


def for_the_model(batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Returns a batch without the preferences."""
    return {k: x for k, x in batch.items() if k not in (SIGNS, PAIR_WEIGHTS, MARGINS)}


class PreferenceCollator:
    """Adds preferences, and reward margins for MODPO, to the batches of another collator."""

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
        """Returns the batch with ``signs`` and ``pair_weights``, ``[B, m]``, and ``margins``."""
        needed = preference_columns(self.objectives, self.margins)
        for example in examples:
            check_columns(example, needed, "dataset")
        batch = self.collator(examples)

        def table(column: Callable[[str], str], read: Callable[..., float]) -> Tensor:
            columns = [column(objective) for objective in self.objectives]
            return torch.tensor([[read(x.get(c), c) for c in columns] for x in examples])

        batch[SIGNS] = table(sign_column, as_label)
        batch[PAIR_WEIGHTS] = table(weight_column, as_weight)
        if self.margins:
            # `modpo_objective` has no margins; its zeros are never read.
            read = {margin_column(objective) for objective in self.margins}
            batch[MARGINS] = table(
                margin_column, lambda x, c: as_margin(x, c) if c in read else 0.0
            )
        return batch


def as_label(value: object, column: str) -> float:
    """Returns a label as a number in [-1, 1], 0 if missing (null, NaN), or raises `ValueError`."""
    if _is_missing(value):
        return 0.0
    return _number(
        value,
        (-1, 1),
        f"column `{column}` must hold +1 (prefers chosen), -1 (prefers rejected), a number between "
        f"them, 0 (tie) or null (no label)",
    )


def as_weight(value: object, column: str) -> float:
    """Returns a weight >= 0, 1 if missing (null, NaN), or raises `ValueError`."""
    if _is_missing(value):
        return 1.0
    return _number(
        value,
        (0, sys.float_info.max),
        f"column `{column}` must hold weights: finite numbers >= 0, or null for 1",
    )


def as_margin(value: object, column: str) -> float:
    """Returns a finite reward margin, or raises `ValueError`."""
    return _number(
        value,
        (-sys.float_info.max, sys.float_info.max),
        f"column `{column}` must hold finite numbers: reward of chosen minus reward of rejected",
    )


def _is_missing(value: object) -> bool:
    return value is None or (isinstance(value, Real) and value != value)


def _within(value: Any, ends: tuple[float, float]) -> bool:  # noqa: ANN401
    """Compares without converting: an integer in JSON may be too large for a float."""
    return bool(ends[0] <= value <= ends[1])


def _number(value: object, ends: tuple[float, float], expected: str) -> float:
    if isinstance(value, bool) or not isinstance(value, Real) or not _within(value, ends):
        raise ValueError(f"{expected}; got {value!r:.60}.")
    return float(value)


def check_columns(present: Iterable[str], needed: Sequence[str], argument: str) -> None:
    """Raises `ValueError` if a data set lacks a column."""
    columns = list(present)
    for column in needed:
        if column not in columns:
            remedy = next(text for start, text in _REMEDIES if column.startswith(start))
            raise ValueError(
                f"`{argument}` must have the column `{column}`; it has {', '.join(columns)}. "
                f"{remedy}"
            )


def check_dataset(dataset: Any, columns: Sequence[str], argument: str) -> None:  # noqa: ANN401
    """Raises `ValueError` unless a data set holds pairs with preferences.

    Args:
        dataset: A `datasets.Dataset`; a stream, which shows only the columns of its first example
            (the collator checks its values); or a mapping to several. TRL judges anything else.
        columns: Required columns besides the pairs, ``pref_*`` and ``margin_*``.
        argument: Name of the argument, for messages.
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
    weights = [weight_column(c.removeprefix("pref_")) for c in columns if c.startswith("pref_")]
    for column in [*columns, *weights] if stored else []:
        for value in dataset.unique(column) if column in present else []:
            _READERS[column.partition("_")[0]](value, column)
    for column in columns if stored else []:
        objective = column.removeprefix("pref_")
        if objective != column and not (np.abs(_labels(dataset, objective)) > 0).any():
            raise ValueError(
                f"`{argument}` must label at least one pair in `{column}`; all values are 0 or "
                f"null. Leave the objective out of `weights`."
            )


_READERS = {"pref": as_label, "weight": as_weight, "margin": as_margin}


def count_pairs(
    dataset: Dataset, prepared: Dataset, objectives: Sequence[str], args: DPOConfig
) -> dict[str, dict[str, int]]:
    """Counts labels per objective, and the labels on pairs that teach nothing.

    Args:
        dataset: The pairs that the user passed.
        prepared: The same pairs after TRL tokenized them and dropped those with a long prompt.
        objectives: Names of the objectives.
        args: TRL's settings for truncation.

    Returns:
        The counts of `MultiObjectiveDPOTrainer.pair_counts`, by objective.
    """
    identical, equal = _alike(prepared, args)
    counts = {}
    for objective in objectives:
        given, kept = (_labels(x, objective) for x in (dataset, prepared))
        labels, labelled = (np.abs(x) > 0 for x in (given, kept))
        counts[objective] = {
            "pairs": len(given),
            "labels": int(labels.sum()),
            "ties": int((given == 0).sum()),
            "missing": int(np.isnan(given).sum()),
            "dropped": int(labels.sum() - labelled.sum()),
            "equal": int((labelled & equal & ~identical).sum()),
            "identical": int((labelled & identical).sum()),
        }
    return counts


def _labels(dataset: Dataset, objective: str) -> NDArray[np.float64]:
    """Returns the labels as numbers; NaN if a label is missing or its weight is 0."""
    column, weight = sign_column(objective), weight_column(objective)
    labels = np.array([math.nan if x is None else x for x in dataset[column]], dtype=np.float64)
    if weight in dataset.column_names:
        labels[[as_weight(x, weight) == 0 for x in dataset[weight]]] = math.nan
    return labels


def _alike(prepared: Dataset, args: DPOConfig) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
    """Returns which pairs have identical completions, and which are equal after truncation."""
    names = ["prompt_ids", "chosen_ids", "rejected_ids"]
    start = args.truncation_mode == "keep_start"
    kept = slice(args.max_length) if start else slice(-(args.max_length or 0), None)
    identical, equal = [], []
    for batch in prepared.select_columns(names).with_format("numpy").iter(1000):
        for prompt, chosen, rejected in zip(*(batch[name] for name in names), strict=True):
            first, second = (np.concatenate([prompt, x])[kept] for x in (chosen, rejected))
            identical.append(np.array_equal(chosen, rejected))
            equal.append(np.array_equal(first, second))
    return np.array(identical, dtype=bool), np.array(equal, dtype=bool)


def check_counts(counts: Mapping[str, Mapping[str, int]], argument: str, args: DPOConfig) -> None:
    """Raises `ValueError` if an objective has no usable label; warns if it has few."""
    for objective, count in counts.items():
        left = count["labels"] - count["dropped"]
        if not left:
            raise ValueError(
                f"`{argument}` must label at least one pair in `{sign_column(objective)}` whose "
                f"prompt is shorter than `max_length` = {args.max_length} tokens; all "
                f"{count['labels']} are longer and leave no room for the answers. Raise "
                f"`max_length`."
            )
        useful = left - count["equal"] - count["identical"]
        if 2 * useful < count["labels"]:
            warnings.warn(
                f"`{objective}` learns from {useful} of {count['labels']} labels of `{argument}`: "
                f"{count['dropped']} are dropped because the prompt has `max_length` = "
                f"{args.max_length} tokens or more, {count['equal']} pairs are equal after "
                f"truncation to `max_length`, and {count['identical']} have identical answers. "
                f"Raise `max_length` or look at the data.",
                stacklevel=2,
            )


def count_table(counts: Mapping[str, Mapping[str, int]], argument: str) -> str:
    """Returns the counts as a text table."""
    columns = ("labels", "ties", "missing", "dropped", "equal", "identical")
    rows: list[tuple[str, ...]] = [("objective", *columns)]
    rows += [(name, *(str(count[c]) for c in columns)) for name, count in counts.items()]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    pairs = next(iter(counts.values()))["pairs"]
    lines = [f"{argument}: {pairs} pairs"]
    for name, *numbers in rows:
        cells = (number.rjust(width) for number, width in zip(numbers, widths[1:], strict=True))
        lines.append("  ".join(["", name.ljust(widths[0]), *cells]))
    return "\n".join(lines)
