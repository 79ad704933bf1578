"""Tables of a grid's results, for the terminal and the page."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from raco_optim.cli.cells import Record, cell_of, group_by_point, objectives_of
from raco_optim.cli.statistics import (
    Interval,
    bootstrap_interval,
    frame,
    front_distances,
    hypervolumes,
    paired_difference,
)

NOTHING = "-"
METRICS = ("loss", "accuracy", "margin")


@dataclass(frozen=True)
class Table:
    """A table of strings.

    Attributes:
        title: Heading.
        header: Names of the columns.
        rows: Cells, one per column in each row.
        note: Explanation of the numbers.
        wrapped: Whether the cells are texts, which a page may wrap.
    """

    title: str
    header: Sequence[str]
    rows: Sequence[Sequence[str]]
    note: str = ""
    wrapped: bool = False

    def text(self) -> str:
        """Returns the table as text for a terminal."""
        lines = [self.header, *self.rows]
        widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
        body = [
            "  "
            + "  ".join(
                cell.rjust(width) if i else cell.ljust(width)
                for i, (cell, width) in enumerate(zip(line, widths, strict=True))
            ).rstrip()
            for line in lines
        ]
        return "\n".join([self.title, *body, *([self.note] if self.note else [])])


def spread(values: Sequence[float], digits: int = 3) -> str:
    """Returns the mean and, for two values or more, the standard deviation as text."""
    mean = f"{statistics.fmean(values):.{digits}f}"
    return f"{mean} ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else mean


def result_tables(records: Sequence[Record]) -> list[Table]:
    """Returns one table per metric of the held-out results."""
    names = objectives_of(records[0])
    better = {"loss": "lower", "accuracy": "higher", "margin": "higher"}
    tables = []
    for metric in METRICS:
        distances = dict(zip(map(id, records), front_distances(records, metric), strict=True))
        rows = [
            [
                cell.method,
                cell.trade_off,
                str(len(group)),
                *(spread([r["evaluation"][name][metric] for r in group]) for name in names),
                spread([distances[id(r)] for r in group]),
            ]
            for cell, group in group_by_point(records).items()
        ]
        tables.append(
            Table(
                f"Held-out {metric} ({better[metric]} is better)",
                ["method", "weights", "seeds", *names, "distance to front"],
                rows,
                f"Weights in the order {', '.join(names)}.",
            )
        )
    return tables


def hypervolume_table(records: Sequence[Record]) -> Table:
    """Returns the hypervolume of each method, with its bootstrap interval over seeds."""
    points: dict[str, int] = {}
    for cell in group_by_point(records):
        points[cell.method] = points.get(cell.method, 0) + 1
    volumes = {metric: hypervolumes(records, metric) for metric in ("loss", "accuracy")}
    rows = [
        [
            method,
            str(count),
            str(len(volumes["loss"][method])),
            *(interval_text(list(volumes[m][method].values())) for m in ("loss", "accuracy")),
        ]
        for method, count in points.items()
    ]
    best, worst = (", ".join(f"{x:.3f}" for x in corner) for corner in frame(records, "loss"))
    return Table(
        "Hypervolume (higher is better)",
        ["method", "trade-offs", "seeds", "of losses", "of accuracies"],
        rows,
        "Mean over seeds [95% bootstrap interval over seeds] of the dominated fraction of a box. "
        "For accuracies the box is the unit cube. For losses it extends from the best of all runs "
        f"({best}) to the worst plus a tenth of the range ({worst}); compare these values only "
        "within this table. A method with more trade-offs can dominate more.",
    )


def difference_table(records: Sequence[Record], baseline: str = "linear") -> Table:
    """Returns the paired differences of the held-out losses from a baseline."""
    names = objectives_of(records[0]) if records else []
    rows: dict[tuple[str, str], list[str]] = {}
    for difference in paired_difference(records, "loss", baseline):
        key = (difference.cell.method, difference.cell.trade_off)
        row = rows.setdefault(key, [*key, str(difference.seeds)])
        row.append(_interval(difference.interval, signed=True))
    return Table(
        f"Held-out loss, difference from {baseline} (below 0 is better)",
        ["method", "weights", "pairs", *names, "weighted sum"],
        list(rows.values()),
        "Mean [95% bootstrap interval over seeds] over pairs of runs with the same weights and "
        "seed. With few seeds the intervals are too narrow, and among many intervals some miss 0 "
        "by chance.",
    )


def step_table(records: Sequence[Record]) -> Table:
    """Returns how often gradients conflicted or an update hurt, and the training times."""

    def mean(group: Sequence[Record], name: str, unit: str, factor: float = 1.0) -> str:
        values = [r["training"].get(name) for r in group]
        known = [value for value in values if value is not None]
        return f"{factor * statistics.fmean(known):.1f}{unit}" if known else NOTHING

    return Table(
        "Training steps",
        ["method", "weights", "hurting", "conflicting", "time"],
        [
            [
                cell.method,
                cell.trade_off,
                mean(group, "hurting_steps", " %", 100),
                mean(group, "conflicting_steps", " %", 100),
                mean(group, "seconds", " s"),
            ]
            for cell, group in group_by_point(records).items()
        ],
        "Hurting: steps whose update raises the loss of an objective to first order. Conflicting: "
        "steps on which the gradients of two objectives have a negative inner product. "
        f"{NOTHING}: not recorded.",
    )


def model_table(records: Sequence[Record]) -> Table:
    """Returns the model of each run, or the command that trains it again."""
    rows = []
    for record in records:
        cell, extra = cell_of(record), record.get("extra", {})
        where = str(extra.get("model") or extra.get("command") or NOTHING)
        rows.append([cell.method, cell.trade_off, str(record["point"]["seed"]), where])
    return Table(
        "Models",
        ["method", "weights", "seed", "folder, or command to train it again"],
        rows,
        wrapped=True,
    )


def mapping_table(title: str, mappings: Iterable[Mapping[str, Any]]) -> Table:
    """Returns names and values; if the mappings differ, all values of a name."""
    values: dict[str, dict[str, None]] = {}
    for mapping in mappings:
        for name, value in mapping.items():
            values.setdefault(name, {})[str(value)] = None
    rows = [[name, "; ".join(found)] for name, found in values.items()]
    return Table(title, ["name", "value"], rows, wrapped=True)


def interval_text(values: Sequence[float]) -> str:
    """Returns the mean and its bootstrap interval as text; `NOTHING` without a value."""
    return _interval(bootstrap_interval(values)) if values else NOTHING


def _interval(interval: Interval, *, signed: bool = False) -> str:
    sign = "+" if signed else ""
    mean, low, high = (f"{value:{sign}.3f}" for value in interval)
    return mean if math.isnan(interval.low) else f"{mean} [{low}, {high}]"
