r"""Stage 3: Gram matrix -> p on the simplex, the subproblem of CAGrad.

The solvers are given dimensionless numbers: the cosines C of the gradients, their norms D relative
to the largest, and the cosines b of the gradients with the weighted gradient. No tolerance then
depends on the scale of the gradients, and gradients of very different norms lose no digits.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from torch import Tensor

from raco_optim._checks import (
    ZERO,
    as_gram,
    check_gram_values,
    checked_choice,
    checked_radius,
    checked_weights,
)
from raco_optim.active_set import TwoLosses, solve_active_set, solve_two
from raco_optim.optimality import FEW_DIGITS, TIGHT, Array, Problem, certify
from raco_optim.pgd import projected_gradient
from raco_optim.slsqp import solve_slsqp

Solver = Literal["exact", "pgd", "slsqp"]
SOLVERS = ("exact", "pgd", "slsqp")


@dataclass(frozen=True)
class SubproblemSolution:
    r"""A point of the simplex and the certificate that it is the minimiser; float64 tensors.

    Attributes:
        p: ``[m]`` (``[..., m]`` for a batch), non-negative, summing to 1.
        value: :math:`\Phi(p)`, a scalar (``[...]``), in the units of the Gram matrix.
        gap: Frank-Wolfe gap relative to :math:`|g_0| \max_i |g_i|`, a scalar (``[...]``): Phi(p)
            exceeds its minimum by no more than that.

    Example:
        >>> from raco_optim import solve_subproblem
        >>> solution = solve_subproblem([[1.0, 0.0], [0.0, 1.0]], [0.5, 0.5], c=0.5)
        >>> bool(solution.gap <= 1e-9)
        True
    """

    p: Tensor
    value: Tensor
    gap: Tensor


def solve_subproblem(
    gram: Tensor | Sequence[Sequence[float]],
    weights: Sequence[float] | Mapping[str, float] | Tensor,
    c: float,
    *,
    solver: Solver = "exact",
) -> SubproblemSolution:
    r"""Minimises the subproblem of CAGrad over the simplex.

    .. math::
        p^* \in \arg\min_{p \in \Delta} \Phi(p), \quad
        \Phi(p) = p^\top H w + c \sqrt{w^\top H w} \sqrt{p^\top H p}

    The minimiser does not change when H is scaled. Where there are several (dependent
    gradients), ``"exact"`` returns the one closest to w in the Euclidean norm. If the weighted
    gradient is zero (to rounding), p = w.

    Args:
        gram: H, ``[m, m]``, real, symmetric, positive semi-definite up to rounding; any device.
            With ``solver="pgd"`` also a batch ``[..., m, m]``.
        weights: w, m numbers >= 0 that sum to 1 within 1e-6 (then normalised).
        c: Radius of the trust region relative to :math:`|g_0|`, >= 0, finite.
        solver: ``"exact"``: a closed form for m = 2, an active set beyond, in float64 on the
            host (one copy of H from an accelerator). ``"pgd"``: projected gradient in torch, on
            the device of H, batched, without waiting for it; the values of H are not checked.
            ``"slsqp"``: scipy's sequential quadratic programming, on the host. ``"exact"`` is
            certified to 1e-9, unless the gradients cancel to the last digits of H; the other two
            usually are, and the gap tells.

    Returns:
        p, Phi(p) and the relative Frank-Wolfe gap, on the device of `gram`.

    Raises:
        ValueError: An argument is out of its range; the message names it.

    Example:
        >>> import torch
        >>> from raco_optim import solve_subproblem
        >>> g = torch.tensor([[1.0, -4.0], [-1.0, 1.0]], dtype=torch.float64)
        >>> solve_subproblem(g @ g.T, weights=[0.2, 0.8], c=0.5).p
        tensor([0.3561, 0.6439], dtype=torch.float64)

    References:
        Liu et al., Conflict-Averse Gradient Descent, 2021, equation 5; Algorithm 1, line 5, of
        arXiv 2602.02495.
    """
    arguments = checked_arguments(gram, weights, c, solver, batched=solver == "pgd")
    return solve_checked(*arguments, solver)


def checked_arguments(
    gram: Tensor | Sequence[Sequence[float]],
    weights: Sequence[float] | Mapping[str, float] | Tensor,
    c: float,
    solver: Solver,
    *,
    batched: bool = False,
) -> tuple[Tensor, list[float], float]:
    """Checks the arguments of `solve_subproblem`; returns H, w and c."""
    checked_choice("solver", solver, SOLVERS)
    c = checked_radius(c, below_one=False)
    w = checked_weights(weights)
    H = as_gram(gram, batched=batched)
    if len(w) != H.shape[-1]:
        raise ValueError(
            f"`weights` must have one entry per row of `gram`; got {len(w)} weights for the shape "
            f"{list(H.shape)}."
        )
    return H, w, c


def solve_checked(H: Tensor, w: list[float], c: float, solver: Solver) -> SubproblemSolution:
    """Solves the subproblem for arguments that were checked."""
    if solver == "pgd":
        return SubproblemSolution(*projected_gradient(H, H.new_tensor(w), c))
    if solver == "exact" and len(w) == 2 and c > 0:
        return _solve_two(H, w, c)
    return _solve_on_host(H, np.array(w), c, solver)


def min_norm_point(gram: Tensor | Sequence[Sequence[float]]) -> SubproblemSolution:
    r"""Finds the point of smallest norm in the convex hull of the gradients.

    .. math:: p^* \in \arg\min_{p \in \Delta} \sqrt{p^\top H p}

    This is the direction of MGDA, and its norm measures how far a point is from Pareto-critical.
    Where there are several minimisers, the one closest to uniform weights is returned.

    Args:
        gram: H, ``[m, m]``, as in `solve_subproblem`.

    Returns:
        p; the norm of the point, in the units of the gradients; and the Frank-Wolfe gap relative
        to :math:`\max_i |g_i|`; on the device of `gram`.

    Raises:
        ValueError: `gram` is not a Gram matrix.

    Example:
        >>> from raco_optim import min_norm_point
        >>> min_norm_point([[1.0, 0.0], [0.0, 1.0]]).p
        tensor([0.5000, 0.5000], dtype=torch.float64)

    References:
        Désidéri, Multiple-gradient descent algorithm (MGDA) for multiobjective optimization, 2012.
    """
    H = as_gram(gram)
    scale, C, D = _cosines(H.cpu().numpy().astype(np.longdouble))
    m = len(D)
    w = np.full(m, 1 / m)
    if scale == 0:
        return _solution(H, w, 0.0, 0.0)
    b = np.zeros(m)
    problem = Problem(C, D, b, 1.0, w)
    solution = solve_active_set(problem) or solve_slsqp(problem)
    return _solution(H, solution.p, solution.value * scale, solution.gap)


def _solve_two(H: Tensor, w: list[float], c: float) -> SubproblemSolution:
    rows = H.tolist()
    check_gram_values(rows)
    (h11, h12), (h21, h22) = rows
    largest = max(h11, h22)
    if largest == 0:
        return _solution(H, w, 0.0, 0.0)
    scale = math.ldexp(1, math.frexp(largest)[1] - 1)  # a power of two, so that nothing is rounded
    numbers = (h11 / scale, (h12 / scale + h21 / scale) / 2, h22 / scale, *w, c)
    p1, value, gap, enough_digits = solve_two(TwoLosses(*numbers))
    if not enough_digits or gap > TIGHT:
        p1, value, gap, _ = solve_two(TwoLosses(*map(np.longdouble, numbers)))
    return _solution(H, [p1, 1 - p1], value * scale, gap / math.sqrt(largest / scale))


def _solve_on_host(H: Tensor, w: Array, c: float, solver: Solver) -> SubproblemSolution:
    values = H.cpu().numpy()
    solution = _solve_in(np.float64, values, w, c, solver)
    if solution is None:
        solution = _solve_in(np.longdouble, values, w, c, solver)
        assert solution is not None
    return _solution(H, *solution)


def _solve_in(
    dtype: type[np.floating[Any]], values: Array, w: Array, c: float, solver: Solver
) -> tuple[Array, float, float] | None:
    """Returns p, Phi(p) and the gap; None where they need more digits than `dtype` has.

    They do if g_0 or G_p is a small difference of long gradients, of which little is left. (Where
    the platform has no extended precision, the gap tells.)
    """
    extended = dtype is np.longdouble
    scale, C, D = _cosines(values.astype(dtype, copy=False))
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
    if not extended and (few_digits or solution.gap > TIGHT):
        return None
    return solution.p, solution.value * float(norm_g0) * scale * scale, solution.gap


def _cosines(values: Array) -> tuple[float, Array, Array]:
    """Returns the largest norm, the cosines with a unit diagonal, and the relative norms."""
    with np.errstate(all="ignore"):  # what is wrong with the values is said below
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
        check_gram_values(values.tolist())
    C = C.clip(-1, 1)
    np.fill_diagonal(C, 1)
    return float(scale), C, D


def _closest_on_face(derivative: Array, w: Array) -> Array:
    """Returns the minimiser of a linear function on the simplex that is closest to w."""
    face = derivative <= derivative.min() + 1e-15
    p: Array = np.where(face, w, 0.0)
    p += face * (1 - p.sum()) / face.sum()
    return p


def _solution(H: Tensor, p: Array | list[float], value: float, gap: float) -> SubproblemSolution:
    numbers = H.new_tensor([*p, value, gap])
    return SubproblemSolution(numbers[:-2], numbers[-2], numbers[-1])
