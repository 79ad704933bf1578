"""Descent on the toy problems, where the Pareto front and the weighted solution are known."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from benchmarks.problems import Problem, cagrad_toy, convex_quadratics, fonseca_fleming
from raco_optim import Rule
from raco_optim.rules import CAGradRule, LinearRule

RADII = (0.4, 0.8)
WEIGHTS = ((0.2, 0.8), (0.5, 0.5), (0.8, 0.2))
STARTS = 8
RULES: list[tuple[str, float, Rule]] = [
    ("linear", 0.0, LinearRule()),
    *[("cagrad", c, CAGradRule(c, "none")) for c in RADII],
    *[("raco", c, CAGradRule(c, "hard")) for c in RADII],
]


@dataclass(frozen=True)
class Descent:
    """What B runs side by side went through in T steps.

    Attributes:
        losses: ``[T + 1, B, m]``.
        theta: Where they ended, ``[B, d]``.
        clip_changed: Share of the steps in which clipping turned the update, ``[B]``.
    """

    losses: Tensor
    theta: Tensor
    clip_changed: Tensor


def descend(
    problem: Problem,
    starts: Tensor,
    weights: Tensor,
    rule: Rule,
    *,
    steps: int,
    lr: float,
    adam: bool = False,
) -> Descent:
    """Runs gradient descent (or Adam, where losses are ill-conditioned) from every start.

    Args:
        problem: The losses.
        starts: ``[B, d]``.
        weights: ``[B, m]``.
        rule: The method; one without a memory, as it serves all runs.
        steps: T.
        lr: Learning rate.
        adam: Adam instead of gradient descent.
    """
    theta = starts.clone().requires_grad_()
    optimizer = (torch.optim.Adam if adam else torch.optim.SGD)([theta], lr=lr)
    trace, changed = [], torch.zeros(len(starts))
    for _ in range(steps):
        losses = problem.losses(theta)
        trace.append(torch.stack([loss.detach() for loss in losses], dim=-1))
        J = torch.stack(
            [torch.autograd.grad(loss.sum(), theta, retain_graph=True)[0] for loss in losses], dim=1
        )
        alpha, turned = _coefficients(J, weights, rule)
        changed += turned
        theta.grad = torch.einsum("bm,bmd->bd", alpha, J)
        optimizer.step()
    with torch.no_grad():
        trace.append(torch.stack(problem.losses(theta), dim=-1))
    return Descent(torch.stack(trace), theta.detach(), changed / steps)


def _coefficients(J: Tensor, weights: Tensor, rule: Rule) -> tuple[Tensor, Tensor]:
    """Coefficients ``[B, m]`` for gradients ``[B, m, d]``, and whether clipping turned G_p."""
    found, turned = [], []
    for gram, w in zip(J @ J.mT, weights.tolist(), strict=True):
        mixing = rule(gram, w)
        found.append(mixing.coefficients)
        p, clipped = mixing.p, mixing.p_clipped
        changed = clipped is not None and bool((clipped / clipped.sum() - p).abs().max() > 1e-6)
        turned.append(float(changed))
    return torch.stack(found), torch.tensor(turned)


def random_quadratics(m: int, dimension: int, seed: int) -> Problem:
    """m quadratic bowls with normal centres and curvatures between 0.5 and 4."""
    generator = torch.Generator().manual_seed(seed)
    centres = torch.randn(m, dimension, generator=generator)
    curvatures = 0.5 * 8 ** torch.rand(m, dimension, generator=generator)
    return convex_quadratics(centres.tolist(), curvatures.tolist())


def grid(starts: Tensor, weights: Sequence[Sequence[float]]) -> tuple[Tensor, Tensor]:
    """Every start with every weights: ``[B, d]`` and ``[B, m]``, the starts changing slowest."""
    rows = torch.tensor(weights, dtype=torch.float64)
    return starts.repeat_interleave(len(rows), dim=0), rows.repeat(len(starts), 1)


def steps_to(values: Tensor, targets: Tensor) -> list[float | None]:
    """First step at which a value ``[T + 1, B]`` is at most its target ``[B]``; None if never."""
    below = values <= targets
    first = below.double().argmax(0).tolist()
    return [step if ever else None for step, ever in zip(first, below.any(0), strict=True)]


def speed() -> Iterator[dict[str, Any]]:
    """Steps to 1 % of the start's distance to the front; two losses, all starts and weights."""
    quadratics, wide = convex_quadratics(), random_quadratics(2, 20, 0)
    ff, toy = fonseca_fleming(), cagrad_toy()
    for name, problem, starts, lr, steps, adam in (
        ("quadratics, 2-d", quadratics, _normal(quadratics, 3), 0.02, 400, False),
        ("quadratics, 20-d", wide, _normal(wide, 2), 0.02, 400, False),
        ("Fonseca-Fleming", ff, _normal(ff, 0.6), 0.02, 800, False),
        ("toy of CAGrad (Adam)", toy, toy.starts, 0.05, 2500, True),
    ):
        theta, weights = grid(starts, WEIGHTS)
        for rule_name, c, rule in RULES:
            found = descend(problem, theta, weights, rule, steps=steps, lr=lr, adam=adam)
            distance = torch.stack([problem.distance(row) for row in found.losses])
            yield {
                "problem": name,
                "rule": rule_name,
                "c": c,
                "units": len(starts),
                "steps": steps_to(distance, 0.01 * distance[0]),
                "clip_changed": found.clip_changed.tolist(),
            }


def _normal(problem: Problem, spread: float) -> Tensor:
    """Random starts, the same ones at every call."""
    generator = torch.Generator().manual_seed(1)
    shape = (STARTS, problem.dimension)
    return spread * torch.randn(shape, generator=generator, dtype=torch.float64)


def many_bowls(seeds: Sequence[int], counts: Sequence[int]) -> Iterator[dict[str, Any]]:
    """Steps to 1 % of the weighted loss's excess over its minimum; bowls in 40 dimensions."""
    for m in counts:
        kinds = weights_of(m)
        for seed in seeds:
            problem = random_quadratics(m, 40, seed)
            generator = torch.Generator().manual_seed(seed)
            start = 2 * torch.randn(1, 40, generator=generator, dtype=torch.float64)
            theta, weights = grid(start, list(kinds.values()))
            for name, c, rule in RULES:
                found = descend(problem, theta, weights, rule, steps=300, lr=0.02)
                excess = _excess(problem, found.losses, weights)
                reached = steps_to(excess, torch.full((len(weights),), 0.01))
                for kind, steps in zip(kinds, reached, strict=True):
                    row = {"seed": seed, "m": m, "weights": kind, "rule": name, "c": c}
                    yield {"on": "bowls", **row, "steps": steps}


def weights_of(m: int) -> dict[str, list[float]]:
    """Equal weights, and half of the weight on the first loss."""
    return {"equal": [1 / m] * m, "half on one": [0.5, *[0.5 / (m - 1)] * (m - 1)]}


def _excess(problem: Problem, losses: Tensor, weights: Tensor) -> Tensor:
    """What is left of the weighted loss above its minimum, 1 at the start, ``[T + 1, B]``."""
    if problem.weighted_solution is None:
        return losses.new_full(losses.shape[:2], math.nan)
    least = torch.stack(problem.losses(problem.weighted_solution(weights)), dim=-1)
    minimum = (weights * least).sum(-1)
    weighted = (losses * weights).sum(-1)
    return (weighted - minimum) / (weighted[0] - minimum)
