r"""Finds the certified minimiser closest to the weights from the support of a solution.

With the unit gradients :math:`\hat g_i = g_i / D_i`, their cosines C, and
:math:`b_i = \langle \hat g_i, \hat g_0 \rangle`, the subproblem is to minimise
:math:`\sum_i p_i D_i b_i + c |\sum_i p_i D_i \hat g_i|` over the simplex. Its dual is

.. math:: \max_{\nu, d} \; \nu \quad \text{s.t.} \quad \langle \hat g_i, d \rangle \ge \nu / D_i,
          \quad |d - \hat g_0| \le c, \qquad d = \hat g_0 + \sum_i q_i \hat g_i, \; q \ge 0.

The vector d near the weighted gradient is best for the worst-off loss. Then
:math:`p \propto q / D`, and :math:`y = (d - \hat g_0) / c` is the direction of :math:`G_p`, or
a subgradient of the norm if :math:`G_p = 0`.

**Why a certificate.** Any y with :math:`|y| \le 1` bounds the minimum from below, by
:math:`\min_i D_i (b_i + c \langle \hat g_i, y \rangle)`, because :math:`|G_p|` is at least the
product of :math:`G_p` and y. A wrong y makes the gap larger, never false. So every step below may
guess: it proposes a point with a y, and the first proposal with a tight gap wins.

**Why several proposals.** Each proposal solves a problem of floating point. (1) If gradients are
dependent, several p are optimal. They share the image :math:`G_p`, and the one closest to w is a
projection (`_closest`). (2) Near :math:`G_p = 0` the direction of :math:`G_p` is only rounding,
but the level :math:`\nu` is accurate, and the optimality conditions give y from it (`_refined`).
(3) At :math:`G_p = 0` the norm has a kink. There y is free, and the cone of directions in which
no loss rises gives it (`points_at_zero`).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from raco_optim._checks import ZERO
from raco_optim.subproblem.linear_algebra import (
    inverse_of,
    nonnegative_least_squares,
    solve_refined,
)

Array = NDArray[Any]
Point = tuple[Array, Array]
"""p, and <g_i, y> / D_i."""

EPS = float(np.finfo(np.float64).eps)
# Squared sines below this are rounding of the Gram matrix: the gradients count as dependent.
DEPENDENT = 1e-13
# Reduced costs below this count as zero; a hundredth of the gap in the documentation.
TIGHT = 1e-11
# Squared norms below this, relative to the terms that cancelled, lack digits in float64.
FEW_DIGITS = 1e-8
# Below this |G_p| / sum_i p_i |g_i|, the hull of the gradients may contain zero.
_NEAR_ZERO = 1e-5


class Problem(NamedTuple):
    """A dimensionless subproblem, in extended precision if float64 has too few digits."""

    C: Array  # cosines of the gradients, [m, m], with a unit diagonal
    D: Array  # norms of the gradients relative to the largest, [m], in [0, 1]
    b: Array  # cosines of the gradients and g_0, [m]; 0 for the min-norm point
    c: float  # radius, > 0
    w: Array  # weights, [m]


class Solution(NamedTuple):
    """A point of the simplex, Phi, its Frank-Wolfe gap and the squared norm of G_p there."""

    p: Array
    value: float
    gap: float
    squared_norm: float


class DualSolution(NamedTuple):
    """q, the level nu, the slack of every loss, and whether p is certainly the only minimiser."""

    q: Array
    level: float
    slack: Array
    unique: bool


def first_certified(problem: Problem, points: Iterable[Point]) -> Solution | None:
    """Returns the first point with a tight certificate, else the one with the smallest gap."""
    best: Solution | None = None
    for p, y in points:
        solution = certify(problem, p, y)
        if best is None or solution.gap < best.gap:
            best = solution
        if best.gap <= TIGHT:
            break
    return best


def certify(problem: Problem, p: Array, y: Array) -> Solution:
    """Bounds Phi(p) minus the minimum by the gap.

    Any y of norm <= 1 gives a bound, Phi(p) - min_i D_i (b_i + c <g_i, y> / D_i); the direction of
    G_p gives the Frank-Wolfe gap. If G_p is zero up to rounding, its norm may count as zero.
    """
    C, D, b, c, _ = problem
    weighted = D * p
    image = C @ weighted
    squared_norm = weighted @ image
    linear = weighted @ b
    value, gap = float(linear), math.inf
    if squared_norm > 0:
        norm = math.sqrt(squared_norm)
        value = float(linear + c * norm)
        gap = value - float((D * (b + c * (image / norm))).min())
    if not gap <= TIGHT:
        derivative = D * (b + c * y)
        if squared_norm <= ZERO * weighted.sum() ** 2:
            value = min(value, float(p @ derivative))
        gap = min(gap, value - float(derivative.min()))
    return Solution(p, float(value), max(float(gap), 0.0), float(squared_norm))


def equal_where_tied(p: list[float], rows: list[list[float]], w: list[float]) -> list[float]:
    """Gives equal gradients of equal weight equal shares, to the bit: their mean.

    That is the point closest to w among those with the same G_p; rounding leaves 1e-15 of it.
    """
    tied: dict[tuple[float, ...], list[int]] = {}
    for i, row in enumerate(rows):
        tied.setdefault((w[i], *row), []).append(i)
    shares = [math.fsum(p[i] for i in group) / len(group) for group in tied.values()]
    share = {i: x for group, x in zip(tied.values(), shares, strict=True) for i in group}
    return [share[i] for i in range(len(p))]


def points_on_support(problem: Problem, support: Array) -> Iterator[Point]:
    """Yields candidate points for a support that another solver found."""
    C, D, b, _, _ = problem
    support = support & (D > 0)
    if not support.any():
        yield from points_at_zero(problem)
        return
    refined = _refined(problem, support.astype(C.dtype))
    if refined is not None:
        yield from points_of(problem, refined[0])


def points_of(problem: Problem, dual: DualSolution) -> Iterator[Point]:
    """Yields candidate points for a dual solution, the preferred one first."""
    C, D, _, c, w = problem
    # With a zero gradient the level is at most zero.
    if c < _NEAR_ZERO * dual.q.sum() or (dual.level >= 0 and not D.all()):
        yield from points_at_zero(problem)
    p, y = _primal(problem, dual.q)
    if not dual.unique:
        # The minimisers are the p on the tight losses whose G_p points along y.
        tight = (dual.q > 0) | (dual.slack <= TIGHT * (1 + abs(dual.level)))
        yield _closest(w, p, tight, C - np.outer(y, y), D), y
    yield p, y
    refined = _refined(problem, dual.q)
    if refined is not None:
        yield _primal(problem, refined[0].q)[0], refined[1]


def _primal(problem: Problem, q: Array) -> Point:
    p = q / np.where(problem.D > 0, problem.D, 1)
    return p / p.sum(), _subgradient(problem, q)


def _subgradient(problem: Problem, q: Array) -> Array:
    image = problem.C @ q
    return image / max(problem.c, math.sqrt(max(q @ image, 0.0)))  # |y| <= 1 for any q


def indefiniteness(cosines: Array) -> float:
    """Returns a number whose addition to the diagonal makes the matrix positive definite."""
    return 4 * len(cosines) * EPS + 2 * max(0.0, -float(np.linalg.eigvalsh(cosines)[0]))


def _refined(problem: Problem, q: Array) -> tuple[DualSolution, Array] | None:
    """Solves the optimality conditions on the support of q again, without inflation of C.

    Returns the dual solution and y, or None if the solution has negative entries. On the support, y
    comes from the conditions: near zero in the hull q is long, and C q would lose the digits that
    the level still has.
    """
    C, D, b, c, _ = problem
    index = q.nonzero()[0]
    inverse = inverse_of(C[np.ix_(index, index)])
    independent = inverse.diagonal() > 0
    index, inverse = index[independent], inverse[np.ix_(independent, independent)]
    rows, e = C[np.ix_(index, index)], 1 / D[index]
    u, start = solve_refined(rows, inverse, np.array((e, -b[index])).T).T
    eu, eq = e @ u, e @ start
    discriminant = eq * eq - eu * (-b[index] @ start - c * c)
    if discriminant < 0 or eu <= 0:
        return None
    level = (np.sqrt(discriminant) - eq) / eu
    for _ in range(3):  # Newton, because eu and eq are inaccurate if u is long
        inside, conditions = start + level * u, level * e - b[index]
        distance = np.sqrt(np.maximum(inside @ conditions, 0))
        if distance > 0:
            level += (c - distance) * distance / (e @ inside)
    inside = start + level * u
    size = np.abs(inside).sum()
    # An error of N^2 moves the level by 1 / (2 e q) of the error, which is tiny if q is long.
    error = abs(inside @ (rows @ inside) - c * c)
    if inside.min() < -EPS * size or not error <= min(c * c / 2, TIGHT * (e @ inside)):
        return None
    refined = np.zeros_like(D)
    refined[index] = np.maximum(inside, 0)
    y = C @ refined / c
    y[index] = (level * e - b[index]) / c
    slack = np.where(D > 0, b + c * y - level / np.where(D > 0, D, 1), -level)
    return DualSolution(refined, float(level), slack, unique=False), y


def points_at_zero(problem: Problem) -> Iterator[Point]:
    """Yields candidate points with G_p = 0, if the optimum is there.

    It is optimal if zero is in the hull of the gradients and the cone {d: <g_i, d> >= 0} comes
    within c of g_0; the nearest point of the cone gives the subgradient.
    """
    C, D, b, c, w = problem
    m = len(w)
    cosines = C.astype(np.float64)
    np.fill_diagonal(cosines, 1 + indefiniteness(cosines))
    R = np.linalg.cholesky(cosines).T
    target = np.linalg.solve(R.T, b.astype(np.float64))
    q, _ = nonnegative_least_squares(R, -target)
    distance = float(np.linalg.norm(R @ q))
    if distance > c * (1 + 1e-12):
        return
    zero = D == 0
    tight = zero | (q > 0) | (b + C @ q <= TIGHT)
    if zero.any():
        p = zero / zero.sum()
    else:
        columns = np.vstack([R[:, tight], np.ones(tight.sum())])
        z, residual = nonnegative_least_squares(columns, np.append(np.zeros(m), 1.0))
        if residual > math.sqrt(DEPENDENT):
            return
        p = np.zeros(m)
        p[tight] = z / D[tight]
        p /= p.sum()
    support = q.nonzero()[0]
    rows = C[np.ix_(support, support)]
    refined = np.zeros_like(D)
    refined[support] = np.maximum(solve_refined(rows, inverse_of(rows), -b[support]), 0)
    closest = _closest(w, p, tight, C, D)
    yield closest, _subgradient(problem, q)
    yield closest, _subgradient(problem, refined)
    yield p, _subgradient(problem, q)


def _closest(w: Array, p: Array, tight: Array, metric: Array, D: Array) -> Array:
    """Returns the point closest to w among the points with the support and the image of p.

    These are p + z with z zero outside `tight`, sum z = 0 and D z in the null space of `metric`:
    a least-distance problem (Lawson and Hanson, Solving Least Squares Problems, chapter 23).
    """
    index = tight.nonzero()[0]
    D, p = D.astype(np.float64), p.astype(np.float64)
    free = D[index] == 0  # a zero gradient may have any share
    inner = metric[np.ix_(index, index)].astype(np.float64)
    inner[free] = inner[:, free] = 0
    values, vectors = np.linalg.eigh(inner)
    null = vectors[:, values <= DEPENDENT * len(index)]
    null = null / np.where(free, 1, D[index])[:, None]
    null /= np.abs(null).max(axis=0)
    sums = null.sum(axis=0, keepdims=True)
    if np.abs(sums).max(initial=0) > EPS * len(index):
        null = null @ np.linalg.svd(sums)[2][1:].T
    if null.shape[1] == 0:
        return p
    basis = np.linalg.qr(null)[0]
    start = p[index]
    nearest = start + basis @ (basis.T @ (w[index] - start))
    if nearest.min() < -EPS:
        # Nearest point of the polytope {nearest + basis x >= 0} to x = 0, by its dual. Without
        # losses that can't move, because columns of rounding errors mislead scipy.
        movable = np.abs(basis).max(axis=1) > math.sqrt(EPS)
        rows = np.vstack([basis[movable].T, -nearest[movable]])
        target = np.append(np.zeros(basis.shape[1]), 1.0)
        residual = rows @ nonnegative_least_squares(rows, target)[0] - target
        if residual[-1] > -math.sqrt(EPS):
            return p
        nearest = nearest - basis @ (residual[:-1] / residual[-1])
    closest = np.zeros_like(p)
    closest[index] = np.maximum(nearest, 0)
    closest /= closest.sum()
    return closest
