"""The subproblem of two losses, in closed form.

The derivatives of Phi show whether a vertex is optimal. Otherwise, on the line g_2 + t (g_1 - g_2),
Phi is a linear function plus a hyperbola with its vertex at t0, the point nearest to the origin:

    Phi(t) = |g_0| l (kappa t + c sqrt((t - t0)^2 + delta^2 / l^2)) + constant

with l = |g_1 - g_2|, kappa = cos(g_0, g_1 - g_2), and delta the distance of the line from zero.
The code uses h11 - h12 and h22 - h12 (or the sums, for opposed gradients), which are exact if they
are small; products of norms would lose the difference of nearly equal gradients.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from raco_optim._checks import ZERO, check_gram_values
from raco_optim.subproblem.certificate import FEW_DIGITS, TIGHT

Real = Any  # float or numpy.longdouble


def solve_two_losses(
    gram: list[list[float]], weights: list[float], c: float
) -> tuple[list[float], float, float]:
    """Returns p, Phi(p) and the gap, for c > 0; in extended precision if necessary."""
    (h11, h12), (h21, h22) = gram
    largest = max(h11, h22)
    plain = 0 <= h11 < math.inf and 0 <= h22 < math.inf and h12 == h21
    if not (plain and h12 * h12 <= h11 * h22):
        check_gram_values(gram)  # allows rounding errors
    if largest == 0:
        return weights, 0.0, 0.0
    scale = math.ldexp(1, math.frexp(largest)[1] - 1)  # a power of two: no rounding
    numbers = (h11 / scale, (h12 / scale + h21 / scale) / 2, h22 / scale, *weights, c)
    p1, value, gap, enough_digits = _solve(*numbers)
    if not enough_digits or gap > TIGHT:
        p1, value, gap, _ = _solve(*map(np.longdouble, numbers))
    return [p1, 1 - p1], value * scale, gap / math.sqrt(largest / scale)


def _solve(
    h11: Real, h12: Real, h22: Real, w1: Real, w2: Real, c: Real
) -> tuple[float, float, float, bool]:
    """Returns p_1, Phi(p), its gap in units of |g_0|, and whether there are enough digits."""
    n1, n2 = h11**0.5, h22**0.5
    b1, b2 = w1 * h11 + w2 * h12, w1 * h12 + w2 * h22
    squared_g0, size = w1 * b1 + w2 * b2, w1 * n1 + w2 * n2
    if squared_g0 <= ZERO * size * size:
        return float(w1), 0.0, 0.0, False
    norm_g0 = squared_g0**0.5
    s, slope = c * norm_g0, b1 - b2
    a1, a2 = h11 - h12, h22 - h12
    if max(abs(a1), abs(a2)) <= ZERO * max(h11, h22):
        p1 = w1  # equal gradients: every p is a minimiser, and w is closest to w
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
        kappa = slope / (norm_g0 * squared_length**0.5)
        if abs(kappa) < c:
            shift = kappa * (max(determinant, 0.0) / (c * c - kappa * kappa)) ** 0.5
            p1 = min(max((a2 - shift) / squared_length, 0.0), 1.0)
        else:
            p1 = 0.0 if kappa > 0 else 1.0
    p2 = 1.0 - p1
    if h12 > 0:
        f1, f2 = h12 + p1 * a1, h12 + p2 * a2
    else:
        f1, f2 = p1 * (h11 + h12) + h12 * (p2 - p1), p2 * (h22 + h12) + h12 * (p1 - p2)
    squared_norm, size_p = p1 * f1 + p2 * f2, p1 * n1 + p2 * n2
    if squared_norm > ZERO * size_p * size_p:
        ratio = s / squared_norm**0.5
        r1, r2 = b1 + ratio * f1, b2 + ratio * f2
        # Inside, both derivatives are equal. A small norm has few digits: choose the value within
        # its rounding error that makes them equal.
        rounding = 64 * np.finfo(type(squared_norm)).eps * size_p * size_p / squared_norm
        if 0 < p1 < 1 and abs(slope + ratio * (f1 - f2)) < rounding * abs(slope):
            r1 = r2 = b1 - slope / (f1 - f2) * f1
    elif b1 >= 0 and b2 >= 0:
        r1, r2 = b1, b2  # the zero subgradient of |G_p| at zero
    else:
        r1 = r2 = 0.0  # the subgradient that cancels g_0, which exists because c >= 1
    value = p1 * r1 + p2 * r2
    enough = squared_g0 > FEW_DIGITS * size * size and squared_norm > FEW_DIGITS * size_p * size_p
    return float(p1), float(value), max(float((value - min(r1, r2)) / norm_g0), 0.0), bool(enough)
