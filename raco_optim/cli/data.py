"""Preference pairs that `--data` names, as a checked data set; and `raco-optim data`."""

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
    """Loads preference pairs and checks all of them.

    Args:
        names: Files, folders or data sets on the hub; see `open_sources`.
        option: The option that named them, for messages.
        objectives: Objectives that the data must label.
        margins: Objectives that must have a column ``margin_<objective>`` (MODPO).

    Returns:
        The columns that training reads; null if a source lacks one. A mixture has as many pairs as
        its shares allow without repeats.
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
                # datasets caches by these arguments; a changed file must not hit the cache.
                "stamp": (fingerprint(sources), version_of("raco_optim")),
            },
        )


def content_hash(names: str | Path | Sequence[str], option: str) -> str:
    """Returns a hash of the data that `load_pairs` reads; for one file its SHA-256."""
    return fingerprint(open_sources(_as_list(names), option))


def _as_list(names: str | Path | Sequence[str]) -> list[str]:
    return [str(names)] if isinstance(names, str | Path) else list(names)


def _taken(sources: Sequence[Source], counts: Sequence[int]) -> list[int]:
    """Returns the pairs per source in the largest mixture without repeats."""
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
    """Yields the rows of the data set; a mixture always has the same ones."""
    del stamp
    for source, (some, count) in zip(open_sources(names, "--data"), taken, strict=True):
        chosen = set(random.Random(0).sample(range(count), some))
        for i, record in enumerate(source.records()):
            if i in chosen:
                yield row_of(record, source, columns)
