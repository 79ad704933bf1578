"""Files -> records, one after the other: each is what its file says, and no type is guessed."""

from __future__ import annotations

import csv
import gzip
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any, NamedTuple, cast


class Record(NamedTuple):
    """One record, and where it stands in its source.

    Attributes:
        place: Such as "line 3".
        fields: Values by name.

    Example:
        >>> from raco_optim.cli.readers import Record
        >>> Record("line 3", {"prompt": "Hi"}).place
        'line 3'
    """

    place: str
    fields: dict[str, Any]


def numbered(records: Iterator[Any]) -> Iterator[Record]:
    """Gives records their numbers as places.

    Args:
        records: Records, the first of which has the number 1.

    Example:
        >>> from raco_optim.cli.readers import numbered
        >>> list(numbered(iter([{"prompt": "Hi"}])))
        [Record(place='record 1', fields={'prompt': 'Hi'})]
    """
    return (Record(f"record {number}", fields) for number, fields in enumerate(records, start=1))


def _binary(path: Path) -> IO[bytes]:
    return cast(IO[bytes], (gzip.open if path.suffix == ".gz" else open)(path, "rb"))


def _jsonl(path: Path) -> Iterator[Record]:
    with _binary(path) as file:
        for number, line in enumerate(file, start=1):
            if line.strip():
                try:
                    fields = json.loads(line)
                except ValueError as error:
                    raise ValueError(f"line {number} is not JSON ({error})") from error
                yield Record(f"line {number}", fields)


def _json(path: Path) -> Iterator[Record]:
    with _binary(path) as file:
        text = file.read()
    if not text.lstrip(b"\xef\xbb\xbf").lstrip().startswith(b"["):
        yield from _jsonl(path)  # as such files are often called .json
        return
    yield from numbered(iter(json.loads(text)))


def _csv(path: Path) -> Iterator[Record]:
    """Every cell is a text: what looks like a null, such as "NA", is an answer like others."""
    with _binary(path) as file:
        rows = csv.reader(_decoded(file), strict=True)
        names = next(rows, [])
        if len(set(names)) < len(names):
            raise ValueError(f"columns must have different names; got {', '.join(names)}")
        for number, row in enumerate(filter(None, rows), start=1):
            if len(row) != len(names):
                raise ValueError(
                    f"record {number} must have {len(names)} cells, as the first line has; got "
                    f"{len(row)}"
                )
            yield Record(f"record {number}", dict(zip(names, row, strict=True)))


def _decoded(file: IO[bytes]) -> Iterator[str]:
    """Lines with their line ends, which may be part of a cell."""
    csv.field_size_limit(sys.maxsize)  # the default, 128 KiB, is less than a long answer
    for number, line in enumerate(file):
        yield line.decode("utf-8" if number else "utf-8-sig")


def _parquet(path: Path) -> Iterator[Record]:
    import pyarrow.parquet  # type: ignore[import-untyped]

    with pyarrow.parquet.ParquetFile(path) as file:
        yield from numbered(row for batch in file.iter_batches(512) for row in batch.to_pylist())


READERS = {".jsonl": _jsonl, ".json": _json, ".csv": _csv, ".parquet": _parquet}
