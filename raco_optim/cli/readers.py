"""Reads files record by record, without guessing types."""

from __future__ import annotations

import csv
import gzip
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any, NamedTuple, cast


class Record(NamedTuple):
    """The fields of a record, and its place in the source, such as "line 3"."""

    place: str
    fields: dict[str, Any]


def numbered(records: Iterator[Any]) -> Iterator[Record]:
    """Yields records with places: "record 1", "record 2", ..."""
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
        yield from _jsonl(path)  # JSONL files are often called .json
        return
    yield from numbered(iter(json.loads(text)))


def _csv(path: Path) -> Iterator[Record]:
    """Reads every cell as text: a cell such as "NA" may be an answer."""
    with _binary(path) as file:
        rows = csv.reader(_decoded(file), strict=True)
        names = next(rows, [])
        if len(set(names)) < len(names):
            raise ValueError(f"columns must have different names; got {', '.join(names)}")
        for number, row in enumerate(filter(None, rows), start=1):
            if len(row) != len(names):
                raise ValueError(
                    f"record {number} must have {len(names)} cells like the first line; got "
                    f"{len(row)}"
                )
            yield Record(f"record {number}", dict(zip(names, row, strict=True)))


def _decoded(file: IO[bytes]) -> Iterator[str]:
    """Yields lines with their line ends, which may be part of a cell."""
    csv.field_size_limit(sys.maxsize)  # the default, 128 KiB, is too small for a long answer
    for number, line in enumerate(file):
        yield line.decode("utf-8" if number else "utf-8-sig")


def _parquet(path: Path) -> Iterator[Record]:
    import pyarrow.parquet  # type: ignore[import-untyped]

    with pyarrow.parquet.ParquetFile(path) as file:
        yield from numbered(row for batch in file.iter_batches(512) for row in batch.to_pylist())


READERS = {".jsonl": _jsonl, ".json": _json, ".csv": _csv, ".parquet": _parquet}
