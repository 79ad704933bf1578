"""Moving means and bands, which reduce a long run to few points."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from raco_optim._checks import checked_count
from raco_optim.plot.series import Array

POINTS = 120  # most points of a line: more look the same and make vector graphics slow
_WINDOWS = 30  # default number of windows in a run
_QUARTILES = (0.25, 0.75)


@dataclass(frozen=True)
class Curve:
    """Statistics over windows of consecutive steps; NaN if a window has no finite value.

    Attributes:
        x: Middle of each window, ``[k]``.
        mean: Mean, ``[k]``.
        low: Lower quartile, ``[k]``.
        high: Upper quartile, ``[k]``.
    """

    x: Array
    mean: Array
    low: Array
    high: Array


def window_of(steps: int, window: int | None, least: int = 1) -> int:
    """Returns the steps per window: `window`, or a thirtieth of the run but at least `least`."""
    if window is not None:
        return min(checked_count("window", window), steps)
    return min(max(least, math.ceil(steps / _WINDOWS)), steps)


def moving(steps: Array, values: Array, window: int) -> Curve:
    """Returns statistics of the finite values in moving windows; `steps`, `values`: ``[n]``."""
    last = len(steps) - window
    starts = np.unique(np.linspace(0, last, min(POINTS, last + 1)).round().astype(int))
    x = np.lib.stride_tricks.sliding_window_view(steps, window)[starts].mean(axis=1)
    found = np.lib.stride_tricks.sliding_window_view(values, window)[starts]
    finite = np.isfinite(found)
    count = finite.sum(axis=1)
    total = np.where(finite, found, 0.0).sum(axis=1)
    mean = np.divide(total, count, out=np.full(len(x), math.nan), where=count > 0)
    # NaN sorts last, so a rank among the finite values is a position.
    ordered = np.sort(np.where(finite, found, math.nan), axis=1)
    low, high = (
        ordered[np.arange(len(x)), np.round(q * (count - 1).clip(min=0)).astype(int)]
        for q in _QUARTILES
    )
    return Curve(x, mean, low, high)
