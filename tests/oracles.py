"""Independent truth about the simplex subproblem. Slow, and nothing here imports raco_optim.

With G_p = sum_i p_i g_i, g0 = G_w and H the Gram matrix of the g_i, everything is about

    Phi(p) = p.(H w) + s |G_p|,   |G_p| = sqrt(p.H p),   s = c |g0|,   p on the simplex.

`grid_minimum` looks at it point by point, and `exact_minimum` solves it in 60 digits for a handful
of losses. At any number of losses, `certificate` bounds the suboptimality of a given p, and
`excess_gap` the part that the rounding of H cannot explain; `distance_to_closest` says how far a
minimiser is from the one closest to w.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import mpmath
import numpy as np
from scipy.optimize import nnls

# A context of its own: nobody else's precision is touched, and nobody touches ours.
mp = mpmath.MPContext()
mp.dps = 60
# Two numbers that agree to this are equal: far above the rounding of 60 digits, far below
# anything that float64 input without rounding can produce by accident.
_EQUAL = mp.mpf("1e-30")

Vector = list  # of mpf
Matrix = list  # of rows


def phi(gram: np.ndarray, weights: np.ndarray, c: float, p: np.ndarray) -> float:
    """Phi(p), evaluated in 60 digits: in float64, |G_p| loses all digits near G_p = 0."""
    H, w, q = _matrix(gram), _vector(weights), _vector(p)
    linear, s = _times(H, w), mp.mpf(c) * _norm(H, w)
    return float(_dot(q, linear) + s * _norm(H, q))


# --- Point by point ------------------------------------------------------------------------------


def grid_minimum(
    gram: np.ndarray, weights: np.ndarray, c: float, *, points: int = 60, zooms: int = 24
) -> tuple[np.ndarray, float]:
    """Minimises Phi over a grid on the simplex that closes in on its best point; m = 2 or 3.

    Returns the best point and its value. Phi is convex, so a window of several cells around the
    best point keeps a minimiser.
    """
    H, w = np.asarray(gram, float), np.asarray(weights, float)
    m = len(w)
    linear, s = H @ w, c * np.sqrt(max(w @ H @ w, 0.0))
    centre, radius = np.full(m - 1, 0.5), 0.5
    for _ in range(zooms):
        axes = [np.linspace(x - radius, x + radius, points + 1) for x in centre]
        free = np.stack(np.meshgrid(*axes), axis=-1).reshape(-1, m - 1).clip(0, 1)
        free = free[free.sum(axis=1) <= 1]
        p = np.column_stack([free, 1 - free.sum(axis=1)])
        values = p @ linear + s * np.sqrt(np.einsum("ki,ij,kj->k", p, H, p).clip(0))
        best = int(values.argmin())
        centre, radius = free[best], radius / 3
    return p[best], float(values[best])


# --- Exact, for a handful of losses --------------------------------------------------------------


@dataclass(frozen=True)
class Truth:
    """The least value, the minimiser closest to w, and whether it is the only one."""

    value: float
    p: np.ndarray
    unique: bool


def exact_minimum(gram: np.ndarray, weights: np.ndarray, c: float) -> Truth:
    """Minimises Phi by visiting the stationary point of every face; needs m <= 6 or so.

    The Gram must be exact (no rounding in it) or well away from singular, as every question of
    rank is decided to 30 digits.

    Why this is complete: among the minimisers there is one with linearly independent gradients
    on its support S, or one with G_p = 0. On such an S, stationarity reads

        H q = Phi* 1 - (H w)_S   with   q = (s / |G_p|) p_S >= 0   and   q.H q = s^2,

    a quadratic equation in Phi*. Every candidate is feasible, so the least of them is the answer
    and no multiplier needs a sign.
    """
    H, w = _matrix(gram), _vector(weights)
    m = len(w)
    linear, s = _times(H, w), mp.mpf(c) * _norm(H, w)
    scale = max(_norm(H, w) * mp.sqrt(max(H[i][i] for i in range(m))), mp.mpf(10) ** -1000)
    total = ([mp.one] * m, mp.one)

    if s == 0:  # a linear programme
        value = min(linear)
        p, unique = _closest(w, [total, (linear, value)])
        return Truth(float(value), _array(p), unique)

    value, best = None, None
    for support in _subsets(m):
        p = _stationary_point(H, linear, s, support)
        if p is not None:
            candidate = _dot(p, linear) + s * _norm(H, p)
            if value is None or candidate < value:
                value, best = candidate, p
    zero_rows = [total, *((H[i], mp.zero) for i in range(m))]
    zero = _closest(w, zero_rows)
    if zero is not None and (value is None or value >= -_EQUAL * scale):
        # Phi* = 0, attained at G_p = 0, and on a whole ray of G_p where one more candidate ties.
        solutions = [zero]
        if value is not None and value <= _EQUAL * scale:
            h = _times(H, best)
            along = [
                ([x - h[i] * y / _dot(h, best) for x, y in zip(H[i], h, strict=True)], mp.zero)
                for i in range(m)
            ]
            ray = _closest(w, [total, *along], keep=lambda p: _dot(h, p) >= -_EQUAL * scale)
            solutions.append(ray)
        p = min((p for p, _ in solutions), key=lambda p: _distance(p, w))
        return Truth(0.0, _array(p), len(solutions) == 1 and zero[1])
    # Phi* != 0: the minimisers share one G_p, because Phi(t p) = t Phi(p) rules out a ray.
    h = _times(H, best)
    p, unique = _closest(w, [total, *((H[i], h[i]) for i in range(m))])
    return Truth(float(value), _array(p), unique)


def distance_to_closest(gram: np.ndarray, weights: np.ndarray, c: float, p: np.ndarray) -> float:
    """An upper bound of the distance of a minimiser p to the one closest to w, at any m.

    The minimisers are {q >= 0: sum(q) = 1, H q = H p} (for c = 0 with the row H w instead of H;
    for c >= 1 there may be more). p is the projection of w onto that if and only if p - w is a
    combination of its rows plus some nu >= 0 that vanishes where p does not; otherwise the
    residual of p - w bounds the distance. H must be exact and not all but rank-deficient.
    """
    H, w, q = (np.asarray(x, float) for x in (gram, weights, p))
    norms = np.sqrt(np.where(H.diagonal() > 0, H.diagonal(), 1))
    rows = H / norms[:, None] if c > 0 else (H @ w)[None]
    rows = np.vstack([rows / max(np.abs(rows).max(), 1e-300), np.ones(len(w))])
    _, sizes, right = np.linalg.svd(rows)
    basis = right[: int((sizes > 1e-11).sum())].T
    free = np.eye(len(w)) - basis @ basis.T
    columns = free[:, q <= 1e-10]
    columns = columns[:, np.linalg.norm(columns, axis=0) > 1e-9]
    target = free @ (q - w)
    return float(nnls(columns, target)[1] if columns.size else np.linalg.norm(target))


def exact_min_norm(gram: np.ndarray) -> float:
    """The least |G_p| over the simplex, to 40 digits; the same conditions as `exact_minimum`."""
    H = _matrix(gram)
    m = len(H)
    ones = [mp.one] * m
    if _closest(ones, [(ones, mp.one), *((H[i], mp.zero) for i in range(m))]) is not None:
        return 0.0
    norms = []
    for support in _subsets(m):
        factor = _cholesky(_restrict(H, support))
        q = factor and _solve(factor, [mp.one] * len(support))
        if q and min(q) >= 0:
            norms.append(1 / mp.sqrt(sum(q)))
    return float(min(norms))


def _stationary_point(H: Matrix, linear: Vector, s, support: tuple[int, ...]) -> Vector | None:
    """The stationary point of Phi on a face, None where there is none with independent g_i."""
    factor = _cholesky(_restrict(H, support))
    if factor is None:
        return None
    q = _scaled_solution(factor, [linear[i] for i in support], s)
    if q is None or min(q) < 0:
        return None
    p = [mp.zero] * len(H)
    for i, x in zip(support, q, strict=True):
        p[i] = x / sum(q)
    return p


def _scaled_solution(factor: Matrix, linear: Vector, s) -> Vector | None:
    """Solves H q = value 1 - linear and q.H q = s^2 for q and the root `value` with sum(q) > 0."""
    a, d = _solve(factor, [mp.one] * len(linear)), _solve(factor, linear)
    discriminant = sum(d) ** 2 - sum(a) * (_dot(linear, d) - s * s)
    if discriminant <= 0:
        return None
    value = (sum(d) + mp.sqrt(discriminant)) / sum(a)
    return [value * x - y for x, y in zip(a, d, strict=True)]


def _closest(
    w: Vector, rows: Sequence[tuple[Vector, mpmath.mpf]], keep: Callable[[Vector], bool] = bool
) -> tuple[Vector, bool] | None:
    """Projects w onto {p >= 0: a.p = b for all rows (a, b)}; also whether that is one point.

    On every face the projection onto the affine set is a candidate, and all candidates that are
    feasible are in the set, so the closest is the projection. The vertices of the set are those
    candidates whose face holds no other point. None if the set is empty.
    """
    feasible, vertices = [], []
    for support in _subsets(len(w)):
        p = [x if i in support else mp.zero for i, x in enumerate(w)]
        basis: list[tuple[Vector, mpmath.mpf]] = []  # orthonormal e with e.p = t
        for a, b in rows:
            e, t = [x if i in support else mp.zero for i, x in enumerate(a)], b
            size = mp.sqrt(_dot(e, e))
            for _ in range(2):  # once is not orthogonal to working precision
                for f, u in basis:
                    along = _dot(e, f)
                    e = [x - along * y for x, y in zip(e, f, strict=True)]
                    t -= along * u
            left = mp.sqrt(_dot(e, e))
            if left > _EQUAL * size:
                basis.append(([x / left for x in e], t / left))
        for e, t in basis:
            missing = t - _dot(e, p)
            p = [x + missing * y for x, y in zip(p, e, strict=True)]
        met = all(abs(_dot(a, p) - b) <= _EQUAL * (mp.sqrt(_dot(a, a)) + abs(b)) for a, b in rows)
        if met and min(p) >= -_EQUAL and keep(p):
            feasible.append(p)
            if len(basis) == len(support):
                vertices.append(p)
    if not feasible:
        return None
    best = min(feasible, key=lambda p: _distance(p, w))
    return best, all(_distance(p, vertices[0]) < _EQUAL for p in vertices)


# --- A bound at any m ----------------------------------------------------------------------------

EPS = 2.0**-52
_PASS = 1e-10  # good enough to look no further


def certificate(
    gram: np.ndarray, weights: np.ndarray, c: float, p: np.ndarray, *, inflation: float = 0.0
) -> float:
    """An upper bound of (Phi(p) - min Phi) / (|g0| max_i |g_i|), computed without the minimum.

    |G_p| is the maximum of y.G_p over the unit ball, so every y in the ball gives

        Phi(p) - min Phi <= Phi(p) - min_i g_i.(g0 + s y),

    and the least over these y is returned:

    * y = G_p / |G_p|, the gradient of the norm: this is the Frank-Wolfe gap;
    * where G_p = 0, every y in the ball is a subgradient, and p is optimal if and only if one of
      them has g_i.(g0 + s y) >= 0 for all i. The shortest is G_u / s with u >= 0 that minimises
      |g0 + G_u|: the residual of a projection onto the cone of the g_i has no negative
      product with any of them;
    * near G_p = 0, where the rounding of p alone turns G_p: the y that the stationary point of the
      face of p has.

    The last two are found in 60 digits and need H to be semi-definite. The diagonal of H is
    multiplied by 1 + `inflation` beforehand.
    """
    wide = np.longdouble  # three digits more than float64 where the platform has them
    H = np.asarray(gram, wide)
    if not H.any():
        return 0.0
    H = np.ldexp(H, -int(np.frexp(H.diagonal().max())[1]))  # exact
    H[np.diag_indices(len(H))] *= 1 + wide(inflation)
    w, q = np.asarray(weights, wide), np.asarray(p, wide)
    q = q / q.sum()
    linear, h = H @ w, H @ q
    squared, length = w @ linear, q @ h
    if squared <= 0:
        return 0.0
    s = wide(c) * np.sqrt(squared)
    scale = np.sqrt(squared * H.diagonal().max())
    gap = np.inf
    if s == 0 or length > 0:
        gradient = linear + (s * h / np.sqrt(length) if s > 0 else 0)
        gap = float((q @ gradient - gradient.min()) / scale)
    if s > 0 and gap > _PASS:
        gap = min(gap, _polished_gap(H, w, c, q) / float(scale))
    return max(gap, 0.0)


def resolution(
    gram: np.ndarray, weights: np.ndarray, c: float, p: np.ndarray, *, rounding: float = EPS
) -> float:
    """How far rounding of H alone moves the relative gap of p, to first order.

    Entries off by r |g_i| |g_j|, with r = max(4 m, 64) `rounding`, move

    * |G_q|, for any q, by r S^2 / (2 |G_q|) and at most sqrt(r) S, where S = sum_i q_i |g_i|;
    * (H w)_i by r |g_i| S at q = w.

    Nothing of that matters but near G_p = 0 and near g0 = 0, where the first is sqrt(r) S.
    """
    H, w, q = (np.asarray(x, float) for x in (gram, weights, p))
    norms = np.sqrt(H.diagonal())
    H, norms = H / norms.max() ** 2, norms / norms.max()
    r = max(4 * len(w), 64) * rounding

    def length_and_error(q: np.ndarray) -> tuple[float, float]:
        length, size = np.sqrt(max(q @ H @ q, 0.0)), q @ norms
        error = np.sqrt(r) * size
        return length, min(error, error**2 / (2 * length)) if length > 0 else error

    length_g0, error_g0 = length_and_error(w)
    _, error_p = length_and_error(q)
    if length_g0 <= np.sqrt(r) * (w @ norms):
        return np.inf  # g0 is zero as far as H can tell
    return 2 * (r * (w @ norms) / length_g0 + c * error_g0 / length_g0 + c * error_p)


def excess_gap(
    gram: np.ndarray,
    weights: np.ndarray,
    c: float,
    p: np.ndarray,
    *,
    rounding: float = EPS,
    enough: float = 1e-9,
) -> float:
    """The certificate of p, less the resolution of H.

    The certificate is for H or for a few matrices that round to H and may be semi-definite where
    it is not: H with its diagonal inflated, until a gap is `enough`.
    """
    if not np.any(gram):
        return 0.0
    allowed = resolution(gram, weights, c, p, rounding=rounding)
    if allowed >= 1:
        return 0.0
    gap = certificate(gram, weights, c, p)
    for k in range(-2, 5):
        if gap > enough + allowed:
            inflation = 2.0**k * len(weights) * rounding
            gap = min(gap, certificate(gram, weights, c, p, inflation=inflation))
    return max(gap - allowed, 0.0)


def _polished_gap(gram: np.ndarray, weights: np.ndarray, c: float, p: np.ndarray) -> float:
    """Phi(p) minus the best lower bound at hand, in 60 digits; infinite if H is indefinite."""
    H, w, q = _matrix(gram), _vector(weights), _vector(p)
    every = range(len(w))
    if _independent(H, every) is None:
        return np.inf
    linear, s = _times(H, w), mp.mpf(c) * _norm(H, w)
    value = _dot(q, linear) + s * _norm(H, q)

    multipliers = []  # u with y = G_u / s
    norms = np.sqrt(np.where(gram.diagonal() > 0, gram.diagonal(), 1)).astype(float)
    cosines = (gram / np.outer(norms, norms)).astype(float)
    for noise in (0.0, 8 * EPS):
        cone = _cone_support(cosines, (weights * norms).astype(float), noise)
        support, factor = _independent(H, cone)
        multipliers.append((support, _solve(factor, [-linear[i] for i in support])))
    for threshold in (0.0, 1e-12, 1e-8):
        support, factor = _independent(H, np.flatnonzero(p > threshold))
        u = support and _scaled_solution(factor, [linear[i] for i in support], s)
        if u:
            multipliers.append((support, u))

    bounds = []
    for support, u in multipliers:
        image = [_dot([row[i] for i in support], u) for row in H]
        length = mp.sqrt(abs(_dot(u, [image[i] for i in support])))
        shrink = min(mp.one, s / length) if length > 0 else mp.one
        bounds.append(min(a + shrink * b for a, b in zip(linear, image, strict=True)))
    return float(value - max(bounds))


def _cone_support(C: np.ndarray, w: np.ndarray, noise: float) -> np.ndarray:
    """The support of the u >= 0 that minimises |G_(w + u)|; smaller eigenvalues count as zero."""
    values, vectors = np.linalg.eigh(C)
    values[values <= noise * len(C) * values.max()] = 0
    factor = (vectors * np.sqrt(values)).T
    nonzero = C.diagonal() > 0  # nnls stumbles over a column that is all but zero
    u = np.zeros(len(C))
    u[nonzero] = nnls(factor[:, nonzero], -factor @ w, maxiter=100 * len(C))[0]
    return np.flatnonzero(u)


# --- Linear algebra on lists of mpf --------------------------------------------------------------


def _vector(values: Iterable[float]) -> Vector:
    return [mp.mpf(float(x)) for x in values]


def _matrix(rows: Iterable[Iterable[float]]) -> Matrix:
    return [_vector(row) for row in rows]


def _array(values: Vector) -> np.ndarray:
    return np.array([float(x) for x in values]).clip(0)


def _dot(a: Vector, b: Vector) -> mpmath.mpf:
    return mp.fdot(a, b)


def _times(H: Matrix, v: Vector) -> Vector:
    return [mp.fdot(row, v) for row in H]


def _norm(H: Matrix, v: Vector) -> mpmath.mpf:
    return mp.sqrt(max(_dot(v, _times(H, v)), mp.zero))


def _distance(a: Vector, b: Vector) -> mpmath.mpf:
    return mp.sqrt(sum((x - y) ** 2 for x, y in zip(a, b, strict=True)))


def _subsets(m: int) -> Iterator[tuple[int, ...]]:
    for size in range(1, m + 1):
        yield from itertools.combinations(range(m), size)


def _restrict(H: Matrix, support: Sequence[int]) -> Matrix:
    return [[H[i][j] for j in support] for i in support]


def _cholesky(H: Matrix) -> Matrix | None:
    """L with L L^T = H, or None if H is singular (to 30 digits) or indefinite."""
    found = _independent(H, range(len(H)))
    return found[1] if found and len(found[0]) == len(H) else None


def _independent(H: Matrix, support: Iterable[int]) -> tuple[list[int], Matrix] | None:
    """The first losses of the support with independent gradients, and the Cholesky factor of them.

    None if the part of H is indefinite: a pivot is negative, or zero without its row being so.
    """
    kept: list[int] = []
    L: Matrix = []
    dropped: list[tuple[int, Vector]] = []
    for i in support:
        line: Vector = []
        for j, row in zip(kept, L, strict=True):
            line.append((H[i][j] - mp.fdot(line, row[:-1])) / row[-1])
        pivot = H[i][i] - mp.fdot(line, line)
        for k, known in dropped:
            left = H[i][k] - mp.fdot(line[: len(known)], known)
            if left**2 > _EQUAL * H[i][i] * H[k][k]:
                return None
        if pivot < -_EQUAL * H[i][i]:
            return None
        if pivot <= _EQUAL * H[i][i]:
            dropped.append((i, line))
        else:
            kept.append(i)
            L.append([*line, mp.sqrt(pivot)])
    return kept, L


def _solve(L: Matrix, b: Vector) -> Vector:
    """Solves L L^T x = b."""
    y: Vector = []
    for row, value in zip(L, b, strict=True):
        y.append((value - mp.fdot(row[:-1], y)) / row[-1])
    x: Vector = [mp.zero] * len(y)
    for i in reversed(range(len(y))):
        x[i] = (y[i] - sum(L[k][i] * x[k] for k in range(i + 1, len(y)))) / L[i][i]
    return x
