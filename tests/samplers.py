"""Problems with a proved property, for the simplex subproblem and whatever stands on it.

Every sampler takes a numpy generator and the number m of losses and returns a `Problem`. Those
with `rounding=0` use integer gradients of few bits: no entry of the Gram matrix is rounded, and a
zero, a duplicate or a linear dependence is one to the last bit.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

Rng = np.random.Generator

DOUBLE, SINGLE = 2.0**-52, 2.0**-23
RADII = (0.0, 1e-12, 0.1, 0.4, 0.9, 0.999999)


@dataclass(frozen=True)
class Problem:
    """A Gram matrix with weights and a radius.

    Attributes:
        gram: H, ``[m, m]``.
        weights: w, ``[m]``, summing to 1 exactly.
        c: The radius.
        rounding: Relative to |g_i| |g_j|, the unit of rounding of H_ij; 0 where H is exact.
        p: The minimiser closest to w, where the construction proves it.
    """

    gram: np.ndarray
    weights: np.ndarray
    c: float
    rounding: float = DOUBLE
    p: np.ndarray | None = None


# --- Weights and radii ---------------------------------------------------------------------------


def simplex_point(values: np.ndarray) -> np.ndarray:
    """Scales non-negative values to a sum of exactly 1, so that no one normalises them again."""
    w = np.asarray(values, float) / math.fsum(values)
    while (excess := math.fsum(w) - 1) != 0:
        w[w.argmax()] -= excess
    return w


def sample_weights(rng: Rng, m: int) -> np.ndarray:
    """Weights that are uniform, even, lopsided, partly zero or a vertex."""
    kind = rng.integers(5)
    if kind == 0 or m == 1:
        return simplex_point(np.ones(m))
    if kind == 1:
        return simplex_point(rng.dirichlet(np.ones(m)) + 1e-3)
    if kind == 2:
        return simplex_point(10.0 ** -rng.uniform(0, 9, m))
    values = rng.dirichlet(np.ones(m)) + 1e-3
    kept = 1 if kind == 3 else int(rng.integers(1, m))
    values[rng.permutation(m)[kept:]] = 0
    return simplex_point(values)


def problem(kind: str, m: int, seed: int) -> Problem:
    """The problem that `kind`, `m` and `seed` name, whatever was drawn before."""
    return SAMPLERS[kind](np.random.default_rng([seed, m, sorted(SAMPLERS).index(kind)]), m)


def sample_radius(rng: Rng) -> float:
    """A radius, from none to just below the largest that has a guarantee."""
    return float(rng.choice(RADII))


def _problem(rng: Rng, gradients: np.ndarray, *, rounding: float = DOUBLE) -> Problem:
    m = len(gradients)
    return Problem(gradients @ gradients.T, sample_weights(rng, m), sample_radius(rng), rounding)


def _integers(rng: Rng, m: int, n: int, bound: int = 8) -> np.ndarray:
    return rng.integers(-bound, bound + 1, (m, n)).astype(float)


def _dimension(rng: Rng, m: int) -> int:
    return int(rng.choice([m, m + 1, 2 * m + 1, 4 * m + 3]))


# --- Generic -------------------------------------------------------------------------------------


def random(rng: Rng, m: int) -> Problem:
    """Gaussian gradients in m dimensions or more: linearly independent with probability 1."""
    return _problem(rng, rng.standard_normal((m, _dimension(rng, m))))


def conflicting(rng: Rng, m: int) -> Problem:
    """Every pair conflicts.

    Off the diagonal a symmetric matrix is drawn negative, and its diagonal larger than the sum of
    the row: positive definite by Gershgorin. Scaling row i and column i keeps both.
    """
    off = rng.uniform(0.01, 1, (m, m))
    off = off + off.T
    np.fill_diagonal(off, 0)
    H = np.diag(off.sum(axis=1) * (1 + rng.uniform(1e-3, 1)) + 1e-3) - off
    d = 10.0 ** rng.uniform(-1, 1, m)
    H = H * np.outer(d, d)
    return Problem((H + H.T) / 2, sample_weights(rng, m), sample_radius(rng))


def aligned(rng: Rng, m: int) -> Problem:
    """No pair conflicts: the entries of the gradients are non-negative."""
    return _problem(rng, rng.exponential(size=(m, _dimension(rng, m))))


# --- Degenerate ----------------------------------------------------------------------------------


def duplicate(rng: Rng, m: int) -> Problem:
    """Two gradients or more are the same, unless m = 1: there are at most m - 1 distinct ones."""
    distinct = max(1, int(rng.integers(1, m + 1)) - 1)
    gradients = _integers(rng, distinct, distinct + 2)
    return _problem(rng, gradients[rng.integers(distinct, size=m)], rounding=0)


def opposed(rng: Rng, m: int) -> Problem:
    """The first two gradients are exactly opposed, the second k times as long (m >= 2)."""
    gradients = _integers(rng, m, m + 2)
    if m > 1:
        gradients[1] = -rng.choice([1, 1, 2, 5]) * gradients[0]
    return _problem(rng, gradients, rounding=0)


def zero(rng: Rng, m: int) -> Problem:
    """One gradient or more is zero; in one case of four all are."""
    gradients = _integers(rng, m, m + 2)
    gradients[rng.permutation(m)[: m if rng.integers(4) == 0 else int(rng.integers(1, m + 1))]] = 0
    return _problem(rng, gradients, rounding=0)


def rank_one(rng: Rng, m: int) -> Problem:
    """All gradients lie on one line."""
    return _problem(rng, _integers(rng, m, 1, 9) * _integers(rng, 1, 3), rounding=0)


def rank_deficient(rng: Rng, m: int) -> Problem:
    """The gradients span at most m - 1 dimensions (m >= 2)."""
    return _problem(rng, _integers(rng, m, int(rng.integers(1, max(2, m)))), rounding=0)


def stationary(rng: Rng, m: int) -> Problem:
    """The weighted gradient g0 is zero, every bit of it.

    The weights are n_i / 2^k with integers n_i that sum to 2^k and n_0 = 1, and
    g_0 = -sum_{i > 0} n_i g_i.
    """
    if m == 1:
        return Problem(np.zeros((1, 1)), np.ones(1), sample_radius(rng), 0, np.ones(1))
    n = np.ones(m)
    total = 2 ** math.ceil(math.log2(2 * m))
    np.add.at(n, rng.integers(1, m, size=int(total - m)), 1)
    gradients = _integers(rng, m, m + 2, 3)
    gradients[0] = -(n[1:, None] * gradients[1:]).sum(axis=0)
    w = n / total
    return Problem(gradients @ gradients.T, w, sample_radius(rng), 0, w)


def nearly_stationary(rng: Rng, m: int) -> Problem:
    """|g0| is 1e-1 to 1e-8 of the largest gradient, as at the end of a training run (m >= 2)."""
    w = simplex_point(rng.dirichlet(np.ones(m)) + 0.01)
    gradients = rng.standard_normal((m, m + 1))
    gradients -= w @ gradients
    small = rng.standard_normal(m + 1) * 10.0 ** -rng.uniform(1, 8)
    gradients = gradients + small
    return Problem(gradients @ gradients.T, w, sample_radius(rng))


# --- A known solution ----------------------------------------------------------------------------


def vertex(rng: Rng, m: int) -> Problem:
    """p* is the vertex e_k, and nothing else.

    g_k = a v and g_j = b_j v + z_j with b_j > a > 0 and entries of z_j >= 0 orthogonal to v. With
    g0 = b v + z, the difference of partial derivatives at e_k is
    (g_j - g_k).(g0 + s v) = (b_j - a)(b + s) + z_j.z > 0.
    """
    k, w = int(rng.integers(m)), sample_weights(rng, m)
    gradients = np.column_stack(
        [rng.uniform(1.5, 4, m), rng.exponential(size=(m, _dimension(rng, m)))]
    )
    gradients[k] = 0
    gradients[k, 0] = 1
    return Problem(gradients @ gradients.T, w, sample_radius(rng), p=np.eye(m)[k])


def interior(rng: Rng, m: int) -> Problem:
    """p* is a given point inside the simplex, and nothing else.

    g_i = (a, t_i) with sum_i (p_i + k w_i) t_i = 0, so that G_p and g0 have the orthogonal parts
    -k t_w and t_w. With a^2 = k^2 |t_w|^2 (1 - c^2) / (k^2 c^2 - 1), which needs k c > 1, the
    orthogonal part of g0 / |g0| + c G_p / |G_p| vanishes: every g_i has the same product with it,
    so p is stationary. The t_i span m - 1 dimensions and a > 0, so H is regular.
    """
    c = float(rng.choice([0.1, 0.4, 0.9, 0.99]))
    p, w = simplex_point(rng.dirichlet(np.ones(m)) + 0.05), simplex_point(rng.dirichlet(np.ones(m)))
    k = rng.uniform(1.1, 3) / c
    across = rng.standard_normal((m, m))
    if m > 1:
        across[0] = -((p + k * w)[1:, None] * across[1:]).sum(axis=0) / (p + k * w)[0]
    else:
        across[:] = 0
    tangential = np.linalg.norm(w @ across)
    along = k * tangential * math.sqrt((1 - c * c) / (k * k * c * c - 1)) if m > 1 else 1.0
    gradients = np.column_stack([np.full(m, along), across])
    return Problem(gradients @ gradients.T, w, c, p=p)


def kink(rng: Rng, m: int) -> Problem:
    """Phi has its minimum, 0, where G_p = 0: Phi has no gradient there (m >= 3).

    Some gradients lie in a subspace V with sum_i n_i g_i = 0 for integers n_i > 0. Each other one
    has a part v_j in V and a part in the non-negative orthant of the complement. With g0 = v + z,
    y = -v / s has g_i.(g0 + s y) = g_i.z >= 0 for all i, and |y| <= 1 by a choice of the weights:
    the first of the others, which has no part in V, gets enough weight for |v| <= s / 2.
    Any minimiser has G_p = 0 then, so only the first group takes part; all but one of its
    gradients are independent with probability nearly 1, and then p* = n / sum(n).
    """
    if m < 3:
        return zero(rng, m)
    inside = int(rng.integers(2, m))
    n = np.append(rng.integers(1, 4, inside - 1), 1).astype(float)
    gradients = np.zeros((m, 2 * m))
    gradients[:inside, :m] = _integers(rng, inside, m, 4)
    gradients[inside - 1, :m] = -(n[:-1, None] * gradients[: inside - 1, :m]).sum(axis=0)
    gradients[inside:, m:] = np.abs(_integers(rng, m - inside, m, 4))
    gradients[inside:, m] += 1  # never zero
    gradients[inside + 1 :, :m] = _integers(rng, m - inside - 1, m, 4)
    c = float(rng.choice([0.1, 0.4, 0.9, 0.999999]))
    w = simplex_point(rng.dirichlet(np.ones(m)))
    while True:
        g0 = w @ gradients
        if np.linalg.norm(g0[:m]) <= 0.5 * c * np.linalg.norm(g0):
            break
        w[inside] = w[inside] * 2 + 0.1
        w = simplex_point(w)
    independent = np.linalg.matrix_rank(gradients[:inside]) == inside - 1
    p = np.append(n / n.sum(), np.zeros(m - inside)) if independent else None
    return Problem(gradients @ gradients.T, w, c, 0, p)


# --- Ill-conditioned -----------------------------------------------------------------------------


def spread(rng: Rng, m: int) -> Problem:
    """The norms of the gradients are up to some 1e9 apart, and two of them are (m >= 2)."""
    scales = 10.0 ** rng.uniform(-9, 0, m)
    if m > 1:
        scales[rng.permutation(m)[:2]] = 1e-9, 1
    return _problem(rng, rng.standard_normal((m, _dimension(rng, m))) * scales[:, None])


def near_singular(rng: Rng, m: int) -> Problem:
    """Every gradient is at an angle of about 1e-2 to 1e-9 from one of at most m / 2 lines."""
    n = _dimension(rng, m)
    lines = rng.standard_normal((int(rng.integers(1, max(2, m // 2 + 1))), n))
    angle = 10.0 ** -rng.uniform(2, 9)
    signs = rng.choice([-1, 1] if rng.integers(2) else [1], (m, 1))
    gradients = signs * lines[rng.integers(len(lines), size=m)]
    gradients = gradients + angle * rng.standard_normal((m, n))
    return _problem(rng, gradients * 10.0 ** rng.uniform(-1, 1, (m, 1)))


def near_kink(rng: Rng, m: int) -> Problem:
    """A kink that is missed by 1e-2 to 1e-9 of the length of the gradients (m >= 3)."""
    exact = kink(rng, m)
    values, vectors = np.linalg.eigh(exact.gram)
    gradients = vectors * np.sqrt(values.clip(0))
    norms = np.linalg.norm(gradients, axis=1, keepdims=True)
    gradients = gradients + norms * 10.0 ** -rng.uniform(2, 9) * rng.standard_normal((m, m))
    return Problem(gradients @ gradients.T, exact.weights, exact.c)


def graded(rng: Rng, m: int) -> Problem:
    """A degenerate problem whose gradients are rescaled by powers of 2 up to 2^15 apart.

    What is dependent stays so, G_p = 0 stays attainable where it was, and nothing is rounded.
    """
    sampler = (duplicate, opposed, rank_deficient, kink)[rng.integers(4)]
    gram = sampler(rng, m).gram
    scales = 2.0 ** rng.integers(0, 16, m)
    H = gram * np.outer(scales, scales)
    return Problem(H, sample_weights(rng, m), sample_radius(rng), 0)


def single_precision(rng: Rng, m: int) -> Problem:
    """A Gram matrix accumulated in float32: indefinite by some 1e-7 where it has low rank."""
    rank = int(rng.integers(1, m + 1))
    gradients = rng.standard_normal((m, rank)) @ rng.standard_normal((rank, 4 * m))
    low = gradients.astype(np.float32)
    H = (low @ low.T).astype(float)
    return Problem(H, sample_weights(rng, m), sample_radius(rng), SINGLE)


SAMPLERS: dict[str, Callable[[Rng, int], Problem]] = {
    sampler.__name__: sampler
    for sampler in (
        random,
        conflicting,
        aligned,
        duplicate,
        opposed,
        zero,
        rank_one,
        rank_deficient,
        stationary,
        nearly_stationary,
        vertex,
        interior,
        kink,
        spread,
        near_singular,
        near_kink,
        graded,
        single_precision,
    )
}
