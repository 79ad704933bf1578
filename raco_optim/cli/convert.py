"""`raco-optim data`: converts data sets to pairs with a label for each objective."""

from __future__ import annotations

import argparse
import contextlib
import gzip
import io
import json
import os
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

from raco_optim.cli.errors import OneLineErrors, UsageError
from raco_optim.cli.files import check_writable
from raco_optim.cli.layouts.conversations import as_text
from raco_optim.cli.layouts.known import LAYOUTS, Layout, check_fields, layout_of, of_rules
from raco_optim.cli.layouts.pairs import Label, Pair
from raco_optim.cli.layouts.rules_file import SUFFIXES, load_rules
from raco_optim.cli.layouts.values import Fields
from raco_optim.cli.sources import FORMATS, Source, open_sources
from raco_optim.cli.tables import Table


@dataclass
class Summary:
    """Counts of a conversion.

    Attributes:
        records: Records that were read.
        pairs: Pairs that were written.
        left_out: Reason -> number of records or pairs that were left out.
        labels: Objective -> pairs that prefer the first answer, the second, or neither.
    """

    records: int = 0
    pairs: int = 0
    left_out: Counter[str] = field(default_factory=Counter)
    labels: dict[str, Counter[str]] = field(default_factory=dict)

    def count(self, labels: dict[str, Label]) -> None:
        """Counts a pair with its labels."""
        self.pairs += 1
        for name, label in labels.items():
            strength = label.strength
            side = "first" if strength and strength > 0 else "second" if strength else "tie"
            self.labels.setdefault(name, Counter())["" if strength is None else side] += 1

    def text(self) -> str:
        """Returns the summary as text."""
        lines = [f"records: {self.records}, pairs: {self.pairs}"]
        if self.labels:
            rows = []
            for name, found in self.labels.items():
                known = [found["first"], found["second"], found["tie"]]
                rows.append([name, *map(str, (*known, self.pairs - sum(known)))])
            header = ["objective", "first better", "second better", "tie", "no label"]
            lines = [Table(lines[0], header, rows).text()]
        lines += [f"left out: {what}: {number}" for what, number in self.left_out.items()]
        return "\n".join(lines)


def main(arguments: Sequence[str]) -> int:
    """Runs `raco-optim data`."""
    options = _parser().parse_args(arguments)
    output = options.output
    if not output.name.endswith((".jsonl", ".jsonl.gz")):
        raise UsageError(f"`--output` must be a .jsonl or .jsonl.gz file; got {output}.")
    if output.exists() and not options.overwrite:
        raise UsageError(f"`--output` {output} already exists. Add --overwrite to replace it.")
    layout = None if options.layout is None else _layout(options.layout)
    if options.strength and layout and not layout[1].scaled:
        raise UsageError(f"`--strength` needs `largest` for every score in {layout[0]}.")
    sources = open_sources(options.data, "data")
    if any(source.share is not None for source in sources):
        raise UsageError(
            "`data` must be names without shares. Mix files with `raco-optim align --data`."
        )
    check_writable(output, "--output")
    summary = Summary()
    with _written(output) as file:
        for source in sources:
            for pair in pairs_of(source, layout, options.objective, summary):
                labels = _labels(pair, options.strength)
                if not any(label.strength for label in pair.labels.values()):
                    summary.left_out["pairs without a preference"] += 1
                    continue
                row = {**_texts(pair, source, as_messages=options.format == "messages"), **labels}
                file.write(json.dumps(row, ensure_ascii=False) + "\n")
                summary.count(pair.labels)
        if not summary.pairs:
            raise UsageError(f"`data` must make at least one pair: {'; '.join(_lines(summary))}.")
    sys.stdout.write(f"{output}\n{summary.text()}\n")
    return 0


def pairs_of(
    source: Source, layout: tuple[str, Layout] | None, objective: str | None, summary: Summary
) -> Iterator[Pair]:
    """Reads the pairs of one source.

    Args:
        source: The records.
        layout: The layout and its name; None to recognise it by the first record.
        objective: Name for the objective of a layout that does not name it.
        summary: Counts records and pairs.
    """
    place = ""

    def checked() -> Iterator[Fields]:
        nonlocal place
        for record in source.records():
            place = record.place
            check_fields(name, known, record.fields)
            summary.records += 1
            yield record.fields
        place = ""  # from here on, errors concern several records

    try:
        first = next(source.records(), None)
        if first is None:
            raise ValueError("it has no record")
        place = first.place
        if layout is None:
            found = layout_of(first.fields)
            name, known = found, LAYOUTS[found]
            sys.stderr.write(f"{source.name}: read as {name}\n")
        else:
            name, known = layout
        for pair in known.read(checked(), summary.left_out):
            if "" in pair.labels:
                label = pair.labels.pop("")
                pair.labels[objective or _objective(source.name)] = label
            elif objective:
                raise ValueError(f"the layout {name} names its objectives. Leave out `--objective`")
            yield pair
    except UsageError:
        raise
    except ValueError as error:
        raise source.refusal(error, place) from error


def _parser() -> argparse.ArgumentParser:
    parser = OneLineErrors(
        prog="raco-optim data",
        description="Converts a data set to preference pairs with a label for each objective.",
    )
    add = parser.add_argument
    add("data", nargs="+", help=f"{FORMATS} files (the first three also .gz), folders or hub names")
    add("--output", type=Path, required=True, help="the .jsonl or .jsonl.gz file to write")
    add(
        "--layout",
        help=f"{', '.join(LAYOUTS)}, or a .yaml or .json file with rules (default: recognise it by "
        "the fields of the first record)",
    )
    add("--objective", help="name of the objective, for data such as hh-rlhf without a name")
    add(
        "--strength",
        choices=("soft", "weight"),
        help="keep the strength of a preference: in a soft label, or as the weight of the pair",
    )
    add(
        "--format",
        choices=("messages", "text"),
        default="messages",
        help="messages for a chat template (default), or text with Human: and Assistant:",
    )
    add("--overwrite", action="store_true", help="replace an existing output file")
    return parser


def _layout(name: str) -> tuple[str, Layout]:
    if name in LAYOUTS:
        return name, LAYOUTS[name]
    if name.endswith(SUFFIXES):
        return name, of_rules(load_rules(Path(name), "--layout"))
    raise UsageError(
        f"`--layout` must be one of {', '.join(LAYOUTS)}, or a {' or '.join(SUFFIXES)} file with "
        f"rules; got {name}."
    )


def _objective(source: str) -> str:
    """Returns the objective that a path of HH-RLHF names: helpful-base, harmless-base, ..."""
    for part in reversed(Path(source.lower()).parts):
        found = [name for name in ("helpful", "harmless") if name in part]
        if len(found) == 1:
            return found[0]
    raise ValueError(
        "the data do not name their objective. Name it with `--objective`, or use a path with the "
        "name, such as harmless-base/train.jsonl.gz of hh-rlhf"
    )


def _labels(pair: Pair, strength: str | None) -> dict[str, float | None]:
    """Returns the columns of labels and, if a pair has any, of weights."""
    columns: dict[str, float | None] = {}
    for name, (value, given, weight) in pair.labels.items():
        keeps = not value or given or strength == "soft"
        columns[f"pref_{name}"] = value or (None if value is None else 0)
        if value and not keeps:
            columns[f"pref_{name}"] = 1 if value > 0 else -1
            if strength == "weight":
                weight = abs(value) * (1.0 if weight is None else weight)
        if weight is not None:
            columns[f"weight_{name}"] = weight
    return columns


def _texts(pair: Pair, source: Source, *, as_messages: bool) -> dict[str, Any]:
    if as_messages:
        return {"prompt": pair.prompt, "chosen": pair.first, "rejected": pair.second}
    try:
        prompt, first, second = (as_text(part) for part in pair[:3])
    except ValueError as error:
        raise source.refusal(error) from error
    start = "\n\nAssistant:"
    return {
        "prompt": prompt + start,
        "chosen": first.removeprefix(start),
        "rejected": second.removeprefix(start),
    }


def _lines(summary: Summary) -> list[str]:
    return [line.strip() for line in summary.text().splitlines()]


@contextlib.contextmanager
def _written(path: Path) -> Iterator[IO[str]]:
    """Opens a file that appears only when it is complete."""
    path = path.resolve()
    temporary = path.with_name(f".{path.name}.part")
    try:
        with open(temporary, "wb") as raw:
            packed = gzip.GzipFile("", "wb", fileobj=raw, mtime=0) if path.suffix == ".gz" else raw
            file = io.TextIOWrapper(packed, encoding="utf-8", newline="\n")
            yield file
            file.flush()
            if packed is not raw:
                packed.close()
            raw.flush()
            os.fsync(raw.fileno())
        os.replace(temporary, path)
    except OSError as error:
        raise UsageError(f"`--output` {path} can't be written ({error.strerror}).") from error
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
