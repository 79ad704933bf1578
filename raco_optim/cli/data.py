"""A file with preference pairs -> a data set that was checked."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from raco_optim.cli.errors import UsageError, refusals

if TYPE_CHECKING:
    from datasets import Dataset

# Suffix -> builder of `datasets`.
FORMATS = {".jsonl": "json", ".json": "json", ".csv": "csv", ".parquet": "parquet"}

_PREFIX = "pref_"


def load_pairs(
    path: Path, option: str, objectives: Sequence[str], margins: Sequence[str]
) -> Dataset:
    """Loads a file with preference pairs and checks it before any model is loaded.

    Args:
        path: A .jsonl, .json, .csv or .parquet file with the columns ``chosen`` and ``rejected``,
            ``prompt`` if there is one, and ``pref_<objective>`` in {+1, -1, 0, null}.
        option: The option that named the file, for the messages.
        objectives: Objectives that the data must label.
        margins: Objectives that must have a column ``margin_<objective>`` (MODPO).

    Returns:
        The data set, with all of its columns.

    Raises:
        UsageError: The file cannot be read, is empty, lacks a column or an objective, or holds
            something else than preferences.

    Example:
        >>> from pathlib import Path
        >>> from raco_optim.cli.data import load_pairs
        >>> load_pairs(Path("pairs.txt"), "--data", ["helpful"], [])
        Traceback (most recent call last):
        raco_optim.cli.errors.UsageError: `--data` must be a .jsonl, .json, .csv or .parquet file; \
got pairs.txt.
    """
    from raco_optim.integrations.preference_data import as_margin, margin_column, sign_column

    dataset = _read(path, option)
    columns = dataset.column_names
    found = [name.removeprefix(_PREFIX) for name in columns if name.startswith(_PREFIX)]
    for column in ("chosen", "rejected"):
        _check_column(columns, column, path, option)
    for objective in objectives:
        if objective not in found:
            raise UsageError(
                f"`--weights` must name objectives of the data; got {objective!r}. {path} has "
                f"{', '.join(found) or 'none'} (columns {_PREFIX}<objective>)."
            )
        _check_labels(dataset, sign_column(objective), path, option)
    for column in map(margin_column, margins):
        _check_column(columns, column, path, option)
        with refusals(f"`{option}` {path}", ValueError):
            for value in dataset[column]:
                as_margin(value, column)
    _check_texts(dataset, path, option)
    return dataset


def _read(path: Path, option: str) -> Dataset:
    if path.suffix not in FORMATS:
        raise UsageError(f"`{option}` must be a .jsonl, .json, .csv or .parquet file; got {path}.")
    if not path.is_file():
        kind = "a folder" if path.is_dir() else "no such file"
        raise UsageError(f"`{option}` must be a file; got {path}, which is {kind}.")
    if not path.stat().st_size:
        raise UsageError(f"`{option}` must hold at least one pair; got {path}, which is empty.")
    from datasets import load_dataset

    try:
        dataset = load_dataset(FORMATS[path.suffix], data_files=str(path), split="train")
    except Exception as error:  # every reader has its own kinds
        cause = error.__cause__ or error
        raise UsageError(
            f"`{option}` must be a {path.suffix} file with pairs; got {path} "
            f"({' '.join(str(cause).split())})."
        ) from error
    if not len(dataset):
        raise UsageError(f"`{option}` must hold at least one pair; got {path}, which has none.")
    return dataset


def _check_column(columns: Sequence[str], column: str, path: Path, option: str) -> None:
    if column not in columns:
        raise UsageError(
            f"`{option}` must have the column {column!r}; got {path} with the columns "
            f"{', '.join(columns)}."
        )


def _check_labels(dataset: Dataset, column: str, path: Path, option: str) -> None:
    from raco_optim.integrations.preference_data import as_sign

    with refusals(f"`{option}` {path}", ValueError):
        labelled = [as_sign(value, column) for value in dataset[column]]
    if not any(labelled):
        raise UsageError(
            f"`{option}` must label at least one pair for every objective; got {path}, where "
            f"{column!r} is 0 or null throughout. Leave the objective out of `--weights`."
        )


def _check_texts(dataset: Dataset, path: Path, option: str) -> None:
    for column in ("prompt", "chosen", "rejected"):
        for row, value in enumerate(dataset[column] if column in dataset.column_names else []):
            # A text, or a conversation as TRL takes it: a list of messages.
            if not isinstance(value, str | list):
                raise UsageError(
                    f"`{option}` must hold texts or lists of messages in the column {column!r}; "
                    f"got {path} with {value!r} in row {row}."
                )
