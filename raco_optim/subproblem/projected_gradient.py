r"""The projected-gradient solver of the subproblem: pure torch, batched, without host sync.

In :math:`z_i = D_i p_i` the subproblem is to minimise
:math:`b \cdot z + c |\sum_i z_i \hat g_i|` over :math:`z \ge 0, \sum_i z_i / D_i = 1`.
Only cosines enter, so that gradients of very different norms do not slow it down. The norm r
lies below :math:`(|\cdot|^2 / r_k + r_k) / 2`, whose gradient has the Lipschitz constant
:math:`c |C| / r_k`: that gives the step. Projected steps find the support; one linear system then
gives the solution on it. The number of iterations is fixed, since a stopping test would wait for
the device, and the point with the smallest gap is returned.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from raco_optim._checks import ZERO

_ROUNDS = 12
_STEPS = 4
_SOLVES = 3
_TINY = 1e-300


@dataclass(frozen=True)
class _Problem:
    """Cosines ``[..., m, m]``, norms relative to the largest and cosines with g_0, ``[..., m]``."""

    C: Tensor
    D: Tensor
    b: Tensor
    c: float
    bound: Tensor
    """Bound of the largest eigenvalue of C, ``[..., 1]``."""
    at_zero: Tensor
    """<g_i, y> / D_i for the subgradient y of the norm at G_p = 0, ``[..., m]``."""

    def evaluate(self, p: Tensor) -> tuple[Tensor, Tensor]:
        """Returns value and Frank-Wolfe gap of p, ``[..., 1]``."""
        z = self.D * p
        image = _apply(self.C, z)
        squared_norm = (z * image).sum(-1, keepdim=True)
        nonzero = squared_norm > ZERO * z.sum(-1, keepdim=True) ** 2
        y = torch.where(nonzero, image / squared_norm.clamp(min=_TINY).sqrt(), self.at_zero)
        derivative = self.D * (self.b + self.c * y)
        value = (p * derivative).sum(-1, keepdim=True)
        # Any y of norm <= 1 bounds the minimum; near zero the one of G_p is mostly rounding.
        bounds = derivative, self.D * (self.b + self.c * self.at_zero)
        lower = torch.maximum(*(bound.amin(-1, keepdim=True) for bound in bounds))
        return value, (value - lower).clamp(min=0)


def projected_gradient(H: Tensor, w: Tensor, c: float) -> tuple[Tensor, Tensor, Tensor]:
    """Minimises the subproblem of CAGrad by projected gradient steps.

    Args:
        H: Gram matrices, ``[..., m, m]``, float64.
        w: Weights, ``[m]``, float64.
        c: Radius, >= 0.

    Returns:
        p, ``[..., m]``, its value, ``[...]``, in the units of H, and its relative Frank-Wolfe gap,
        ``[...]``; see `raco_optim.solve_subproblem`.
    """
    norms = H.diagonal(dim1=-2, dim2=-1).clamp(min=0).sqrt()
    scale = norms.amax(-1, keepdim=True)
    D = norms / torch.where(scale > 0, scale, 1.0)
    D = torch.where(D > 1e-100, D, 0.0)
    inverse = torch.where(D > 0, 1 / norms.clamp(min=_TINY), 0.0)
    C = H * inverse[..., :, None] * inverse[..., None, :]
    C = ((C + C.mT) / 2).clamp(-1, 1)
    image = _apply(C, D * w)
    squared_g0 = (D * w * image).sum(-1, keepdim=True)
    moving = squared_g0 > ZERO * (D * w).sum(-1, keepdim=True) ** 2
    norm_g0 = torch.where(moving, squared_g0, 1.0).sqrt()
    b = image / norm_g0
    bound = C.abs().sum(-1).amax(-1, keepdim=True)
    problem = _Problem(C, D, b, c, bound, _subgradient_at_zero(C, b, c, bound))

    # Phi(e_i) = D_i (b_i + c): the lowest vertex is often the solution, and else a start.
    weights = w.expand_as(D)
    lowest = (D * (b + c)).argmin(-1, keepdim=True)
    vertex = torch.zeros_like(D).scatter(-1, lowest, 1.0)
    best = weights, *problem.evaluate(weights)
    p = torch.where(problem.evaluate(vertex)[0] < best[1], vertex, weights)
    best = _choose(best, vertex, problem)
    for _ in range(_ROUNDS):
        for _ in range(_STEPS):
            p = _projected_step(problem, p)
        best = _choose(best, p, problem)
        for _ in range(_SOLVES):
            p = _solve_on_support(problem, p)
        best = _choose(best, p, problem)
    # What is not a number stays so: a certificate for it would be false.
    noise = torch.where(squared_g0.isfinite(), 0.0, torch.nan)
    p, value, gap = best
    p = torch.where(moving, p, w) + noise
    value = torch.where(moving, value * norm_g0 * scale**2, 0.0) + noise
    return p, value.squeeze(-1), (torch.where(moving, gap, 0.0) + noise).squeeze(-1)


def _choose(
    best: tuple[Tensor, Tensor, Tensor], p: Tensor, problem: _Problem
) -> tuple[Tensor, Tensor, Tensor]:
    value, gap = problem.evaluate(p)
    better = gap < best[2]  # False for NaN
    return (
        torch.where(better, p, best[0]),
        torch.where(better, value, best[1]),
        torch.where(better, gap, best[2]),
    )


def _projected_step(problem: _Problem, p: Tensor) -> Tensor:
    z = problem.D * p
    image = _apply(problem.C, z)
    norm = (z * image).sum(-1, keepdim=True).clamp(min=_TINY).sqrt()
    slope = problem.b + problem.c * image / norm
    z = z - slope * norm / (max(problem.c, 1e-3) * problem.bound)
    # Projection on {z >= 0, sum_i e_i z_i = 1}: z = max(z - t e, 0) for the t that fulfils the sum.
    present = problem.D > 0
    e = torch.where(present, 1 / problem.D.clamp(min=_TINY), 0.0)
    ratio = torch.where(present, z * problem.D, -torch.inf)
    ratio, order = ratio.sort(dim=-1, descending=True)
    sorted_e, sorted_z = e.gather(-1, order), z.gather(-1, order)
    t = ((sorted_e * sorted_z).cumsum(-1) - 1) / (sorted_e**2).cumsum(-1)
    t = torch.where(ratio > t, t, -torch.inf).amax(-1, keepdim=True)
    return _on_simplex((z - t * e).clamp(min=0) * e, p)


def _solve_on_support(problem: _Problem, p: Tensor) -> Tensor:
    """Solves the optimality conditions on the support of p, where that lowers the value.

    Where the solution has negative entries, they are cut off, or the way to it ends at the first
    of them, whichever is lower.
    """
    e = torch.where(problem.D > 0, 1 / problem.D.clamp(min=_TINY), 0.0)
    u, v = _solve_masked(problem.C, p > 0, e, problem.b)
    eu, ev, bv = ((x * y).sum(-1, keepdim=True) for x, y in ((e, u), (e, v), (problem.b, v)))
    discriminant = ev**2 - eu * (bv - problem.c**2)
    level = (ev + discriminant.clamp(min=0).sqrt()) / eu
    target = (level * u - v) * e
    cut = _on_simplex(target.clamp(min=0), p)
    way = _on_simplex(target, p) - p
    length = torch.where(way < 0, p / -way, 1.0).amin(-1, keepdim=True).clamp(max=1)
    stopped = _on_simplex((p + length * way).clamp(min=0) * (p + length * way > 1e-15), p)
    value, _ = problem.evaluate(p)
    for candidate in (cut, stopped):
        lower, _ = problem.evaluate(candidate)
        p = torch.where(lower < value, candidate, p)
        value = torch.fmin(lower, value)
    return p


def _subgradient_at_zero(C: Tensor, b: Tensor, c: float, bound: Tensor) -> Tensor:
    """Projects g_0 on the cone {d: <g_i, d> >= 0}; returns <g_i, y> for g_0 + c y in the cone.

    The projection is g_0 + sum_i q_i g_i with the q >= 0 that minimises q.Cq / 2 + b.q. Where it
    is farther than c from g_0, G_p = 0 is no solution, and y is cut to length 1.
    """
    q = torch.zeros_like(b)

    def objective(q: Tensor) -> Tensor:
        return (q * (_apply(C, q) / 2 + b)).sum(-1, keepdim=True)

    for _ in range(_ROUNDS):
        for _ in range(_STEPS):
            q = (q - (_apply(C, q) + b) / bound).clamp(min=0)
        _, v = _solve_masked(C, q > 0, torch.zeros_like(b), b)
        solved = (-v).clamp(min=0)
        q = torch.where(objective(solved) < objective(q), solved, q)
    image = _apply(C, q)
    length = (q * image).sum(-1, keepdim=True).clamp(min=0).sqrt()
    return image / length.clamp(min=max(c, _TINY))


def _solve_masked(C: Tensor, support: Tensor, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """Solves C u = x and C v = y on the support; u and v are zero elsewhere."""
    both = support[..., :, None] & support[..., None, :]
    diagonal = torch.where(support, 4 * C.shape[-1] * 2.0**-52, 1.0)
    matrix = torch.where(both, C, 0.0) + torch.diag_embed(diagonal)
    right = torch.stack([torch.where(support, x, 0.0), torch.where(support, y, 0.0)], dim=-1)
    solved, _ = torch.linalg.solve_ex(matrix, right)
    u, v = solved.unbind(-1)
    return u, v


def _on_simplex(p: Tensor, otherwise: Tensor) -> Tensor:
    total = p.sum(-1, keepdim=True)
    return torch.where(total.isfinite() & (total > 0), p / total, otherwise)


def _apply(C: Tensor, x: Tensor) -> Tensor:
    return (C @ x[..., None]).squeeze(-1)
