"""Columns of preference pairs that training reads, checked value by value."""

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
# Columns that TRL passes to the chat template, or refuses.
_FOR_TEMPLATES = ("tools", "chat_template_kwargs", "image", "images")
_PREFIX = "pref_"


def row_of(record: Record, source: Source, columns: Sequence[str]) -> dict[str, Any]:
    """Returns the given columns of a record, decoded; raises `ValueError` for a bad text."""
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
    """Checks that tools are JSON, which TRL parses later; an empty cell is null."""
    try:
        if text:
            json.loads(text)
    except ValueError as error:
        raise ValueError(
            f"column `tools` must hold a list of tools, or JSON text of one; got {text!r:.60} "
            f"({error}). Use null for no tools, or leave the column out"
        ) from error
    return text or None


def _number(cell: str | None) -> float | str | None:
    """Returns a CSV cell as a number if it is one; an empty cell is null."""
    try:
        return float(cell) if cell else None
    except ValueError:
        return cell


class Columns:
    """Reads all sources, checks every value, and learns which columns there are."""

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
        self._first: tuple[str, bool, bool] | None = None  # place, has a prompt, is messages
        self._repeats_prompt = True
        self._types = _Types()

    @property
    def names(self) -> list[str]:
        """The columns that training reads."""
        known = (*_TEXTS, *_FOR_TEMPLATES, *self._readers)
        return [column for column in known if column in self._present]

    def read(self, source: Source) -> int:
        """Reads and checks the records of a source; returns how many there are."""
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
                f"`{source.option}` must hold at least one pair; got {source.name}, which is empty."
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
                f"either all pairs or none must have a prompt; here it is "
                f"{'null' if with_prompt else 'given'}, unlike in {start}"
            )
        for name, found in is_messages.items():
            if found != messages:
                kinds = ("a text", "a list of messages")
                raise ValueError(
                    f"texts and messages must not be mixed: `{name}` is {kinds[found]} here, and "
                    f"`chosen` is {kinds[messages]} in {start}. Convert with `raco-optim data`"
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
                raise ValueError("`chosen` must not repeat the prompt. Leave out one of them")
        elif not (prompt and all(str(x).startswith(str(prompt)) for x in (chosen, rejected))):
            self._repeats_prompt = False

    def check(self, sources: Sequence[Source]) -> None:
        """Raises `UsageError` if an objective has no column or label, or prompts are repeated."""
        option, names = sources[0].option, ", ".join(source.name for source in sources)
        for column, objective in self._labels.items():
            if column not in self._present:
                found = [x.removeprefix(_PREFIX) for x in self._present if x.startswith(_PREFIX)]
                raise UsageError(
                    f"`--weights` must name objectives of the data; got {objective!r}. {names} has "
                    f"{', '.join(found) or 'none'} (from columns {_PREFIX}<objective>)."
                    f"{'' if found else self._hint}"
                )
            if not self._labelled[column]:
                raise UsageError(
                    f"`{option}` must label at least one pair for every objective; got {names}, "
                    f"where {column!r} is always 0 or null. Leave the objective out of `--weights`."
                )
        if self._first and not self._first[2] and self._repeats_prompt:
            raise UsageError(
                f"`{option}` must not repeat the prompt; got {names}, where every `chosen` and "
                f"`rejected` begins with it. Leave out the column `prompt`, or run `raco-optim "
                f"data` first."
            )

    def features(self) -> Features:
        """Returns the types of the columns."""
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
    """Types of nested values, from all records: parts may be missing or null in the first ones."""

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
