"""Toy problems with known Pareto fronts, for the tests and the benchmarks.

| problem           | front   | minima of the weighted loss L_w = sum_i w_i L_i                |
|-------------------|---------|----------------------------------------------------------------|
| convex_quadratics | convex  | one, on the front, in closed form                              |
| cagrad_toy        | convex  | one on the front; ravines and a ridge on the way               |
| fonseca_fleming   | concave | one or two, close to the ends of the front                     |
| dtlz2             | concave | corners of the front, which theta reaches only at infinity     |

The last column is what a user's weights can ask for: with c < 1 the updates of CAGrad and
CAGrad-Clip vanish exactly where the gradient of L_w does. So they respect the weights on a convex
front; on a concave one no weights select a point of its middle, as for any weighted sum.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from raco_optim.pareto import distance_to_front


@dataclass(frozen=True, eq=False)
class Problem:
    """m losses of a vector theta, and their Pareto front. All is float64 on the CPU."""

    name: str
    m: int
    dimension: int
    starts: Tensor  # initial values of theta, [count, dimension]
    losses: Callable[[Tensor], list[Tensor]]  # theta [..., dimension] -> m losses, each [...]
    front: Callable[[int], Tensor]  # count -> that many points of the front, [count, m]
    distance: Callable[[Tensor], Tensor]  # losses [n, m] -> Euclidean distance to the front, [n]
    # Weights [..., m] -> the theta [..., dimension] that minimises L_w and is on the Pareto front;
    # None where it is not unique or does not exist.
    weighted_solution: Callable[[Tensor], Tensor] | None = None


def convex_quadratics(
    centres: Sequence[Sequence[float]] = ((-2.0, 1.0), (2.0, 0.0)),
    curvatures: Sequence[Sequence[float]] = ((1.0, 4.0), (3.0, 1.0)),
) -> Problem:
    r"""Quadratic bowls z_i with curvatures a_i > 0, as many as there are centres.

    .. math:: L_i(\theta) = \tfrac12 \sum_j a_{ij} (\theta_j - z_{ij})^2, \qquad
        \theta_j^*(w) = \frac{\sum_i w_i a_{ij} z_{ij}}{\sum_i w_i a_{ij}}

    Strictly convex, so the Pareto set is the image of the simplex under theta*. The losses are
    non-negative and L-smooth with L = max a_ij.
    """
    z, a = _float64(centres), _float64(curvatures)
    m, dimension = z.shape

    def losses(theta: Tensor) -> list[Tensor]:
        return list((a * (theta.unsqueeze(-2) - z) ** 2).sum(-1).div(2).unbind(-1))

    def weighted_solution(weights: Tensor) -> Tensor:
        return (weights @ (a * z)) / (weights @ a)

    def front(count: int) -> Tensor:
        return torch.stack(losses(weighted_solution(_simplex_sample(m, count))), dim=-1)

    starts = _float64([[3.0] * dimension, [-4.0] * dimension])
    distance = _distance_to_sample(front)
    return Problem(
        f"quadratics-{m}", m, dimension, starts, losses, front, distance, weighted_solution
    )


def cagrad_toy() -> Problem:
    r"""The two-task toy problem of the CAGrad paper, with its three starts.

    .. math::
        L_i &= \max(\tanh(\tfrac y2), 0)\, f_i + \max(\tanh(-\tfrac y2), 0)\, q_i, \quad
            \theta = (x, y) \\
        f_1 &= \log \max(|\tfrac12(-x - 7) - \tanh(-y)|, \epsilon) + 6, \quad
        f_2 = \log \max(|\tfrac12(-x + 3) + \tanh(-y) + 2|, \epsilon) + 6 \\
        q_{1,2} &= \tfrac1{10} \big((x \mp 7)^2 + \tfrac1{10} (y + 8)^2\big) - 20, \quad
            \epsilon = 5 \cdot 10^{-6}

    The front is numerical up to one scalar equation. For y >= 0 both losses are above
    ``log(epsilon) + 6 > -6.3``, and the point x = 0, y = -8 is below -15 in both: the Pareto set
    lies in y < 0, where L_i = tanh(u/2) q_i with u = -y. There ``sum_i w_i grad L_i = 0`` means
    ``x = 7 (w_1 - w_2)`` and ``50 (B - (u - 8)^2 / 100) = (u - 8) sinh(u)`` with
    ``B = 20 - 19.6 w_1 w_2``. It has no root below u = 8 (for u < 8 the left side is positive,
    the right one negative) and one above (one side falls, the other grows), and that root is in
    (8, 9): bisection.

    References:
        Liu et al., "Conflict-averse gradient descent for multi-task learning" (2021). The signs
        in f_2 are those of the authors' public code (Cranial-XIX/CAGrad, toy.py).
    """

    def losses(theta: Tensor) -> list[Tensor]:
        x, y = theta.unbind(-1)
        upper, lower = torch.tanh(y / 2).clamp(min=0), torch.tanh(-y / 2).clamp(min=0)
        ravines = ((-x - 7) / 2 + torch.tanh(y), (-x + 3) / 2 - torch.tanh(y) + 2)
        bowls = ((x - 7) ** 2, (x + 7) ** 2)
        return [
            upper * (ravine.abs().clamp(min=5e-6).log() + 6)
            + lower * ((bowl + (y + 8) ** 2 / 10) / 10 - 20)
            for ravine, bowl in zip(ravines, bowls, strict=True)
        ]

    def weighted_solution(weights: Tensor) -> Tensor:
        w_1, w_2 = weights.unbind(-1)
        low, high = torch.full_like(w_1, 8), torch.full_like(w_1, 9)
        for _ in range(60):
            u = (low + high) / 2
            below = (u - 8) * u.sinh() < 50 * (20 - 19.6 * w_1 * w_2 - (u - 8) ** 2 / 100)
            low, high = torch.where(below, u, low), torch.where(below, high, u)
        return torch.stack([7 * (w_1 - w_2), -low], dim=-1)

    def front(count: int) -> Tensor:
        return torch.stack(losses(weighted_solution(_simplex_sample(2, count))), dim=-1)

    starts = _float64([[-8.5, 7.5], [-8.5, -5.0], [9.0, 9.0]])
    distance = _distance_to_sample(front)
    return Problem("cagrad-toy", 2, 2, starts, losses, front, distance, weighted_solution)


def fonseca_fleming(dimension: int = 3) -> Problem:
    r"""The problem of Fonseca and Fleming: bounded, non-convex losses and a concave front.

    .. math:: L_{1,2}(\theta) = 1 - \exp\Big(-\sum_j \big(\theta_j \mp 1/\sqrt n\big)^2\Big), \qquad
        \text{Pareto set } \theta_1 = \dots = \theta_n \in [-1/\sqrt n, 1/\sqrt n]

    With s in [-1, 1] along the Pareto set, ``L = 1 - exp(-(s -+ 1)^2)``, and the critical points
    of L_w are where ``4 s - 2 artanh(s) = log(w_2 / w_1)``: three for w_1 between 0.256 and 0.744,
    of which the middle one is a maximum along the front, else one. The box [-4, 4]^n of the
    original is left out: all critical points are inside, and at its border both losses fall
    inwards.

    References:
        Fonseca and Fleming, "An overview of evolutionary algorithms in multiobjective
        optimization" (1995).
    """
    peak = 1 / math.sqrt(dimension)

    def losses(theta: Tensor) -> list[Tensor]:
        return [-torch.expm1(-((theta - side * peak) ** 2).sum(-1)) for side in (1, -1)]

    def front(count: int) -> Tensor:
        s = torch.linspace(-1, 1, count, dtype=torch.float64)
        return torch.stack([-torch.expm1(-((s - 1) ** 2)), -torch.expm1(-((s + 1) ** 2))], dim=-1)

    starts = _float64([[0.8 * (-1) ** (j + k) for j in range(dimension)] for k in range(2)])
    distance = _distance_to_sample(front)
    return Problem("fonseca-fleming", 2, dimension, starts, losses, front, distance)


def dtlz2(m: int, tail: int = 10) -> Problem:
    r"""DTLZ2 with m losses, whose front is the octant of the unit sphere.

    .. math::
        L_m &= (1 + g) \sin \tfrac{\pi x_1}2, \quad
        L_{m-1} = (1 + g) \cos \tfrac{\pi x_1}2 \sin \tfrac{\pi x_2}2, \ \dots, \quad
        L_1 = (1 + g) \prod_{j < m} \cos \tfrac{\pi x_j}2 \\
        g &= \sum_{j \ge m} (x_j - \tfrac12)^2, \qquad x = \sigma(\theta) \in (0, 1)^{m - 1 + tail}

    DTLZ2 is defined on the box [0, 1]^n. The sigmoid keeps x inside without a projection, which
    an optimizer would know nothing of. Its price: the border is at infinity, and gradients fade
    towards it. All points with g = 0, and only these, are on the front, and each is
    Pareto-critical in theta: ``sum_i L_i grad L_i = (1 + g) grad g``.

    References:
        Deb et al., "Scalable multi-objective optimization test problems" (2002).
    """
    dimension = m - 1 + tail

    def losses(theta: Tensor) -> list[Tensor]:
        x = torch.sigmoid(theta)
        radius = 1 + ((x[..., m - 1 :] - 0.5) ** 2).sum(-1)
        found = []
        for angle in (x[..., : m - 1] * (math.pi / 2)).unbind(-1):
            found.append(radius * angle.sin())
            radius = radius * angle.cos()
        return [radius, *reversed(found)]

    def front(count: int) -> Tensor:
        return _simplex_sample(m, count).sqrt()

    def distance(losses: Tensor) -> Tensor:
        # Losses are non-negative, so the nearest point of the sphere is in the octant.
        return (losses.norm(dim=-1) - 1).abs()

    starts = torch.randn(3, dimension, generator=_generator(), dtype=torch.float64)
    return Problem(f"dtlz2-{m}", m, dimension, starts, losses, front, distance)


def _float64(rows: Sequence[Sequence[float]]) -> Tensor:
    return torch.tensor(rows, dtype=torch.float64)


def _generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def _simplex_sample(m: int, count: int) -> Tensor:
    """Points of the simplex, ``[count, m]``: evenly spaced for m = 2, else uniformly random."""
    if m == 2:
        first = torch.linspace(0, 1, count, dtype=torch.float64)
        return torch.stack([first, 1 - first], dim=-1)
    spacings = torch.empty(count, m, dtype=torch.float64).exponential_(generator=_generator())
    return spacings / spacings.sum(-1, keepdim=True)


def _distance_to_sample(front: Callable[[int], Tensor]) -> Callable[[Tensor], Tensor]:
    """Distance to a front known by samples: too large by no more than half their spacing."""
    return lambda losses: distance_to_front(losses, front(2001))


PROBLEMS = (convex_quadratics(), cagrad_toy(), fonseca_fleming(), dtlz2(3), dtlz2(8))
