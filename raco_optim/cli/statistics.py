"""Statistics of a grid's results: intervals, hypervolumes, distances, paired differences.

All values are costs to minimise: the loss, 1 - accuracy, and -margin. Intervals are bootstrapped
over seeds; with few seeds they are too narrow for their level.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from raco_optim.cli.cells import Cell, Record, cell_of, costs, finite, group_by_point
from raco_optim.pareto import distance_to_front, hypervolume, pareto_front

__all__ = [
    "Difference",
    "Interval",
    "bootstrap_interval",
    "finite",
    "frame",
    "front",
    "front_distances",
    "group_by_point",
    "hypervolumes",
    "indistinguishable",
    "paired_difference",
]


class Interval(NamedTuple):
    """A mean over seeds and its interval; both ends are NaN for a single seed.

    Example:
        >>> from raco_optim.cli.statistics import Interval
        >>> Interval(0.5, 0.4, 0.6).low
        0.4
    """

    mean: float
    low: float
    high: float


class Difference(NamedTuple):
    """A method minus the baseline, at equal weights and seeds.

    Attributes:
        cell: The method and the weights.
        objective: The objective; None for the weighted sum over all.
        interval: Mean and interval of the differences over common seeds.
        seeds: Number of common seeds.

    Example:
        >>> from raco_optim.cli.cells import Cell
        >>> from raco_optim.cli.statistics import Difference, Interval
        >>> Difference(Cell("mgda", None), "a", Interval(0.1, 0.0, 0.2), 5).seeds
        5
    """

    cell: Cell
    objective: str | None
    interval: Interval
    seeds: int


def bootstrap_interval(
    values: Sequence[float], seed: int = 0, level: float = 0.95, resamples: int = 10_000
) -> Interval:
    """Computes a mean and its percentile bootstrap interval.

    Args:
        values: Independent values, one per seed; at least one.
        seed: Seed of the resampling.
        level: Coverage, in (0, 1).
        resamples: Number of bootstrap samples.

    Returns:
        The mean with the quantiles (1 - level) / 2 and (1 + level) / 2 of the resampled means.

    Raises:
        ValueError: There is no value, or `level` is not in (0, 1).

    Example:
        >>> from raco_optim.cli.statistics import bootstrap_interval
        >>> bootstrap_interval([1.0, 1.0, 1.0])
        Interval(mean=1.0, low=1.0, high=1.0)

    References:
        Efron and Tibshirani, "An Introduction to the Bootstrap", 1993, section 13.3.
    """
    if not values:
        raise ValueError("`values` must hold at least one value; got none.")
    if not 0 < level < 1:
        raise ValueError(f"`level` must be in (0, 1); got {level!r}.")
    mean = math.fsum(values) / len(values)
    if len(values) == 1:
        return Interval(mean, math.nan, math.nan)
    drawn = np.random.default_rng(seed).choice(values, size=(resamples, len(values)))
    low, high = np.quantile(drawn.mean(axis=1), [(1 - level) / 2, (1 + level) / 2])
    return Interval(mean, float(low), float(high))


def frame(records: Sequence[Record], metric: str) -> tuple[list[float], list[float]]:
    """Returns the best and the worst corner of the box in which `hypervolumes` measures.

    For the accuracy the box is the unit cube. Losses and margins have no bounds: their box contains
    all records and extends beyond the worst by a tenth of their range, so these volumes are
    comparable only within one set of records.

    Args:
        records: Records with finite values, of all methods to compare.
        metric: ``"loss"``, ``"accuracy"`` or ``"margin"``.

    Example:
        >>> from raco_optim.cli.statistics import frame
        >>> record = {"point": {"weights": {"a": 1.0}}, "evaluation": {"a": {"accuracy": 0.75}}}
        >>> frame([record], "accuracy")
        ([0.0], [1.0])
    """
    columns = list(zip(*(costs(record, metric) for record in records), strict=True))
    if metric == "accuracy":
        return [0.0] * len(columns), [1.0] * len(columns)
    best = [min(column) for column in columns]
    return best, [max(column) + 0.1 * (max(column) - min(column)) for column in columns]


def hypervolumes(records: Sequence[Record], metric: str) -> dict[str, dict[int, float]]:
    """Computes the hypervolume of each method's trade-offs, for each seed.

    A seed that lacks a run at one of the method's weights is left out, because its volume would be
    too small.

    Args:
        records: Records with finite values; see `finite`.
        metric: ``"loss"``, ``"accuracy"`` or ``"margin"``.

    Returns:
        By method, as in `Cell.method`, and seed: the hypervolume as a fraction of `frame`'s box.

    Raises:
        ImportError: There are three objectives or more and moocore is not installed.

    Example:
        >>> from raco_optim.cli.statistics import hypervolumes
        >>> point = {"method": "linear", "weights": {"a": 0.5, "b": 0.5}, "seed": 0, "c": None}
        >>> evaluation = {"a": {"accuracy": 0.5}, "b": {"accuracy": 0.5}}
        >>> hypervolumes([{"point": point, "evaluation": evaluation}], "accuracy")
        {'linear': {0: 0.25}}
    """
    best, worst = frame(records, metric)
    runs: dict[str, dict[int, dict[Cell, list[float]]]] = {}
    for record in records:
        cell, seed = cell_of(record), record["point"]["seed"]
        of_seed = runs.setdefault(cell.method, {}).setdefault(seed, {})
        of_seed[cell] = [
            (cost - low) / (high - low) if high > low else 0.0
            for cost, low, high in zip(costs(record, metric), best, worst, strict=True)
        ]
    volumes: dict[str, dict[int, float]] = {}
    for method, of_method in runs.items():
        cells = {cell for of_seed in of_method.values() for cell in of_seed}
        volumes[method] = {
            seed: hypervolume(list(of_seed.values()), [1.0] * len(best)).item()
            for seed, of_seed in of_method.items()
            if of_seed.keys() == cells
        }
    return volumes


def front(records: Sequence[Record], metric: str) -> list[bool]:
    """Marks the records that no other record dominates.

    Args:
        records: Records with finite values; see `finite`.
        metric: ``"loss"``, ``"accuracy"`` or ``"margin"``.

    Example:
        >>> from raco_optim.cli.statistics import front
        >>> losses = [{"a": {"loss": 1.0}}, {"a": {"loss": 2.0}}]
        >>> front([{"point": {"weights": {"a": 1.0}}, "evaluation": e} for e in losses], "loss")
        [True, False]
    """
    marks: list[bool] = pareto_front([costs(record, metric) for record in records]).tolist()
    return marks


def front_distances(records: Sequence[Record], metric: str) -> list[float]:
    """Computes the Euclidean distance of each record to the front of all records.

    Args:
        records: Records with finite values; see `finite`.
        metric: ``"loss"``, ``"accuracy"`` or ``"margin"``.

    Example:
        >>> from raco_optim.cli.statistics import front_distances
        >>> losses = [{"a": {"loss": 1.0}}, {"a": {"loss": 2.0}}]
        >>> records = [{"point": {"weights": {"a": 1.0}}, "evaluation": e} for e in losses]
        >>> front_distances(records, "loss")
        [0.0, 1.0]
    """
    points = [costs(record, metric) for record in records]
    best = [point for point, is_best in zip(points, front(records, metric), strict=True) if is_best]
    distances: list[float] = distance_to_front(points, best).tolist()
    return distances


def paired_difference(
    records: Sequence[Record], metric: str, baseline: str = "linear"
) -> list[Difference]:
    """Computes the cost of each method minus that of a baseline, at equal weights and seeds.

    Pairing by seed removes the variation that a seed causes in both runs. A difference below zero
    is better.

    Args:
        records: Records with finite values; see `finite`.
        metric: ``"loss"``, ``"accuracy"`` or ``"margin"``.
        baseline: The method to compare with.

    Returns:
        One difference per cell and objective, and one for the weighted sum ``w . cost`` (objective
        None). Cells without a matching run of the baseline are left out.

    Example:
        >>> from raco_optim.cli.statistics import paired_difference
        >>> def record(method, loss):
        ...     point = {"method": method, "weights": {"a": 1.0}, "seed": 0, "c": None}
        ...     return {"point": point, "evaluation": {"a": {"loss": loss}}}
        >>> first, _ = paired_difference([record("linear", 1.0), record("modpo", 1.5)], "loss")
        >>> first.cell.method, first.objective, first.interval.mean
        ('modpo', 'a', 0.5)
    """
    runs: dict[Cell, dict[int, list[float]]] = {}
    for record in records:
        row = costs(record, metric)
        weights = record["point"]["weights"].values()
        weighted = sum(w * cost for w, cost in zip(weights, row, strict=True))
        runs.setdefault(cell_of(record), {})[record["point"]["seed"]] = [*row, weighted]
    differences = []
    for cell, by_seed in runs.items():
        base = runs.get(Cell(baseline, cell.weights), {})
        common = [seed for seed in by_seed if seed in base]
        if cell.method == baseline or not common:
            continue
        names = [*(name for name, _ in cell.weights or ()), None]
        for i, name in enumerate(names):
            values = [by_seed[seed][i] - base[seed][i] for seed in common]
            differences.append(Difference(cell, name, bootstrap_interval(values), len(common)))
    return differences


def sign_flip_p_value(differences: Sequence[float]) -> float:
    """Computes the two-sided p-value of the sign-flip test on paired differences.

    It is the fraction of sign patterns (all of them for up to 12 differences, otherwise 4096 random
    ones) whose sum is at least as far from 0; at least 2^(1 - n) for n differences.
    """
    x = np.array(differences)
    if len(x) <= 12:
        signs = np.array(list(itertools.product((1, -1), repeat=len(x))))
    else:
        signs = np.random.default_rng(0).choice((1, -1), size=(4096, len(x)))
        signs[0] = 1
    sums = np.abs(signs @ x)
    return float(np.mean(sums >= abs(x.sum()) * (1 - 1e-12)))


def indistinguishable(
    records: Sequence[Record], metric: str, level: float = 0.05
) -> list[tuple[str, str]]:
    """Returns the pairs of methods whose hypervolumes these seeds do not distinguish.

    The sign-flip test compares two methods seed by seed; Holm's method corrects the p-values for
    the number of pairs.

    Args:
        records: Records with finite values.
        metric: ``"loss"``, ``"accuracy"`` or ``"margin"``.
        level: Family-wise error rate.

    Example:
        >>> from raco_optim.cli.statistics import indistinguishable
        >>> def record(method, seed, loss):
        ...     point = {"method": method, "weights": {"a": 1.0}, "seed": seed, "c": None}
        ...     return {"point": point, "evaluation": {"a": {"loss": loss + seed}}}
        >>> records = [record(m, s, x) for m, x in (("linear", 0), ("mgda", 1)) for s in range(6)]
        >>> indistinguishable(records, "loss"), indistinguishable(records[:9], "loss")
        ([], [('linear', 'mgda')])

    References:
        Holm, "A simple sequentially rejective multiple test procedure", 1979.
    """
    volumes = hypervolumes(records, metric)
    p_values = []
    for a, b in itertools.combinations(volumes, 2):
        common = [seed for seed in volumes[a] if seed in volumes[b]]
        p = sign_flip_p_value([volumes[a][s] - volumes[b][s] for s in common]) if common else 1.0
        p_values.append((p, (a, b)))
    p_values.sort(key=lambda found: found[0])
    for i, (p, _) in enumerate(p_values):
        if p > level / (len(p_values) - i):
            return sorted(pair for _, pair in p_values[i:])
    return []
