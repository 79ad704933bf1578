"""Records of a grid -> cells of the grid, and values to be minimised."""

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
    """What the runs of one cell of a grid share; they differ in the seed.

    Attributes:
        method: Name of the method, with its radius if it has one.
        weights: Pairs of objective and weight; None for a method that asks for none.

    Example:
        >>> from raco_optim.cli.cells import Cell
        >>> Cell("raco (c = 0.4)", (("a", 0.8), ("b", 0.2))).trade_off
        '0.8 / 0.2'
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
    """Returns the objectives of a record, in the order of its weights.

    Args:
        record: A record of `run_grid`.

    Example:
        >>> from raco_optim.cli.cells import objectives_of
        >>> objectives_of({"point": {"weights": {"b": 0.5, "a": 0.5}}})
        ['b', 'a']
    """
    return list(record["point"]["weights"])


def cell_of(record: Record) -> Cell:
    """Returns the cell that a record belongs to.

    Args:
        record: A record of `run_grid`.

    Example:
        >>> from raco_optim.cli.cells import cell_of
        >>> cell_of({"point": {"method": "mgda", "weights": {"a": 1.0}, "seed": 0, "c": None}})
        Cell(method='mgda', weights=None)
    """
    point = record["point"]
    radius = "" if point["c"] is None else f" (c = {point['c']:g})"
    weightless = point["method"] in WITHOUT_WEIGHTS
    return Cell(point["method"] + radius, None if weightless else tuple(point["weights"].items()))


def group_by_point(records: Sequence[Record]) -> dict[Cell, list[Record]]:
    """Groups the records of all seeds by method and weights, in the order of the records.

    Args:
        records: Records of `run_grid`.

    Returns:
        The records of each cell.

    Example:
        >>> from raco_optim.cli.cells import group_by_point
        >>> point = {"method": "linear", "weights": {"a": 1.0}, "c": None}
        >>> records = [{"point": {**point, "seed": seed}} for seed in range(3)]
        >>> [len(group) for group in group_by_point(records).values()]
        [3]
    """
    groups: dict[Cell, list[Record]] = {}
    for record in records:
        groups.setdefault(cell_of(record), []).append(record)
    return groups


def costs(record: Record, metric: str) -> list[float]:
    """Returns the record's costs, one per objective; NaN where the record has no value.

    Args:
        record: A record of `run_grid`.
        metric: ``"loss"``, ``"accuracy"`` or ``"margin"``.

    Example:
        >>> from raco_optim.cli.cells import costs
        >>> record = {"point": {"weights": {"a": 1.0}}, "evaluation": {"a": {"accuracy": 0.75}}}
        >>> costs(record, "accuracy")
        [0.25]
    """
    values = (record["evaluation"][name][metric] for name in objectives_of(record))
    return [math.nan if value is None else COSTS[metric](value) for value in values]


def finite(records: Sequence[Record], metric: str) -> list[Record]:
    """Returns the records that have a finite value for every objective.

    Args:
        records: Records of `run_grid`.
        metric: ``"loss"``, ``"accuracy"`` or ``"margin"``.

    Example:
        >>> from raco_optim.cli.cells import finite
        >>> record = {"point": {"weights": {"a": 1.0}}, "evaluation": {"a": {"loss": None}}}
        >>> finite([record], "loss")
        []
    """
    return [record for record in records if all(map(math.isfinite, costs(record, metric)))]
