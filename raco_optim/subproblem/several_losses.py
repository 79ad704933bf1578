"""Prepares a Gram matrix for the solvers on the CPU.

The cosines C of the gradients, their norms D relative to the largest, and the cosines b with the
weighted gradient have no scale, so tolerances need none. If float64 loses too many digits, extended
precision follows, which is about ten times slower.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from raco_optim._checks import ZERO, check_gram_values
from raco_optim.subproblem.active_set import solve_active_set
from raco_optim.subproblem.certificate import FEW_DIGITS, Array, Problem, certify
from raco_optim.subproblem.slsqp import solve_slsqp


def solve_several(
    values: Array, weights: list[float], c: float, solver: str
) -> tuple[list[float], float, float]:
    """Returns p, Phi(p) and the relative gap for the Gram matrix `values`, float64."""
    w = np.array(weights)
    solution = _solve_in(np.float64, values, w, c, solver)
    if solution is None:
        solution = _solve_in(np.longdouble, values, w, c, solver)
        assert solution is not None
    p, value, gap = solution
    return p.tolist(), value, gap


def _solve_in(
    dtype: type[np.floating[Any]], values: Array, w: Array, c: float, solver: str
) -> tuple[Array, float, float] | None:
    """Returns p, Phi(p) and the gap; None if g_0 or G_p cancels too much for `dtype`."""
    extended = dtype is np.longdouble
    scale, C, D = cosines(values.astype(dtype, copy=False))
    weighted = D * w
    image = C @ weighted
    squared_g0, size = weighted @ image, weighted.sum()
    if not extended and squared_g0 < FEW_DIGITS * size * size:
        return None
    if squared_g0 <= ZERO * size * size:
        return w, 0.0, 0.0
    norm_g0 = np.sqrt(squared_g0)
    b = image / norm_g0
    problem = Problem(C, D, b, c, w)
    if c == 0:
        solution = certify(problem, _closest_on_face(D * b, w), b)
    else:
        exact = solve_active_set(problem) if solver == "exact" else None
        solution = exact or solve_slsqp(problem)
    few_digits = c > 0 and solution.squared_norm < FEW_DIGITS * (D @ solution.p) ** 2
    if few_digits and not extended:
        return None
    return solution.p, solution.value * float(norm_g0) * scale * scale, solution.gap


def cosines(values: Array) -> tuple[float, Array, Array]:
    """Returns the largest norm, the cosines, and the relative norms; or raises `ValueError`."""
    with np.errstate(all="ignore"):  # checked below
        norms = np.sqrt(values.diagonal())
        scale = norms.max()
        D = norms / scale if scale > 0 else norms
        # A gradient that is 100 orders of magnitude smaller than the largest counts as zero.
        zero = None if D.min() > 1e-100 else ~(D > 1e-100)
        lengths = norms if zero is None else np.where(zero, np.inf, norms)
        raw = values / lengths[:, None] / lengths
        C = (raw + raw.T) / 2
        plausible = np.abs(raw).max() <= 1 + 1e-4 and np.abs(raw - C).max() <= 5e-5
        if zero is not None:
            plausible = plausible and np.abs(values[zero]).max() <= 1e-4 * scale * scale
            D = np.where(zero, 0, D)
    if not (plausible and math.isfinite(scale)):
        check_gram_values(values.astype(np.float64).tolist())
    C = C.clip(-1, 1)
    np.fill_diagonal(C, 1)
    return float(scale), C, D


def _closest_on_face(derivative: Array, w: Array) -> Array:
    """Returns the minimiser of a linear function on the simplex that is closest to w."""
    face = derivative <= derivative.min() + 1e-15
    p: Array = np.where(face, w, 0.0)
    p += face * (1 - p.sum()) / face.sum()
    return p
