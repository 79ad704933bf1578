"""Records of a grid -> tables of text, which the terminal and the page show alike."""

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
    """A table of strings with what the reader has to know.

    Attributes:
        title: What it shows.
        header: Names of the columns.
        rows: Cells, as many a row as there are columns.
        note: What the numbers are.
        wrapped: Whether the cells are texts, which a page may wrap.

    Example:
        >>> from raco_optim.cli.tables import Table
        >>> print(Table("Runs", ["method", "loss"], [["linear", "0.5"]], "Made up.").text())
        Runs
          method  loss
          linear   0.5
        Made up.
    """

    title: str
    header: Sequence[str]
    rows: Sequence[Sequence[str]]
    note: str = ""
    wrapped: bool = False

    def text(self) -> str:
        """The table for a terminal, the first column flush left."""
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
    """Returns the mean and, of two values or more, the standard deviation, as text.

    Args:
        values: One value a seed, at least one.
        digits: Digits behind the point.

    Example:
        >>> from raco_optim.cli.tables import spread
        >>> spread([1.0, 2.0])
        '1.500 ± 0.707'
    """
    mean = f"{statistics.fmean(values):.{digits}f}"
    return f"{mean} ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else mean


def result_tables(records: Sequence[Record]) -> list[Table]:
    """Returns what was reached on held-out pairs, one table a metric.

    Args:
        records: Records with finite values.

    Example:
        >>> from raco_optim.cli.tables import result_tables
        >>> point = {"method": "linear", "weights": {"a": 1.0}, "seed": 0, "c": None}
        >>> scores = {"loss": 0.5, "margin": 0.1, "accuracy": 0.75, "labelled": 4}
        >>> print(result_tables([{"point": point, "evaluation": {"a": scores}}])[1].text())
        Held-out accuracy (higher is better)
          method  weights  seeds      a  distance to front
          linear        1      1  0.750              0.000
        Weights in the order a.
    """
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
    """Returns the hypervolume of each method, with its bootstrap interval over seeds.

    Args:
        records: Records with finite values.

    Example:
        >>> from raco_optim.cli.tables import hypervolume_table
        >>> point = {"method": "linear", "weights": {"a": 1.0}, "seed": 0, "c": None}
        >>> scores = {"loss": 0.5, "margin": 0.1, "accuracy": 0.75, "labelled": 4}
        >>> hypervolume_table([{"point": point, "evaluation": {"a": scores}}]).rows
        [['linear', '1', '1', '1.000', '0.750']]
    """
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
        "Mean over seeds [95% bootstrap interval over seeds]: the share of a box that is "
        "dominated. For accuracies it is the unit cube; for losses it goes from the best of all "
        f"runs ({best}) to the worst plus a tenth of the range ({worst}), so that these values "
        "compare within this table only. A method with more trade-offs can dominate more.",
    )


def difference_table(records: Sequence[Record], baseline: str = "linear") -> Table:
    """Returns the paired differences of the held-out losses against a baseline.

    Args:
        records: Records with finite values.
        baseline: The method to compare with.

    Example:
        >>> from raco_optim.cli.tables import difference_table
        >>> difference_table([], "linear").rows
        []
    """
    names = objectives_of(records[0]) if records else []
    rows: dict[tuple[str, str], list[str]] = {}
    for difference in paired_difference(records, "loss", baseline):
        key = (difference.cell.method, difference.cell.trade_off)
        row = rows.setdefault(key, [*key, str(difference.seeds)])
        row.append(_interval(difference.interval, signed=True))
    return Table(
        f"Held-out loss minus that of {baseline} (below 0 is better)",
        ["method", "weights", "pairs", *names, "weighted sum"],
        list(rows.values()),
        "Of runs with the same weights and seed. Mean [95% bootstrap interval over seeds]. With "
        "few seeds the intervals are too narrow, and among many some miss 0 by chance.",
    )


def step_table(records: Sequence[Record]) -> Table:
    """Returns what happened to the gradients while training, and how long it took.

    Args:
        records: Records of `run_grid`.

    Example:
        >>> from raco_optim.cli.tables import step_table
        >>> point = {"method": "raco", "weights": {"a": 1.0}, "seed": 0, "c": 0.4}
        >>> step_table([{"point": point, "training": {"hurting_steps": 0.25}}]).rows
        [['raco (c = 0.4)', '1', '25.0 %', '-', '-']]
    """

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
        "Hurting: steps whose combined gradient, followed downhill, raises the loss of an "
        "objective to first order. Conflicting: steps on which the gradients of two objectives "
        f"have a negative inner product. {NOTHING}: not recorded.",
    )


def model_table(records: Sequence[Record]) -> Table:
    """Returns where the model of each run is, or the command that trains it again.

    Args:
        records: Records of `raco-optim sweep`, or of `run_grid`, which may not say it.

    Example:
        >>> from raco_optim.cli.tables import model_table
        >>> point = {"method": "linear", "weights": {"a": 1.0}, "seed": 0, "c": None}
        >>> model_table([{"point": point, "extra": {"model": "kept"}}]).rows
        [['linear', '1', '0', 'kept']]
    """
    rows = []
    for record in records:
        cell, extra = cell_of(record), record.get("extra", {})
        where = str(extra.get("model") or extra.get("command") or NOTHING)
        rows.append([cell.method, cell.trade_off, str(record["point"]["seed"]), where])
    return Table(
        "Models",
        ["method", "weights", "seed", "folder, or command that trains it again"],
        rows,
        wrapped=True,
    )


def mapping_table(title: str, mappings: Iterable[Mapping[str, Any]]) -> Table:
    """Returns names and values; where the mappings differ, all values of a name.

    Args:
        title: What they are.
        mappings: As JSON holds them.

    Example:
        >>> from raco_optim.cli.tables import mapping_table
        >>> mapping_table("Environment", [{"cores": 2}, {"cores": 4}]).rows
        [['cores', '2; 4']]
    """
    values: dict[str, dict[str, None]] = {}
    for mapping in mappings:
        for name, value in mapping.items():
            values.setdefault(name, {})[str(value)] = None
    rows = [[name, "; ".join(found)] for name, found in values.items()]
    return Table(title, ["name", "value"], rows, wrapped=True)


def interval_text(values: Sequence[float]) -> str:
    """Returns the mean and its bootstrap interval as text; `NOTHING` of no value.

    Args:
        values: One value a seed.

    Example:
        >>> from raco_optim.cli.tables import interval_text
        >>> interval_text([1.0, 1.0])
        '1.000 [1.000, 1.000]'
    """
    return _interval(bootstrap_interval(values)) if values else NOTHING


def _interval(interval: Interval, *, signed: bool = False) -> str:
    sign = "+" if signed else ""
    mean, low, high = (f"{value:{sign}.3f}" for value in interval)
    return mean if math.isnan(interval.low) else f"{mean} [{low}, {high}]"
