"""From a Gram matrix to the dimensionless numbers that the solvers on the host are given.

They are the cosines C of the gradients, their norms D relative to the largest, and the cosines b
of the gradients with the weighted gradient. So no tolerance depends on the scale of the gradients,
and gradients of very different norms lose no digits. Float64 comes first. Extended precision
follows where float64 has lost too many digits; it costs about ten times as much.
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
    """Returns p, Phi(p) and the gap, or None if they need more digits than `dtype` has.

    They do if g_0 or G_p is a small difference of long gradients. (Where the platform has no
    extended precision, the gap tells.)
    """
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
    """Returns the largest norm, the cosines with a unit diagonal, and the relative norms.

    Raises `ValueError` if the values are not those of a Gram matrix.
    """
    with np.errstate(all="ignore"):  # the check below says what is wrong with the values
        norms = np.sqrt(values.diagonal())
        scale = norms.max()
        D = norms / scale if scale > 0 else norms
        # A gradient that is smaller by 100 orders of magnitude is zero beside the others.
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
