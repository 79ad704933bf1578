"""Records of a grid: grouped into cells, and converted to costs."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from raco_optim.cli.grid import WITHOUT_WEIGHTS

Record = Mapping[str, Any]

COSTS: dict[str, Callable[[float], float]] = {
    "loss": lambda loss: loss,
    "accuracy": lambda accuracy: 1 - accuracy,
    "margin": lambda margin: -margin,
}


class Cell(NamedTuple):
    """Runs of a grid that differ only in the seed.

    Attributes:
        method: Name of the method, with its radius if it has one.
        weights: Pairs of objective and weight; None for a method that ignores weights.
    """

    method: str
    weights: tuple[tuple[str, float], ...] | None

    @property
    def trade_off(self) -> str:
        """The weights in the order of the objectives."""
        if self.weights is None:
            return "none"
        return " / ".join(f"{weight:.3g}" for _, weight in self.weights)


def objectives_of(record: Record) -> list[str]:
    """Returns the objectives of a record, in the order of its weights."""
    return list(record["point"]["weights"])


def cell_of(record: Record) -> Cell:
    """Returns the cell of a record."""
    point = record["point"]
    radius = "" if point["c"] is None else f" (c = {point['c']:g})"
    weightless = point["method"] in WITHOUT_WEIGHTS
    return Cell(point["method"] + radius, None if weightless else tuple(point["weights"].items()))


def group_by_point(records: Sequence[Record]) -> dict[Cell, list[Record]]:
    """Groups records that differ only in the seed."""
    groups: dict[Cell, list[Record]] = {}
    for record in records:
        groups.setdefault(cell_of(record), []).append(record)
    return groups


def costs(record: Record, metric: str) -> list[float]:
    """Returns the costs of a record, one per objective; NaN for a missing value."""
    values = (record["evaluation"][name][metric] for name in objectives_of(record))
    return [math.nan if value is None else COSTS[metric](value) for value in values]


def finite(records: Sequence[Record], metric: str) -> list[Record]:
    """Returns the records that have a finite value for every objective.

    Args:
        records: Records of `run_grid`.
        metric: ``"loss"``, ``"accuracy"`` or ``"margin"``.

    Example:
        >>> from raco_optim.cli.statistics import finite
        >>> record = {"point": {"weights": {"a": 1.0}}, "evaluation": {"a": {"loss": None}}}
        >>> finite([record], "loss")
        []
    """
    return [record for record in records if all(map(math.isfinite, costs(record, metric)))]
