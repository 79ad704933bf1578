r"""The exact solver of the subproblem for any number of losses.

It solves the dual in `certificate`. For a fixed level :math:`\nu`, the dual seeks the shortest
:math:`N = |\sum_i q_i \hat g_i|` that lifts every loss to the level. This is a least-distance
problem, and :math:`N(\nu)` is convex and increasing. So Newton's method on :math:`N(\nu) = c`
descends from a level that is too high and never overshoots. The lowest vertex of the simplex gives
this first level, and is often the solution.

**Why the level is not fixed in advance.** On a given support q is linear in the level. So one
factorisation serves all levels of a support, and on the last support the equation
:math:`N(\nu) = c` is quadratic: the level has a closed form.

**Why block pivoting, and why not only that.** Exchanging all violating losses at once finds most
supports in two or three rounds, but may cycle. If the number of violating losses has not fallen
for some rounds, Lawson and Hanson's method, which is slower but can't cycle, solves the level.

**Why neighbours of C.** Dependent gradients make C singular, and a Gram matrix from float32 sums
may be indefinite. Adding a multiple of the identity of the size of its rounding makes C definite.
The solution for this neighbour is a guess, which `certificate` judges with C itself.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
from scipy.linalg.lapack import dposv

from raco_optim.subproblem.certificate import (
    DEPENDENT,
    EPS,
    TIGHT,
    Array,
    DualSolution,
    Problem,
    Solution,
    first_certified,
    indefiniteness,
    points_of,
)
from raco_optim.subproblem.linear_algebra import nonnegative_least_squares

# A radius below this makes q a small difference of long vectors.
_SMALL = 1e-6


def solve_active_set(problem: Problem) -> Solution | None:
    """Returns the certified minimiser closest to w; None if the support does not settle."""
    m = len(problem.w)
    C, D, b = (x.astype(np.float64, copy=False) for x in problem[:3])
    present = (D > 0).nonzero()[0]
    if len(present) < m:
        C, D, b = C[np.ix_(present, present)], D[present], b[present]
    best: Solution | None = None
    for part in _duals(C, 1 / D, b, problem.c):
        q, slack = np.zeros(m), np.full(m, -part.level)
        q[present], slack[present] = part.q, part.slack
        dual = DualSolution(q, part.level, slack, part.unique)
        solution = first_certified(problem, points_of(problem, dual))
        if solution is not None and (best is None or solution.gap < best.gap):
            best = solution
        if best is not None and best.gap <= TIGHT:
            break
    return best


def _duals(C: Array, e: Array, b: Array, c: float) -> Iterator[DualSolution]:
    """Yields the dual solution for C, then for neighbours of C with a larger diagonal."""
    found = _search(C, e, b, c)
    if found is not None:
        yield found
    rounding, lacking = 4 * len(e) * EPS, indefiniteness(C)
    C = C.copy()
    for inflation in (rounding, lacking, 1e-13 + lacking, 1e-12 + lacking, 1e-9 + lacking):
        np.fill_diagonal(C, 1 + inflation)
        found = _search(C, e, b, c)
        if found is not None:
            yield found


def _search(C: Array, e: Array, b: Array, c: float) -> DualSolution | None:
    """Finds the support of the dual solution, ``e = 1 / D``; None if C is singular on the way."""
    m = len(e)
    vertices = (b + c) / e
    best = int(vertices.argmin())
    level = float(vertices[best])
    slack = b + c * C[best] - level * e
    slack[best] = 0
    tolerance = EPS * 8 * m * (1 + abs(level) * e)
    support = slack < -tolerance
    if not support.any():
        q = np.zeros(m)
        q[best] = c
        slack[best] = np.inf
        unique = bool((slack > TIGHT * (1 + abs(level) * e)).all())
        slack[best] = 0
        return DualSolution(q, level, slack, unique)
    support[best] = True

    # The number of violating losses may stagnate for three rounds.
    fewest, patience, settled = m + 1, 3, False
    for _ in range(20 + 2 * m):
        index = support.nonzero()[0]
        # q is linear in the level. Starting at level 0 is accurate if the level is small (a hull
        # that nearly contains zero), starting at the level itself if q is small (small c).
        base = 0.0 if c > _SMALL else level
        rows, missing = C[:, index], base * e - b
        factor, solved, failed = dposv(rows[index], np.array((e[index], missing[index])).T)
        if failed:
            return None
        u, q = solved.T
        line = _Line(index, u, q, rows @ u - e, rows @ q - missing, base, e)

        # N(base + t)^2 = |sum_i (q + t u)_i g_i|^2 = t^2 eu + 2 t eq + q.Cq
        eu, eq = float(e[index] @ u), float(e[index] @ q)
        qq = float(missing[index] @ q)
        discriminant = eq * eq - eu * (qq - c * c)
        if discriminant >= 0:
            step = (math.sqrt(discriminant) - eq) / eu
            violating, q, slack = line.at(step)
            if not violating.any():
                full = np.zeros(m)
                full[index] = np.maximum(q, 0)
                slack[index] = np.inf
                pivots = factor.diagonal()
                unique = pivots.min() ** 2 > DEPENDENT and bool(
                    (slack > TIGHT * (1 + abs(base + step) * e)).all()
                )
                slack[index] = 0
                return DualSolution(full, base + step, slack, unique)
        t = level - base
        violating, q, _ = line.at(t)
        if settled or not violating.any():
            distance = math.sqrt(max(t * t * eu + 2 * t * eq + qq, 0.0))
            slope = t * eu + eq
            if slope <= 0:
                return None
            level -= (distance - c) * distance / slope
            violating, q, _ = line.at(level - base)
            fewest, patience, settled = m + 1, 3, False
        count = int(violating.sum())
        if count < fewest:
            fewest, patience = count, 3
        elif patience:
            patience -= 1
        else:
            settled = True
            try:
                R = np.linalg.cholesky(C).T
            except np.linalg.LinAlgError:
                return None
            q, _ = nonnegative_least_squares(R, np.linalg.solve(R.T, level * e - b))
            support, violating = q > 0, np.zeros(m, dtype=bool)
        support = support ^ violating
        if not support.any():
            support[best] = True
    return None


class _Line(NamedTuple):
    """q + t u on a support, the slacks of all losses, and the level at t = 0."""

    support: Array
    u: Array
    q: Array
    slack_u: Array
    slack_q: Array
    base: float
    e: Array

    def at(self, t: float) -> tuple[Array, Array, Array]:
        """Returns which losses violate optimality at t, q on the support, and the slacks."""
        q = self.q + t * self.u
        slack = self.slack_q + t * self.slack_u
        rounding = 8 * len(self.e) * EPS
        magnitude = np.abs(self.q).sum() + abs(t) * np.abs(self.u).sum()
        # On the support the slacks are zero except for rounding, which gives its size.
        error = 4 * np.abs(slack[self.support]).max()
        violating = slack < -error - rounding * (1 + abs(self.base + t) * self.e)
        violating[self.support] = q < -rounding * magnitude
        return violating, q, slack
