"""Reads files, folders and data sets on the hub as records, one at a time."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from raco_optim.cli.environment import ask_hub
from raco_optim.cli.errors import UsageError, one_line, refusals
from raco_optim.cli.files import sha256
from raco_optim.cli.readers import READERS, Record, numbered

if TYPE_CHECKING:
    from datasets import Dataset

FORMATS = ".jsonl, .json, .csv or .parquet"

_HUB_NAME = re.compile(r"[\w-][\w.-]*(/[\w-][\w.-]*)+(:[\w+%\[\]:-]+)?")
_HELD_OUT = re.compile(
    r"(?<![a-z])(test|val|valid|validation|dev|eval|evaluation|held_?out)(?![a-z])"
)


@dataclass(frozen=True)
class Source:
    """A file or data set.

    Attributes:
        name: The user's name for it, or its path in a named folder.
        option: The option that named it, for messages.
        open: Starts reading.
        digest: Returns a hash of the content.
        texts_only: Whether every value is a text, as in a CSV file.
        share: Its share of a mixture; None to use all of it.
    """

    name: str
    option: str
    open: Callable[[], Iterator[tuple[str, Any]]]
    digest: Callable[[], str]
    texts_only: bool = False
    share: float | None = None

    def records(self) -> Iterator[Record]:
        """Reads the records; raises `UsageError` if that fails or one is not a mapping."""
        try:
            for place, fields in self.open():
                if not isinstance(fields, dict):
                    error = ValueError(f"a record must have names and values; got {fields!r:.60}")
                    raise self.refusal(error, place)
                yield Record(place, fields)
        except (UsageError, ImportError):
            raise
        except RecursionError as error:
            raise self.refusal(ValueError("a record is nested too deeply")) from error
        except Exception as error:  # the readers raise many kinds
            raise self.refusal(error) from error

    def refusal(self, error: Exception, place: str = "") -> UsageError:
        """Returns the `UsageError` for a bad source, or for the record at `place`."""
        where = f", {place}" if place else ""
        return UsageError(f"`{self.option}` can't be used: {self.name}{where}: {one_line(error)}")


def open_sources(names: Sequence[str], option: str) -> list[Source]:
    """Resolves names to files, folders of files, or data sets on the hub.

    Args:
        names: Paths, or ``owner/name``, ``owner/name:split`` or ``owner/name/folder:split`` on the
            hub. With ``=0.3`` after each name they are shares of a mixture.
        option: The option that named them, for messages.

    Returns:
        One source per file or data set, in the order of the names; the files of a folder sorted.
    """
    with refusals(f"`{option}` {' '.join(names)}", OSError):
        shares = [_share(name, option) for name in names]
        found = [
            Source(x.name, option, x.open, x.digest, x.texts_only, share)
            for name, share in shares
            for x in _named(name, option)
        ]
    given = [share for _, share in shares if share is not None]
    if given and (len(given) < len(shares) or abs(sum(given) - 1) > 1e-6):
        raise UsageError(
            f"`{option}` must have a share after every name, and the shares must sum to 1; got "
            f"{' '.join(names)}."
        )
    if given and len(found) > len(shares):
        raise UsageError(f"`{option}` with shares must be files, not folders of files.")
    return found


def fingerprint(sources: Sequence[Source]) -> str:
    """Returns a hash of the contents of sources; for one file its SHA-256."""
    parts = []
    for source in sources:
        try:
            parts.append((source.share, source.digest()))
        except OSError as error:
            raise source.refusal(error) from error
    if len(parts) == 1:
        return parts[0][1]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


def _share(name: str, option: str) -> tuple[str, float | None]:
    path, equals, number = name.rpartition("=")
    if not equals or Path(name).exists():
        return name, None
    try:
        share = float(number)
    except ValueError:
        return name, None
    if not 0 < share <= 1:
        raise UsageError(f"`{option}` must have shares above 0 that sum to 1; got {name}.")
    return path, share


def _named(name: str, option: str) -> list[Source]:
    path = Path(name)
    if path.is_file():
        return [_file(path, option)]
    if path.is_dir():
        return _folder(path, option)
    if _suffix(path) in READERS or path.is_absolute() or not _HUB_NAME.fullmatch(name):
        if _suffix(path) in READERS or "." not in path.name:
            raise UsageError(f"`{option}` must be a file; got {name}, which does not exist.")
        raise UsageError(f"`{option}` must be a {FORMATS} file; got {name}.")
    return [_on_the_hub(name, option)]


def _file(path: Path, option: str) -> Source:
    suffix = _suffix(path)
    if suffix not in READERS:
        raise UsageError(f"`{option}` must be a {FORMATS} file; got {path}.")
    if not path.stat().st_size:
        raise UsageError(f"`{option}` must hold at least one record; got {path}, which is empty.")
    read = READERS[suffix]
    return Source(
        str(path), option, lambda: read(path), lambda: sha256(path), texts_only=suffix == ".csv"
    )


def _suffix(path: Path) -> str:
    return Path(path.stem).suffix if path.suffix == ".gz" else path.suffix


def _folder(folder: Path, option: str) -> list[Source]:
    if (folder / "dataset_dict.json").is_file():
        raise UsageError(
            f"`{option}` must be one split; got {folder}, which has several. Name one of its "
            f"folders."
        )
    if (folder / "dataset_info.json").is_file() and (folder / "state.json").is_file():

        def load() -> Dataset:
            import datasets

            return datasets.load_from_disk(str(folder))

        return [_stored(str(folder), option, load)]
    files = sorted(
        path
        for path in folder.rglob("*")
        if _suffix(path) in READERS
        and path.is_file()
        and not any(part.startswith(".") for part in path.relative_to(folder).parts)
    )
    if not files:
        raise UsageError(
            f"`{option}` must hold data; got the folder {folder} without a {FORMATS} file."
        )
    held_out = [x for x in files if _HELD_OUT.search(str(x.relative_to(folder)).lower())]
    if 0 < len(held_out) < len(files):
        raise UsageError(
            f"`{option}` must not mix training data with held-out data; got the folder {folder}, "
            f"which has {held_out[0].relative_to(folder)} among others. Name the files."
        )
    return [_file(path, option) for path in files]


def _on_the_hub(name: str, option: str) -> Source:
    path, _, split = name.partition(":")
    owner, name_there, *rest = path.split("/", 2)

    def load() -> Dataset:
        import datasets

        repository = f"{owner}/{name_there}"
        folder = rest[0] if rest else None
        try:
            ask_hub(repository, "dataset")
            return datasets.load_dataset(repository, data_dir=folder, split=split or "train")
        except Exception as error:  # no network, no such name, no such split, a gated set
            raise UsageError(
                f"`{option}` must be a file, a folder or a data set on the hub; got {name}, which "
                f"is neither a file nor a folder, and the hub failed ({one_line(error)})."
            ) from error

    return _stored(name, option, load)


def _stored(name: str, option: str, load: Callable[[], Dataset]) -> Source:
    def read() -> Iterator[Record]:
        return numbered(iter(load()))

    def digest() -> str:
        total = hashlib.sha256()
        for _, fields in read():
            total.update(json.dumps(fields, sort_keys=True, default=str).encode())
        return total.hexdigest()

    return Source(name, option, read, digest)
