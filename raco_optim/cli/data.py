"""`raco-optim data`; and what `--data` of other commands names -> a data set that was checked."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from raco_optim.cli.columns import Columns, row_of
from raco_optim.cli.convert import main
from raco_optim.cli.environment import version_of
from raco_optim.cli.errors import refusals
from raco_optim.cli.processes import tell
from raco_optim.cli.sources import Source, fingerprint, open_sources

if TYPE_CHECKING:
    from datasets import Dataset

__all__ = ["content_hash", "load_pairs", "main"]


def load_pairs(
    names: str | Path | Sequence[str],
    option: str,
    objectives: Sequence[str],
    margins: Sequence[str],
) -> Dataset:
    """Loads preference pairs and checks all of them before any model is loaded.

    Args:
        names: Files, folders or data sets on the hub, as `open_sources` takes them, with the
            columns ``chosen`` and ``rejected``, ``prompt`` if there is one, and
            ``pref_<objective>`` with numbers in [-1, 1] or null.
        option: The option that named them, for the messages.
        objectives: Objectives that the data must label.
        margins: Objectives that must have a column ``margin_<objective>`` (MODPO).

    Returns:
        The data set, with the columns that training reads: where several sources have different
        ones, a value that is missing is null. Of a mixture, as many pairs as the shares allow
        without taking one twice.

    Raises:
        UsageError: A source cannot be read, is empty, lacks a column or an objective, or holds
            something else than pairs and preferences.

    Example:
        >>> from raco_optim.cli.data import load_pairs
        >>> load_pairs("pairs.txt", "--data", ["helpful"], [])
        Traceback (most recent call last):
        raco_optim.cli.errors.UsageError: `--data` must be a .jsonl, .json, .csv or .parquet file; \
got pairs.txt.
    """
    import datasets

    names = _as_list(names)
    sources = open_sources(names, option)
    columns = Columns(objectives, margins)
    counts = [columns.read(source) for source in sources]
    columns.check(sources)
    taken = _taken(sources, counts)
    if len(sources) > 1:
        parts = zip(sources, taken, counts, strict=True)
        tell(f"{option}: " + ", ".join(f"{k} of {n} pairs of {x.name}" for x, k, n in parts))
    with refusals(f"`{option}` {' '.join(names)}"):
        return datasets.Dataset.from_generator(
            _rows,
            features=columns.features(),
            gen_kwargs={
                "names": tuple(names),
                "columns": tuple(columns.names),
                "taken": tuple(zip(taken, counts, strict=True)),
                # What is stored is found again by these; it must not be that of an older file.
                "stamp": (fingerprint(sources), version_of("raco_optim")),
            },
        )


def content_hash(names: str | Path | Sequence[str], option: str) -> str:
    """Returns a hash of what `load_pairs` reads; of one file, the SHA-256 of its bytes.

    Args:
        names: As for `load_pairs`.
        option: The option that named them, for the messages.

    Raises:
        UsageError: A source cannot be read.

    Example:
        >>> import pathlib, tempfile
        >>> from raco_optim.cli.data import content_hash
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     _ = (path := pathlib.Path(folder, "a.jsonl")).write_text("{}")
        ...     content_hash(path, "--data")[:8]
        '44136fa3'
    """
    return fingerprint(open_sources(_as_list(names), option))


def _as_list(names: str | Path | Sequence[str]) -> list[str]:
    return [str(names)] if isinstance(names, str | Path) else list(names)


def _taken(sources: Sequence[Source], counts: Sequence[int]) -> list[int]:
    """How many pairs of each source there are in the largest mixture without repeats."""
    shares = [source.share for source in sources]
    if None in shares:
        return list(counts)
    total = min(n / share for n, share in zip(counts, shares, strict=True) if share)
    return [max(1, round(total * share)) for share in shares if share]


def _rows(
    names: tuple[str, ...],
    columns: tuple[str, ...],
    taken: tuple[tuple[int, int], ...],
    stamp: object,
) -> Iterator[dict[str, Any]]:
    """Rows of the data set; always the same ones of a mixture."""
    del stamp
    for source, (some, count) in zip(open_sources(names, "--data"), taken, strict=True):
        chosen = set(random.Random(0).sample(range(count), some))
        for i, record in enumerate(source.records()):
            if i in chosen:
                yield row_of(record, source, columns)
