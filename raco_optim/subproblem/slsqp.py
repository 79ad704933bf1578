"""The SLSQP solver of the subproblem: scipy's sequential quadratic programming."""

from __future__ import annotations

import math
from itertools import chain

import numpy as np
from scipy.optimize import minimize

from raco_optim.subproblem.certificate import (
    Array,
    Problem,
    Solution,
    first_certified,
    points_at_zero,
    points_on_support,
)

_SUPPORT = 1e-7


def solve_slsqp(problem: Problem) -> Solution:
    """Solves the subproblem: SLSQP finds the support, the optimality conditions the rest."""
    # It stops at a gap of about 1e-8, when the value no longer falls; the support is right by then.
    C, D, b = (x.astype(np.float64) for x in problem[:3])
    c, w = problem.c, problem.w
    linear, quadratic = D * b, D[:, None] * C * D

    def value_and_derivative(p: Array) -> tuple[float, Array]:
        image = quadratic @ p
        norm = math.sqrt(max(float(p @ image), 1e-300))
        return float(linear @ p) + c * norm, linear + c * image / norm

    start = min([w, *np.eye(len(w))], key=lambda p: value_and_derivative(p)[0])
    found = minimize(
        value_and_derivative,
        start,
        jac=True,
        method="SLSQP",
        bounds=[(0, 1)] * len(w),
        constraints={
            "type": "eq",
            "fun": lambda p: p.sum() - 1,
            "jac": lambda p: np.ones_like(p),
        },
        options={"ftol": 1e-16, "maxiter": 500},
    )
    p = np.clip(found.x, 0, None)
    z = D * p
    candidates = chain(
        points_on_support(problem, z > _SUPPORT * z.sum()),
        points_at_zero(problem),
        [(p / p.sum(), np.zeros_like(p))],
    )
    solution = first_certified(problem, candidates)
    assert solution is not None
    return solution
