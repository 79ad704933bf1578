"""Columns of preference pairs: those that training reads, checked value by value."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from raco_optim.cli.errors import UsageError, one_line
from raco_optim.cli.layouts.conversations import Messages, decoded
from raco_optim.cli.layouts.known import layout_of
from raco_optim.cli.readers import Record
from raco_optim.cli.sources import Source

if TYPE_CHECKING:
    from datasets import Features

_TEXTS = ("prompt", "chosen", "rejected")
# What TRL hands to the chat template, or refuses.
_FOR_TEMPLATES = ("tools", "chat_template_kwargs", "image", "images")
_PREFIX = "pref_"


def row_of(record: Record, source: Source, columns: Sequence[str]) -> dict[str, Any]:
    """Returns the row of the data set that a record is.

    Args:
        record: A record.
        source: Where it is from.
        columns: Those that are read.

    Raises:
        ValueError: A text is neither a text nor messages, or tools are not JSON.

    Example:
        >>> from raco_optim.cli.columns import row_of
        >>> from raco_optim.cli.readers import Record
        >>> from raco_optim.cli.sources import Source
        >>> csv = Source("a.csv", "--data", lambda: iter([]), lambda: "", texts_only=True)
        >>> cells = {"chosen": "NA", "pref_a": "", "id": "7"}
        >>> row_of(Record("record 1", cells), csv, ["chosen", "pref_a"])
        {'chosen': 'NA', 'pref_a': None}
    """
    row: dict[str, Any] = {}
    for column in columns:
        value = record.fields.get(column)
        if column in _TEXTS:
            value = None if value is None else decoded(value)
        elif column == "tools" and isinstance(value, str):
            value = _tools(value)
        elif source.texts_only and column not in _FOR_TEMPLATES:
            value = _number(value)
        row[column] = value
    return row


def _tools(text: str) -> str | None:
    """The text, which TRL parses when it prepares the data; an empty cell is null."""
    try:
        if text:
            json.loads(text)
    except ValueError as error:
        raise ValueError(
            f"column `tools` must hold a list of tools, as JSON where it is a text; got "
            f"{text!r:.60} ({error}). Put null where there are none, or leave the column out"
        ) from error
    return text or None


def _number(cell: str | None) -> float | str | None:
    """A cell of a CSV file; an empty one is null."""
    try:
        return float(cell) if cell else None
    except ValueError:
        return cell


class Columns:
    """The columns of all sources: which there are, and whether each value is right.

    Args:
        objectives: Objectives that the data must label.
        margins: Objectives that must have a column ``margin_<objective>``.

    Example:
        >>> from raco_optim.cli.columns import Columns
        >>> from raco_optim.cli.readers import numbered
        >>> from raco_optim.cli.sources import Source
        >>> rows = [{"chosen": "a", "rejected": "b", "pref_x": 1, "id": 7}]
        >>> columns = Columns(["x"], [])
        >>> columns.read(Source("a.jsonl", "--data", lambda: numbered(iter(rows)), lambda: ""))
        1
        >>> columns.names
        ['chosen', 'rejected', 'pref_x']
    """

    def __init__(self, objectives: Sequence[str], margins: Sequence[str]) -> None:
        from raco_optim.integrations import preference_data as known

        self._labels = {known.sign_column(name): name for name in objectives}
        self._readers = {
            **dict.fromkeys(self._labels, known.as_label),
            **dict.fromkeys(map(known.weight_column, objectives), known.as_weight),
            **dict.fromkeys(map(known.margin_column, margins), known.as_margin),
        }
        self._needed = ("chosen", "rejected", *map(known.margin_column, margins))
        self._present: dict[str, None] = {}  # columns of any record, in order
        self._labelled = dict.fromkeys(self._labels, 0)
        self._first: tuple[str, bool, bool] | None = None  # where, with a prompt, messages
        self._repeats_prompt = True
        self._types = _Types()

    @property
    def names(self) -> list[str]:
        """Those that training reads."""
        known = (*_TEXTS, *_FOR_TEMPLATES, *self._readers)
        return [column for column in known if column in self._present]

    def read(self, source: Source) -> int:
        """Reads and checks the records of a source.

        Args:
            source: Where they are.

        Returns:
            How many there are.

        Raises:
            UsageError: One of them is not right, or there is none.
        """
        count, self._hint = 0, ""
        for count, record in enumerate(source.records(), start=1):
            self._present.update(dict.fromkeys(record.fields))
            if count == 1:
                self._hint = _hint(record)
            for column in self._needed:
                if column not in record.fields:
                    raise UsageError(
                        f"`{source.option}` must have the column {column!r}; got {source.name} "
                        f"with the columns {', '.join(record.fields)}.{self._hint}"
                    )
            try:
                self._add(row_of(record, source, self.names), f"{source.name}, {record.place}")
            except (ValueError, OverflowError) as error:
                raise source.refusal(error, record.place) from error
        if not count:
            raise UsageError(
                f"`{source.option}` must hold at least one pair; got {source.name}, which has none."
            )
        return count

    def _add(self, row: dict[str, Any], where: str) -> None:
        texts = {name: row[name] for name in _TEXTS if row.get(name) is not None}
        for name in ("chosen", "rejected"):
            if name not in texts:
                raise ValueError(f"column `{name}` must hold a text or messages; got null")
        is_messages = {name: isinstance(value, list) for name, value in texts.items()}
        self._first = self._first or (where, "prompt" in texts, is_messages["chosen"])
        start, with_prompt, messages = self._first
        if ("prompt" in texts) != with_prompt:
            raise ValueError(
                f"all pairs must have a prompt, or none; here it is "
                f"{'null' if with_prompt else 'given'}, unlike in {start}"
            )
        for name, found in is_messages.items():
            if found != messages:
                kinds = ("a text", "a list of messages")
                raise ValueError(
                    f"texts and messages must not be mixed: `{name}` is {kinds[found]} here, and "
                    f"`chosen` is {kinds[messages]} in {start}. `raco-optim data` makes them alike"
                )
        self._check_prompt(texts)
        for name, value in row.items():
            if name in self._readers:
                read = self._readers[name](value, name)
                if name in self._labelled:
                    self._labelled[name] += bool(read)
            elif messages or name in _FOR_TEMPLATES:
                self._types.add(name, value)

    def _check_prompt(self, texts: dict[str, str | Messages]) -> None:
        prompt, chosen, rejected = texts.get("prompt"), texts["chosen"], texts["rejected"]
        if not isinstance(chosen, str):
            if prompt is None and chosen[0] != rejected[0]:
                raise ValueError(
                    "`chosen` and `rejected` must begin with the same message: the prompt"
                )
            if prompt is not None and chosen[: len(prompt)] == prompt:
                raise ValueError("`chosen` repeats the prompt: leave out one of them")
        elif not (prompt and all(str(x).startswith(str(prompt)) for x in (chosen, rejected))):
            self._repeats_prompt = False

    def check(self, sources: Sequence[Source]) -> None:
        """Checks what all records have in common.

        Args:
            sources: Those that were read.

        Raises:
            UsageError: An objective is missing or labels no pair, or all pairs repeat their prompt.
        """
        option, names = sources[0].option, ", ".join(source.name for source in sources)
        for column, objective in self._labels.items():
            if column not in self._present:
                found = [x.removeprefix(_PREFIX) for x in self._present if x.startswith(_PREFIX)]
                raise UsageError(
                    f"`--weights` must name objectives of the data; got {objective!r}. {names} has "
                    f"{', '.join(found) or 'none'} (columns {_PREFIX}<objective>)."
                    f"{'' if found else self._hint}"
                )
            if not self._labelled[column]:
                raise UsageError(
                    f"`{option}` must label at least one pair for every objective; got {names}, "
                    f"where {column!r} is 0 or null throughout. Leave the objective out of "
                    f"`--weights`."
                )
        if self._first and not self._first[2] and self._repeats_prompt:
            raise UsageError(
                f"`{option}` must not have the prompt twice; got {names}, where all of `chosen` "
                f"and `rejected` begin with it. Leave out the column `prompt`, or run `raco-optim "
                f"data` first."
            )

    def features(self) -> Features:
        """Returns the types of the columns.

        Raises:
            ValueError: The values of a column have none in common.
        """
        from datasets import Features, Value

        found = self._types.features()
        plain = {
            name: Value("float64" if name in self._readers else "string") for name in self.names
        }
        return Features({**plain, **found})


def _hint(record: Record) -> str:
    try:
        return f" It looks like {layout_of(record.fields)}: run `raco-optim data` first."
    except ValueError:
        return ""


class _Types:
    """Types of values that have parts, from all values: some parts come late, or are null first."""

    _MANY = 1000

    def __init__(self) -> None:
        self._values: dict[str, list[Any]] = {}
        self._schemas: dict[str, Any] = {}

    def add(self, name: str, value: object) -> None:
        values = self._values.setdefault(name, [])
        values.append(value)
        if len(values) == self._MANY:
            self._unify(name)

    def _unify(self, name: str) -> None:
        import pyarrow  # type: ignore[import-untyped]

        known = self._schemas.get(name)
        try:
            found = pyarrow.schema([(name, pyarrow.array(self._values[name]).type)])
            if known is not None and known != found:
                found = pyarrow.unify_schemas([known, found], promote_options="permissive")
        except (ValueError, TypeError, OverflowError) as error:
            raise ValueError(
                f"column `{name}` must hold values of one type ({one_line(error)})"
            ) from error
        self._schemas[name] = found
        self._values[name].clear()

    def features(self) -> Features:
        from datasets import Features

        for name in self._values:
            self._unify(name)
        merged: dict[str, Any] = {}
        for schema in self._schemas.values():
            merged.update(Features.from_arrow_schema(schema))
        return Features(merged)
