"""`raco-optim report`: tables in the terminal and one HTML page from the results of a grid."""

from __future__ import annotations

import math
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

from raco_optim.cli import figures, page, tables
from raco_optim.cli.cells import Record, cell_of, finite, objectives_of
from raco_optim.cli.errors import OneLineErrors, UsageError
from raco_optim.cli.files import write_atomically
from raco_optim.cli.grid import Point
from raco_optim.cli.records import is_number, point_key, read_records
from raco_optim.cli.statistics import indistinguishable
from raco_optim.cli.tables import METRICS

BASELINE = "linear"


def main(arguments: Sequence[str]) -> int:
    """Runs `raco-optim report`."""
    parser = OneLineErrors(
        prog="raco-optim report",
        description="Makes tables, plots and an HTML page from the results of a sweep.",
    )
    parser.add_argument(
        "files", nargs="+", type=Path, help="JSONL files that `raco-optim sweep` wrote"
    )
    parser.add_argument("--output", type=Path, required=True, help="the HTML page to write")
    options = parser.parse_args(arguments)
    import matplotlib  # noqa: F401  # fail now, not after the tables

    page.check_page(options.output, "--output")
    text, html = report(checked_records(options.files))
    sys.stdout.write(text)
    write_atomically(options.output, html)
    sys.stdout.write(f"\n{options.output}\n")
    return 0


def checked_records(paths: Sequence[Path]) -> list[Record]:
    """Reads files; raises `UsageError` unless all records can be compared."""
    found: list[Record] = []
    seen: dict[str, Path] = {}
    for path in paths:
        records = read_records(path)
        if not records:
            raise UsageError(f"{path} is empty. Run `raco-optim sweep` first.")
        for record in records:
            _check_values(path, record)
            expected = (found or records)[0]
            _check_alike(paths[0], expected, path, record)
            key = point_key(record["point"])
            if key in seen:
                label = Point(**record["point"]).label
                raise UsageError(f"{path} repeats a run of {seen[key]}: {label}.")
            seen[key] = path
            found.append(_reordered(record, objectives_of(expected)))
    return found


def report(records: Sequence[Record]) -> tuple[str, str]:
    """Returns the tables as text, and the page as HTML."""
    usable = list(records)
    for metric in METRICS:
        usable = finite(usable, metric)
    if not usable:
        raise UsageError(
            "at least one run must have a finite loss, accuracy and margin for every objective; "
            "none has."
        )
    left_out = [Point(**r["point"]).label for r in records if r not in usable]
    summary = f"{_summary(usable)} {_told_apart(usable)}".strip()
    if left_out:
        summary += f" Left out because of values that are not finite: {'; '.join(left_out)}."
    differences = tables.difference_table(usable, BASELINE)
    shown = [
        *tables.result_tables(usable),
        tables.hypervolume_table(usable),
        *([differences] if differences.rows else []),
        tables.step_table(usable),
    ]
    about = [
        tables.model_table(usable),
        tables.mapping_table("Settings", [records[0]["settings"]]),
        tables.mapping_table("Environment", [r.get("environment", {}) for r in records]),
    ]
    title = f"Multi-objective alignment: {', '.join(objectives_of(usable[0]))}"
    text = "\n\n".join([summary, *(table.text() for table in shown)]) + "\n"
    return text, page.page(title, summary, [*shown, *_pictures(usable), *about])


def _told_apart(records: Sequence[Record]) -> str:
    """Says which methods these seeds do not distinguish."""
    methods = {cell_of(record).method for record in records}
    if len(methods) < 2:
        return ""
    seeds = len({record["point"]["seed"] for record in records})
    pairs = indistinguishable(records, "loss")
    test = "in the hypervolume of their losses (sign-flip test over seeds, Holm's correction, 5 %)"
    if not pairs:
        return f"These seeds distinguish all methods {test}."
    if len(pairs) == math.comb(len(methods), 2):
        least = math.ceil(1 + math.log2(len(pairs) / 0.05))
        few = f": {len(methods)} methods need at least {least} seeds" if seeds < least else ""
        return f"These seeds distinguish no two methods {test}{few}."
    text = "; ".join(f"{a} and {b}" for a, b in pairs)
    return f"These seeds do not distinguish {test}: {text}."


def _summary(records: Sequence[Record]) -> str:
    def count(values: Iterable[object], noun: str) -> str:
        number = len(set(values))
        return f"{number} {noun}{'s' * (number != 1)}"

    methods = count((cell_of(r).method for r in records), "method")
    seeds = count((r["point"]["seed"] for r in records), "seed")
    scores = records[0]["evaluation"]
    labelled = ", ".join(f"{name} {scores[name]['labelled']:g}" for name in scores)
    return (
        f"{count(map(id, records), 'run')} of {methods} with {seeds}. "
        f"Labelled held-out pairs: {labelled}. "
        f"Values are means ± standard deviations over seeds. The distance to the front is the "
        f"Euclidean distance to the nearest run that no other run dominates."
    )


def _pictures(records: Sequence[Record]) -> list[page.Picture]:
    pictures = [
        page.Picture(
            "Hypervolumes",
            figures.hypervolume_figure(records),
            "Hypervolume of each method: a tick for each seed, the mean, and as a bar its 95% "
            "bootstrap interval over seeds.",
        )
    ]
    names = objectives_of(records[0])
    if len(names) == 1:  # no trade-off
        return pictures
    most = figures.OBJECTIVES
    of = "every two" if len(names) <= most else f"the first {most} of {len(names)}"
    where = "left and right" if len(names) == 2 else "below and above the diagonal"
    text = (
        f"Held-out losses and accuracies ({where}) of {of} objectives. Small points are runs, "
        f"large points means over seeds, labelled with their weights. No other run dominates a "
        f"ringed run in all {len(names)} objectives."
    )
    return [page.Picture("Trade-offs", figures.trade_off_figure(records), text), *pictures]


def _check_values(path: Path, record: Record) -> None:
    label = Point(**record["point"]).label
    for name in objectives_of(record):
        scores = record["evaluation"].get(name, {})
        missing = [part for part in (*METRICS, "labelled") if part not in scores]
        if missing:
            raise UsageError(f"{path}: the run {label} has no {', '.join(missing)} for {name!r}.")
        for part in (*METRICS, "labelled"):
            _check_number(path, label, f"{part} of {name!r}", scores[part])
        if scores["labelled"] is None:
            raise UsageError(f"{path}: the run {label} has no labelled count for {name!r}.")
    for part in ("hurting_steps", "conflicting_steps", "seconds"):
        _check_number(path, label, part, record["training"].get(part))


def _check_number(path: Path, label: str, what: str, value: object) -> None:
    if value is not None and not is_number(value):
        raise UsageError(
            f"{path}: the run {label} must have a number or null as {what}; got {value!r:.60}."
        )


def _check_alike(first: Path, expected: Record, path: Path, record: Record) -> None:
    if set(objectives_of(record)) != set(objectives_of(expected)):
        raise UsageError(
            f"{path} holds a run with the objectives {', '.join(objectives_of(record))}, but "
            f"{first} one with {', '.join(objectives_of(expected))}. Make separate reports."
        )
    a, b = expected["settings"], record["settings"]
    differing = [name for name in {**a, **b} if a.get(name) != b.get(name)]
    if differing:
        raise UsageError(
            f"{path} holds a run with other settings than {first}: they differ in "
            f"{', '.join(differing)}. Make separate reports."
        )


def _reordered(record: Record, names: Sequence[str]) -> Record:
    weights = record["point"]["weights"]
    return {**record, "point": {**record["point"], "weights": {n: weights[n] for n in names}}}
