"""Linear algebra that LAPACK lacks: extended precision, and least squares with q >= 0."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import nnls

Array = NDArray[Any]


def inverse_of(A: Array) -> Array:
    """Inverts a positive semi-definite A by Gauss-Jordan; zeros for dependent rows."""
    n = len(A)
    table = np.hstack([A, np.eye(n, dtype=A.dtype)])
    dependent = np.zeros(n, dtype=bool)
    for k in range(n):
        if table[k, k] <= n * np.finfo(A.dtype).eps:
            dependent[k] = True
            table[k] = 0
            table[:, k] = 0
            continue
        table[k] /= table[k, k]
        others = table[:, k].copy()
        others[k] = 0
        table -= np.outer(others, table[k])
    inverse = table[:, n:]
    inverse[dependent] = inverse[:, dependent] = 0
    return inverse


def solve_refined(A: Array, inverse: Array, right: Array) -> Array:
    """Solves A x = right with iterative refinement."""
    solved = inverse @ right
    for _ in range(3):
        solved += inverse @ (right - A @ solved)
    return solved


def nonnegative_least_squares(A: Array, right: Array) -> tuple[Array, float]:
    """Minimises |A x - right| over x >= 0; returns x and the norm, or inf on failure."""
    if A.shape[1] == 0:  # crashes scipy
        return np.zeros(0), float(np.linalg.norm(right))
    try:
        x, norm = nnls(A, right)
    except RuntimeError:  # too many iterations
        return np.zeros(A.shape[1]), np.inf
    return x, float(norm)
