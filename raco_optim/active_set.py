r"""The exact solver of the subproblem: a closed form for two losses, an active set beyond.

With the unit gradients :math:`\hat g_i = g_i / D_i` and their cosines C, the dual of the
subproblem asks for the vector d near the weighted gradient that serves the worst-off loss best:

.. math:: \max_{\nu, d} \; \nu \quad \text{s.t.} \quad \langle \hat g_i, d \rangle \ge \nu / D_i,
          \quad |d - \hat g_0| \le c, \qquad d = \hat g_0 + \sum_i q_i \hat g_i, \; q \ge 0

and :math:`p \propto q / D`. At a fixed level :math:`\nu` this is a least-distance problem, solved
by block principal pivoting on the support of q. Its distance :math:`N(\nu)` is convex and
increasing, so Newton's method descends monotonically on the level where it is c. A factorisation
serves every level of its support, so that the last support gives the level in closed form.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy.linalg.lapack import dposv
from scipy.optimize import nnls

from raco_optim._checks import ZERO

Array = NDArray[np.float64]

_EPS = float(np.finfo(np.float64).eps)
# Squared sines below this are rounding of the Gram matrix: the gradients count as dependent.
_DEPENDENT = 1e-13
# Reduced costs below this count as zero; a hundredth of the gap that is certified.
_TIGHT = 1e-11
# Below this |G_p| / sum_i p_i |g_i|, the hull of the gradients may hold zero.
_NEAR_ZERO = 1e-5


class _Support(NamedTuple):
    """A solution of the optimality conditions and whether it is plainly the only one."""

    q: Array
    level: float
    slack: Array
    unique: bool


def solve_two(
    h11: float, h12: float, h22: float, w: list[float], c: float
) -> tuple[float, float, float]:
    """Returns the first entry of p, and the two derivatives of Phi at p, for two losses.

    At a vertex the derivatives decide. Between them, along the line g_2 + t (g_1 - g_2), Phi is
    a line plus a hyperbola with its vertex at the point t0 nearest to the origin,

        Phi(t) = |g_0| l (kappa t + c sqrt((t - t0)^2 + delta^2 / l^2)) + constant,

    l = |g_1 - g_2|, kappa = cos(g_0, g_1 - g_2), delta the distance of the line from the origin.
    All is expressed in h11 - h12 and h22 - h12 (or the sums, for opposed gradients), which are
    exact where they are small: products of norms would lose what tells the gradients apart.
    """
    w1, w2 = w
    n1, n2 = math.sqrt(h11), math.sqrt(h22)
    a1, a2 = h11 - h12, h22 - h12
    norm_g0 = math.sqrt(w1 * w1 * h11 + 2 * w1 * w2 * h12 + w2 * w2 * h22)
    s = c * norm_g0
    slope = w1 * a1 - w2 * a2
    if max(abs(a1), abs(a2)) <= ZERO * max(h11, h22):
        p1 = w1  # one gradient twice: every p is a minimiser, and w is the closest to w
    elif n1 > 0 and slope * n1 + s * a1 <= 0:
        p1 = 1.0
    elif n2 > 0 and s * a2 - slope * n2 <= 0:
        p1 = 0.0
    else:
        squared_length = a1 + a2
        if h12 > 0:
            determinant = h12 * squared_length + a1 * a2
        else:
            s1, s2 = h11 + h12, h22 + h12
            determinant = s1 * s2 - h12 * (s1 + s2)
        kappa = slope / (norm_g0 * math.sqrt(squared_length))
        if abs(kappa) < c:
            shift = kappa * math.sqrt(max(determinant, 0.0) / (c * c - kappa * kappa))
            p1 = min(max((a2 - shift) / squared_length, 0.0), 1.0)
        else:
            p1 = 0.0 if kappa > 0 else 1.0
    p2 = 1.0 - p1
    if h12 > 0:
        f1, f2 = h12 + p1 * a1, h12 + p2 * a2
    else:
        f1, f2 = p1 * (h11 + h12) + h12 * (p2 - p1), p2 * (h22 + h12) + h12 * (p1 - p2)
    b1, b2 = w1 * h11 + w2 * h12, w1 * h12 + w2 * h22
    squared_norm = p1 * f1 + p2 * f2
    if squared_norm > ZERO * (p1 * n1 + p2 * n2) ** 2:
        ratio = s / math.sqrt(squared_norm)
        return p1, b1 + ratio * f1, b2 + ratio * f2
    if b1 >= 0 and b2 >= 0:
        return p1, b1, b2  # the subgradient of |G_p| at zero that is zero
    return p1, 0.0, 0.0  # the one that cancels g_0, within reach because c >= 1


def solve_active_set(C: Array, D: Array, b: Array, c: float, w: Array) -> tuple[Array, Array]:
    r"""Minimises :math:`\sum_i p_i D_i b_i + c |\sum_i p_i D_i \hat g_i|` on the simplex.

    Args:
        C: Cosines of the gradients, ``[m, m]``, with a unit diagonal.
        D: Norms of the gradients relative to the largest, ``[m]``, in [0, 1].
        b: Cosines of the gradients and g_0, ``[m]``; 0 for the min-norm point.
        c: Radius, > 0.
        w: Weights, ``[m]``.

    Returns:
        p, ``[m]``, the minimiser closest to w where there are several; and
        :math:`\langle \hat g_i, y \rangle`, ``[m]``, for the subgradient y of the norm at G_p that
        certifies it.
    """
    solution: tuple[Array, Array] | None = None
    smallest = math.inf
    for p, y in _candidates(C, D, b, c, w):
        _, gap = certificate(C, D, b, c, p, y)
        if gap < smallest:
            solution, smallest = (p, y), gap
        if gap <= _TIGHT:
            break
    assert solution is not None
    return solution


def _candidates(
    C: Array, D: Array, b: Array, c: float, w: Array
) -> Iterator[tuple[Array, Array]]:
    """Yields p and y, the preferred one first; the next one counts if that has no certificate."""
    m = len(w)
    C = C.copy()
    # At the size of the rounding errors of C, so that dependent gradients can be factorised.
    np.fill_diagonal(C, 1 + 4 * m * _EPS)
    nonzero = D > 0
    if nonzero.all():
        found = _search(C, 1 / D, b, c)
    else:
        part = _search(C[nonzero][:, nonzero], 1 / D[nonzero], b[nonzero], c)
        q, slack = np.zeros(m), np.full(m, -part.level)
        q[nonzero], slack[nonzero] = part.q, part.slack
        found = _Support(q, part.level, slack, part.unique)
    # A zero gradient allows no level above zero.
    if c < _NEAR_ZERO * found.q.sum() or (found.level >= 0 and not nonzero.all()):
        yield from _at_zero(C, D, b, c, w)
    p = np.divide(found.q, D, out=np.zeros(m), where=nonzero)
    p /= p.sum()
    y = C @ found.q / c
    if not found.unique:
        # The minimisers are the p on the tight losses whose G_p points along y.
        tight = (found.q > 0) | (found.slack <= _TIGHT * (1 + abs(found.level)))
        yield _closest(w, p, tight, C - np.outer(y, y), D), y
    yield p, y


def certificate(
    C: Array, D: Array, b: Array, c: float, p: Array, y: Array
) -> tuple[float, float]:
    """Returns Phi(p) and its Frank-Wolfe gap; `y` is the subgradient of |G_p| where G_p = 0."""
    weighted = D * p
    image = C @ weighted
    squared_norm = float(weighted @ image)
    if squared_norm > ZERO * weighted.sum() ** 2:
        y = image / math.sqrt(squared_norm)
    derivative = D * (b + c * y)
    value = float(p @ derivative)
    return value, value - float(derivative.min())


def _search(C: Array, e: Array, b: Array, c: float) -> _Support:
    """Finds the support of the dual solution; ``e = 1 / D``."""
    m = len(e)
    vertices = (b + c) / e
    best = int(vertices.argmin())
    level = float(vertices[best])
    slack = b + c * C[best] - level * e
    slack[best] = 0
    tolerance = _EPS * 8 * m * (1 + abs(level) * e)
    support = slack < -tolerance
    if not support.any():
        q = np.zeros(m)
        q[best] = c
        slack[best] = np.inf
        return _Support(q, level, slack, bool((slack > _TIGHT * (1 + abs(level) * e)).all()))
    support[best] = True

    # Exchange all violating losses at once while that lowers their number (patience: a few
    # rises); else only the last one, a rule under which no support comes back.
    fewest, patience = m + 1, 3
    for _ in range(20 + 10 * m):
        index = support.nonzero()[0]
        rows = C[:, index]
        factor, solved, _ = dposv(rows[index], np.array((e[index], b[index])).T)
        u, v = solved.T
        eu, ev, bv = float(e[index] @ u), float(e[index] @ v), float(b[index] @ v)
        images = rows @ solved

        discriminant = ev * ev - eu * (bv - c * c)
        if discriminant >= 0:
            root = (ev + math.sqrt(discriminant)) / eu
            violating, q, slack = _violations(root, index, u, v, images, b, e)
            if not violating.any():
                full = np.zeros(m)
                full[index] = np.maximum(q, 0)
                slack[index] = np.inf
                pivots = factor.diagonal()
                unique = pivots.min() ** 2 > _DEPENDENT and bool(
                    (slack > _TIGHT * (1 + abs(root) * e)).all()
                )
                return _Support(full, root, slack, unique)
        violating, q, _ = _violations(level, index, u, v, images, b, e)
        if not violating.any():
            distance = math.sqrt(max(level * level * eu - 2 * level * ev + bv, 0.0))
            level -= (distance - c) * distance / (level * eu - ev)
            violating, q, _ = _violations(level, index, u, v, images, b, e)
            fewest, patience = m + 1, 3
        count = int(violating.sum())
        if count < fewest:
            fewest, patience = count, 3
        elif patience:
            patience -= 1
        else:
            last = violating.nonzero()[0][-1]
            violating[:] = False
            violating[last] = True
        support = support ^ violating
        if not support.any():
            support[best] = True
    raise ArithmeticError(f"the active set of {m} losses did not settle")


def _violations(
    level: float, index: Array, u: Array, v: Array, images: Array, b: Array, e: Array
) -> tuple[Array, Array, Array]:
    """Returns which losses violate optimality at `level`, q on the support, and the slacks."""
    q = level * u - v
    slack = b + level * images[:, 0] - images[:, 1] - level * e
    magnitude = float(np.abs(q).sum())
    violating = slack < -_EPS * 8 * len(e) * (1 + magnitude + abs(level) * e)
    violating[index] = q < -_EPS * 8 * magnitude
    return violating, q, slack


def _at_zero(C: Array, D: Array, b: Array, c: float, w: Array) -> Iterator[tuple[Array, Array]]:
    """Yields the solutions with G_p = 0, if the optimum is there.

    It is optimal if zero is in the hull of the gradients and the cone {d: <g_i, d> >= 0} comes
    within c of g_0; the nearest point of the cone gives the subgradient.
    """
    m = len(w)
    R = np.linalg.cholesky(C).T
    target = np.linalg.solve(R.T, b)
    q, _ = nnls(R, -target)
    distance = float(np.linalg.norm(R @ q))
    if distance > c * (1 + 1e-12):
        return
    zero = D == 0
    tight = zero | (q > 0) | (b + C @ q <= _TIGHT)
    if zero.any():
        p = zero / zero.sum()
    else:
        columns = np.vstack([R * tight, tight])
        z, residual = nnls(columns, np.append(np.zeros(m), 1.0))
        if residual > math.sqrt(_DEPENDENT):
            return
        p = z * tight / D
        p /= p.sum()
    y = C @ q / c
    yield _closest(w, p, tight, C, D), y
    yield p, y


def _closest(w: Array, p: Array, tight: Array, metric: Array, D: Array) -> Array:
    """Returns the point closest to w among those that share support and image with p.

    They are p + z with z zero outside `tight`, sum z = 0 and D z in the null space of `metric`:
    a least-distance problem (Lawson and Hanson, Solving Least Squares Problems, chapter 23).
    """
    index = tight.nonzero()[0]
    free = D[index] == 0  # a zero gradient may have any share
    inner = metric[np.ix_(index, index)].copy()
    inner[free] = inner[:, free] = 0
    values, vectors = np.linalg.eigh(inner)
    null = vectors[:, values <= _DEPENDENT * len(index)]
    null = null / np.where(free, 1, D[index])[:, None]
    null /= np.abs(null).max(axis=0)
    sums = null.sum(axis=0, keepdims=True)
    if np.abs(sums).max(initial=0) > _EPS * len(index):
        null = null @ np.linalg.svd(sums)[2][1:].T
    if null.shape[1] == 0:
        return p
    basis = np.linalg.qr(null)[0]
    start = p[index]
    nearest = start + basis @ (basis.T @ (w[index] - start))
    if nearest.min() < 0:
        # Nearest point of the polytope {nearest + basis x >= 0} to x = 0, by its dual.
        rows = np.vstack([basis.T, -nearest])
        target = np.append(np.zeros(basis.shape[1]), 1.0)
        residual = rows @ nnls(rows, target)[0] - target
        if residual[-1] > -math.sqrt(_EPS):
            return p
        nearest = nearest - basis @ (residual[:-1] / residual[-1])
    closest = np.zeros_like(p)
    closest[index] = np.maximum(nearest, 0)
    return closest / closest.sum()
