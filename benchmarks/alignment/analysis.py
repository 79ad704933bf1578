"""Records of a study -> estimates with intervals: averages, hypervolumes, distances, differences.

Every number comes with a 95 % interval from a bootstrap of two levels: seeds are drawn with
replacement, and so are the held-out papers (the pairs of one paper are not independent). All
methods share the draws, so that differences are paired. The intervals say how much the numbers
would move with other seeds and papers, given this model, this data set and these settings; with two
seeds the first part is known badly. What is known only as one number a run has an interval from the
seeds alone.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
from scipy.stats import t as student_t

from raco_optim.pareto import hypervolume, pareto_front

Array = npt.NDArray[np.float64]
REPLICATES = 1000

# Fixed before any result was known. Errors are at most 1; the reference model's loss is log 2, and
# a model that loses as much as twice that on an objective contributes nothing.
REFERENCES = {"accuracy": 1.0, "loss": 2 * math.log(2)}


# One run a seed serves all weights.
WITHOUT_WEIGHTS = ("mgda", "initial")


class Key(NamedTuple):
    """A point of the grid but for its seed."""

    method: str
    weights: tuple[float, ...]
    c: float | None


@dataclass(frozen=True)
class Estimate:
    """A number with its interval.

    Attributes:
        value: From all seeds and papers, as they are.
        low: 2.5 % quantile of the replicates.
        high: 97.5 % quantile.
    """

    value: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Array) -> Estimate:
        """From the number itself and its replicates, ``[1 + replicates]``."""
        known = values[1:][np.isfinite(values[1:])]
        low, high = np.quantile(known, [0.025, 0.975]) if len(known) else (math.nan, math.nan)
        return cls(float(values[0]), float(low), float(high))

    @classmethod
    def over_seeds(cls, values: Array) -> Estimate:
        """From one number per seed, ``[S]``, NaN where there is none; Student's t interval.

        For what the records hold no more of than a number a run. With fewer than three seeds there
        is no interval: it would be wider than any effect.
        """
        known = values[np.isfinite(values)]
        value = float(known.mean()) if len(known) else math.nan
        if len(known) < 3:
            return cls(value, math.nan, math.nan)
        half = student_t.ppf(0.975, len(known) - 1) * known.std(ddof=1) / math.sqrt(len(known))
        return cls(value, value - float(half), value + float(half))

    def text(self, digits: int, *, sign: bool = False) -> str:
        """``value [low, high]``."""
        form = f"{'+' if sign else ''}.{digits}f"
        return f"{self.value:{form}} [{self.low:{form}}, {self.high:{form}}]"

    def side(self) -> int:
        """+1 or -1 if the whole interval lies above or below zero, else 0."""
        return (self.low > 0) - (self.high < 0)


class Grid:
    """Records of one file as arrays.

    Axes: K keys, S seeds, 1 + `REPLICATES` draws of papers (the first: every paper once), m
    objectives. NaN where there is no record.

    Attributes:
        objectives: Names.
        keys: Points but for their seeds, in the order of the records.
        seeds: Seeds, in order.
        accuracy: ``[K, S, 1 + replicates, m]``.
        loss: ``[K, S, 1 + replicates, m]``.
    """

    def __init__(
        self,
        records: Sequence[Mapping[str, Any]],
        signs: Array,
        papers: Sequence[str],
        replicates: int = REPLICATES,
    ) -> None:
        """Computes the metrics of all draws.

        Args:
            records: Records of one study, each with ``extra.delta``.
            signs: Labels of the held-out pairs ``[n, m]`` in {+1, -1, 0}.
            papers: The paper of each of them.
            replicates: Number of draws.
        """
        self.objectives = tuple(records[0]["settings"]["objectives"])
        self.records = {(self._key(r), r["point"]["seed"]): r for r in records}
        self.keys = list(dict.fromkeys(key for key, _ in self.records))
        self.seeds = sorted({seed for _, seed in self.records})
        beta = records[0]["settings"]["beta"]

        generator = np.random.default_rng(0)
        names, paper = np.unique(np.asarray(papers), return_inverse=True)
        draws = generator.multinomial(len(names), [1 / len(names)] * len(names), replicates)
        counts = np.concatenate([np.ones((1, len(names))), draws])[:, paper]  # [1 + R, n]
        seeds = generator.multinomial(
            len(self.seeds), [1 / len(self.seeds)] * len(self.seeds), replicates
        )
        self._seeds = np.concatenate([np.ones((1, len(self.seeds))), seeds])  # [1 + R, S]

        shape = (len(self.keys), len(self.seeds), 1 + replicates, len(self.objectives))
        self.accuracy, self.loss = np.full(shape, np.nan), np.full(shape, np.nan)
        labelled = counts @ (signs != 0)
        for (key, seed), record in self.records.items():
            at = self.keys.index(key), self.seeds.index(seed)
            margin = beta * signs * np.asarray(record["extra"]["delta"])[:, None]
            right = np.where(signs != 0, (1 + np.sign(margin)) / 2, 0)
            loss = np.where(signs != 0, np.logaddexp(0, -margin), 0)
            with np.errstate(invalid="ignore"):  # a draw may miss all pairs of an objective
                self.accuracy[at] = counts @ right / labelled
                self.loss[at] = counts @ loss / labelled

    @staticmethod
    def _key(record: Mapping[str, Any]) -> Key:
        point = record["point"]
        return Key(point["method"], tuple(point["weights"].values()), point["c"])

    def where(self, chosen: Callable[[Key], bool]) -> list[int]:
        """Positions of the keys for which `chosen` is true."""
        return [i for i, key in enumerate(self.keys) if chosen(key)]

    def over_seeds(self, values: Array) -> Array:
        """Mean over the drawn seeds that are there: ``[..., S, 1 + R]`` -> ``[..., 1 + R]``."""
        weights = np.where(np.isfinite(values), self._seeds.T, 0)
        with np.errstate(invalid="ignore"):
            return (np.nan_to_num(values) * weights).sum(-2) / weights.sum(-2)

    def metric(self, space: str) -> Array:
        """Means over seeds of what is minimised, ``[K, 1 + R, m]``: 1 - accuracy, or the loss."""
        values = 1 - self.accuracy if space == "accuracy" else self.loss
        return np.moveaxis(self.over_seeds(np.moveaxis(values, -1, 1)), 1, -1)

    def hypervolume(self, rows: Sequence[int], space: str) -> Array:
        """Hypervolume of the points `rows`, mean over seeds, ``[1 + R]``."""
        values = 1 - self.accuracy if space == "accuracy" else self.loss
        bound = [REFERENCES[space]] * len(self.objectives)
        found = np.full((len(self.seeds), values.shape[2]), np.nan)
        for s in range(len(self.seeds)):
            for r in range(values.shape[2]):
                points = values[rows, s, r]
                if np.isfinite(points).all():
                    found[s, r] = hypervolume(points, bound)
        return self.over_seeds(found)

    def distances(self, space: str, rows: Sequence[int]) -> Array:
        """How far points are from the front of all of `rows`, ``[K, 1 + R]``.

        The distance of a to a front point b counts only what a is worse in, |max(a - b, 0)|, so
        that it is 0 for what no point dominates (d+ of Ishibuchi et al., 2015).
        """
        values = self.metric(space)
        found = np.full(values.shape[:2], np.nan)
        for r in range(values.shape[1]):
            points = values[rows, r]
            points = points[np.isfinite(points).all(1)]
            if len(points):
                found[:, r] = worse_by(values[:, r], points[pareto_front(points).numpy()])
        return found

    def row(self, method: str, weights: tuple[float, ...], c: float | None = None) -> int | None:
        """Position of what a user with these weights gets from a method, None if there is nothing.

        That is the run with these weights; of a method that takes none, its only run; and of the
        single-objective models the one for the objective with the largest weight.
        """
        if method == "single":
            weights = tuple(float(i == np.argmax(weights)) for i in range(len(weights)))
        rows = self.where(lambda key: key.method == method and key.c in (c, None))
        if method not in WITHOUT_WEIGHTS:
            rows = [i for i in rows if self.keys[i].weights == weights]
        return rows[0] if rows else None

    def numbers(self, path: Sequence[str]) -> Array:
        """A number of every record, ``[K, S]``; NaN where a record has none."""
        found = np.full((len(self.keys), len(self.seeds)), np.nan)
        for (key, seed), record in self.records.items():
            value: Any = record
            for part in path:
                value = value.get(part) if value else None
            if value is not None:
                found[self.keys.index(key), self.seeds.index(seed)] = value
        return found


def weights_text(weights: Iterable[float]) -> str:
    """Weights in short, as in .1/.9."""
    return "/".join(f"{weight:.2g}".replace("0.", ".") for weight in weights)


def worse_by(points: Array, front: Array) -> Array:
    """d+ of points ``[n, m]`` to a front ``[k, m]``: Euclidean, of what a point is worse in."""
    return np.sqrt((np.maximum(points[:, None] - front, 0) ** 2).sum(-1)).min(1)


def steps_to_reach(
    curves: Mapping[str, Sequence[tuple[int, float]]], base: str = "cagrad", share: float = 0.9
) -> dict[str, float]:
    """Steps after which each run has made most of the progress that the base makes in all.

    Args:
        curves: By method [step, value] along a run, the lower the better, from the same start.
        base: One of the methods.
        share: The target is this share of the way from the base's start to its end.

    Returns:
        Steps, interpolated between measurements; inf for a run that never gets there.
    """
    start, end = curves[base][0][1], curves[base][-1][1]
    target = start + share * (end - start)
    found = {}
    for method, curve in curves.items():
        at = next((i for i, (_, value) in enumerate(curve) if value <= target), None)
        if at is None:
            found[method] = math.inf
        elif at == 0:
            found[method] = float(curve[0][0])
        else:
            (step, value), (next_step, next_value) = curve[at - 1], curve[at]
            found[method] = step + (value - target) / (value - next_value) * (next_step - step)
    return found
