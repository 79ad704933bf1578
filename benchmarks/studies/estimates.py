"""Numbers with intervals, and the distance to a front: for the summaries of the studies."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy.stats import t as student_t

from raco_optim.pareto import pareto_front

Array = npt.NDArray[np.float64]
REPLICATES = 1000


@dataclass(frozen=True)
class Estimate:
    """A number with its 95 % interval, NaN where there is none."""

    value: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Array) -> Estimate:
        """From the number itself and its bootstrap replicates, ``[1 + replicates]``."""
        known = values[1:][np.isfinite(values[1:])]
        low, high = np.quantile(known, [0.025, 0.975]) if len(known) else (math.nan, math.nan)
        return cls(float(values[0]), float(low), float(high))

    @classmethod
    def over_seeds(cls, values: Array) -> Estimate:
        """From one number a seed, NaN where there is none, with Student's t interval.

        With fewer than three seeds there is no interval: it would be wider than any effect.
        """
        known = values[np.isfinite(values)]
        value = float(known.mean()) if len(known) else math.nan
        if len(known) < 3:
            return cls(value, math.nan, math.nan)
        half = student_t.ppf(0.975, len(known) - 1) * known.std(ddof=1) / math.sqrt(len(known))
        return cls(value, value - float(half), value + float(half))

    def side(self) -> int:
        """+1 or -1 if the whole interval lies above or below zero, else 0."""
        return (self.low > 0) - (self.high < 0)


def multinomial(generator: np.random.Generator, count: int, replicates: int) -> Array:
    """How often each unit counts: ``[1 + replicates, count]``, the first row all ones."""
    draws = generator.multinomial(count, [1 / count] * count, replicates)
    return np.concatenate([np.ones((1, count)), draws])


def front_distances(points: Array, of: Array) -> Array:
    """Distance of points ``[n, m]`` to the front of the points `of`: Euclidean, of what is worse.

    It is 0 for a point that none dominates (d+ of Ishibuchi et al., 2015).
    """
    front = of[pareto_front(of).numpy()]
    return np.sqrt((np.maximum(points[:, None] - front, 0) ** 2).sum(-1)).min(1)


def least_weight(weights: Array) -> Array:
    """Which tasks have the least weight, as shares ``[W, m]`` of a mean; NaN at equal weights."""
    least = np.isclose(weights, weights.min(1, keepdims=True))
    shares = least / least.sum(1, keepdims=True)
    shares[least.all(1)] = np.nan
    return shares


def text(found: Mapping[str, Any], *, sign: bool = False) -> str:
    """``value [low, high]``; a difference is bold where its interval leaves out 0."""
    value, low, high = (found[name] for name in ("value", "low", "high"))
    if value is None or low is None:
        return "-" if value is None else f"{value:.3f}"
    form = "+.3f" if sign else ".3f"
    shown = f"{value:{form}} [{low:{form}}, {high:{form}}]"
    return f"**{shown}**" if sign and (low > 0 or high < 0) else shown


def plain(value: Any) -> Any:  # noqa: ANN401  # anything that JSON can hold
    """`value` with floats of six digits, and None for what JSON has no number for."""
    if isinstance(value, Estimate):
        return plain(vars(value))
    if isinstance(value, np.ndarray | np.generic):
        return plain(value.tolist())
    if isinstance(value, float):
        return float(f"{value:.6g}") if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(name): plain(entry) for name, entry in value.items()}
    if isinstance(value, list | tuple):
        return [plain(entry) for entry in value]
    return value
