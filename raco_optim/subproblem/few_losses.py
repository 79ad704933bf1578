"""The subproblem of few losses in Python floats, because calling numpy takes longer.

The method is that of `active_set.py` without the parts for rare problems: it returns None unless
the result is certified, the only minimiser, and accurate. It solves 94.5 to 100 % of ordinary
problems, in 20 to 80 microseconds, a third of the time of the general solver.
"""

from __future__ import annotations

import math
from operator import mul

from raco_optim.subproblem.certificate import FEW_DIGITS, TIGHT

# With more losses numpy is faster.
FEW = 10
# If the gradients of a support are closer to dependent, there may be several minimisers.
_DEPENDENT = 1e-11
_ROUNDS = 20

Row = list[float]


def solve_few_losses(
    rows: list[Row], weights: list[float], c: float
) -> tuple[list[float], float, float] | None:
    """Returns p, Phi(p) and the gap, for c > 0; None if the general solver is needed."""
    squares = [row[i] for i, row in enumerate(rows)]
    if not min(squares) > 0 or list(map(list, zip(*rows, strict=True))) != rows:
        return None
    norms = list(map(math.sqrt, squares))
    scale = max(norms)
    D, inverse = [n / scale for n in norms], [1 / n for n in norms]
    C = [
        [x * a * y for x, y in zip(row, inverse, strict=True)]
        for row, a in zip(rows, inverse, strict=True)
    ]
    weighted = list(map(mul, weights, D))
    image = [_dot(row, weighted) for row in C]
    squared_g0, size = _dot(image, weighted), sum(weighted)
    # NaN or Inf anywhere in H makes the square NaN, and the comparison false.
    if not (squared_g0 >= FEW_DIGITS * size * size and min(D) > 1e-100 and c > 1e-6):
        return None
    norm_g0 = math.sqrt(squared_g0)
    b, e = [x / norm_g0 for x in image], [1 / d for d in D]
    q = _dual_solution(C, e, b, c)
    if q is None:
        return None
    p = list(map(mul, q, e))
    total = sum(p)
    p = [x / total for x in p]
    z = list(map(mul, p, D))
    image = [_dot(row, z) for row in C]
    squared_norm, size = _dot(z, image), sum(z)
    if squared_norm < FEW_DIGITS * size * size:
        return None
    norm = math.sqrt(squared_norm)
    value = _dot(z, b) + c * norm
    gap = value - min([d * (x + c / norm * y) for d, x, y in zip(D, b, image, strict=True)])
    if gap > TIGHT or max(map(max, C)) > 1 + 1e-12 or min(map(min, C)) < -1 - 1e-12:
        return None
    return p, value * norm_g0 * scale * scale, max(gap, 0.0)


def _dual_solution(C: list[Row], e: Row, b: Row, c: float) -> Row | None:
    """Finds q by block principal pivoting; None if it is not unique or the pivoting cycles."""
    m = len(e)
    vertices = [(x + c) / y for x, y in zip(b, e, strict=True)]
    level = min(vertices)
    best = vertices.index(level)
    q = [0.0] * m
    q[best] = c
    violating, unique = _violating(C, e, b, q, level, [best])
    support = [best]
    fewest, patience = m + 1, 3
    for _ in range(_ROUNDS):
        if not violating:
            return q if unique else None
        if len(violating) < fewest:
            fewest, patience = len(violating), 3
        elif patience:
            patience -= 1
        else:
            return None
        support = sorted(set(support) ^ set(violating)) or [best]
        solved = _solve(C, e, b, c, support)
        if solved is None:
            return None
        q, level = solved
        violating, unique = _violating(C, e, b, q, level, support)
    return None


def _violating(
    C: list[Row], e: Row, b: Row, q: Row, level: float, support: list[int]
) -> tuple[list[int], bool]:
    """Returns the losses that violate the optimality conditions, and whether no other is tight."""
    violating, unique = [j for j in support if q[j] < 0], True
    for j in set(range(len(e))).difference(support):
        slack, margin = b[j] + _dot(C[j], q) - level * e[j], TIGHT * (1 + abs(level) * e[j])
        if slack < -margin:
            violating.append(j)
        elif slack <= margin:
            unique = False
    return violating, unique


def _solve(C: list[Row], e: Row, b: Row, c: float, support: list[int]) -> tuple[Row, float] | None:
    """Solves C q = level e - b on the support for q of length c, by a Cholesky factor."""
    factor: list[Row] = []
    u: Row = []
    v: Row = []
    for i in support:
        row: Row = []
        for j, other in zip(support, factor, strict=False):  # of the losses before i
            row.append((C[i][j] - _dot(row, other)) / other[-1])
        pivot = 1 - _dot(row, row)
        if pivot <= _DEPENDENT:
            return None
        pivot = math.sqrt(pivot)
        u.append((e[i] - _dot(row, u)) / pivot)
        v.append((-b[i] - _dot(row, v)) / pivot)
        row.append(pivot)
        factor.append(row)
    # With the factor L, q = level L^-T u + L^-T v has the squared length |level u + v|^2.
    uu, uv, vv = _dot(u, u), _dot(u, v), _dot(v, v)
    discriminant = uv * uv - uu * (vv - c * c)
    if discriminant < 0:
        return None
    level = (math.sqrt(discriminant) - uv) / uu
    part = [y + level * x for x, y in zip(u, v, strict=True)]
    q = [0.0] * len(e)
    for k in range(len(support) - 1, -1, -1):
        row = factor[k]
        q[support[k]] = x = part[k] / row[k]
        for n in range(k):
            part[n] -= row[n] * x
    return q, level


def _dot(x: Row, y: Row) -> float:
    """Returns the sum of products up to the shorter length."""
    total: float = sum(map(mul, x, y))
    return total
