"""Every method on problems whose Pareto front and weighted solution are known."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from benchmarks.beyond.candidates import COMPARED_NAMES, RADII
from benchmarks.beyond.metric import inverse_roots
from benchmarks.beyond.rules import RULES
from benchmarks.multitask.toys import grid, random_quadratics, steps_to, walk
from benchmarks.problems import Problem, convex_quadratics, fonseca_fleming
from raco_optim import Rule
from raco_optim.rules import CAGradRule, LinearRule

STEPS, STARTS, LAST = 400, 5, 100
TWO = ((0.2, 0.8), (0.5, 0.5), (0.8, 0.2))


def steep_quadratics(m: int, dimension: int) -> Problem:
    """Bowls whose coordinates have curvatures from 0.1 to 100, the same for all, as Adam likes."""
    generator = torch.Generator().manual_seed(0)
    centres = torch.randn(m, dimension, generator=generator)
    scale = torch.logspace(-1, 2, dimension)[torch.randperm(dimension, generator=generator)]
    curvatures = scale * 0.5 * 8 ** torch.rand(m, dimension, generator=generator)
    return convex_quadratics(centres.tolist(), curvatures.tolist())


def problems() -> Iterator[tuple[str, Problem, tuple[tuple[float, ...], ...], float, bool]]:
    """Name, problem, weights, learning rate, and whether by Adam."""
    yield "quadratics, 2-d", convex_quadratics(), TWO, 0.02, False
    yield "quadratics, 20-d", random_quadratics(2, 20, 0), TWO, 0.02, False
    for m in (5, 10):
        half = (0.5, *[0.5 / (m - 1)] * (m - 1))
        yield (
            f"{m} quadratics, 40-d",
            random_quadratics(m, 40, 0),
            ((1 / m,) * m, half),
            0.02,
            False,
        )
    yield "Fonseca-Fleming", fonseca_fleming(), TWO, 0.02, False
    yield "steep quadratics, 20-d, Adam", steep_quadratics(2, 20), TWO, 0.02, True


def rule_for(name: str, c: float) -> Rule:
    """The rule of a method on the Gram matrix that it asks for."""
    if name == "linear":
        return LinearRule()
    if name in RULES:
        return RULES[name](c)
    return CAGradRule(c, "none" if name == "cagrad" else "hard")


def run(
    problem: Problem,
    starts: Tensor,
    weights: Tensor,
    name: str,
    c: float,
    *,
    lr: float,
    noise: float,
    adam: bool,
    steps: int = STEPS,
) -> Tensor:
    """Losses on the way of B runs side by side, ``[steps + 1, B, m]``.

    Args:
        problem: The losses.
        starts: ``[B, d]``.
        weights: ``[B, m]``.
        name: The method.
        c: Its radius.
        lr: Learning rate.
        noise: Normal noise on every gradient, in units of the root mean square of the gradients at
            the start; the same for all methods.
        adam: Adam instead of gradient descent.
        steps: Number of steps.
    """
    rules = [rule_for(name, c) for _ in weights]  # some have a memory

    def combine(J: Tensor, optimizer: Optimizer) -> Tensor:
        if name == "metric" and adam and (root := inverse_roots(optimizer)[0]) is not None:
            J = J * root[:, None]
        grams = J @ J.mT
        cases = zip(rules, grams, weights.tolist(), strict=True)
        return torch.stack([rule(H, w).coefficients for rule, H, w in cases])

    return walk(problem, starts, combine, steps=steps, lr=lr, noise=noise, adam=adam)[0]


def rows() -> Iterator[dict[str, Any]]:
    """All methods on all problems, with and without noise.

    ``steps``: until 1 % of the start's distance to the front is left, None if never (two losses,
    without noise); ``distance`` and ``deviation`` (weighted loss above its minimum): means over
    the last 100 steps, 1 at the start. One number a start and weights, starts changing slowest.
    """
    for title, problem, trade_offs, lr, adam in problems():
        generator = torch.Generator().manual_seed(1)
        spread = 0.6 if title == "Fonseca-Fleming" else 2.0
        shape = STARTS, problem.dimension
        starts = spread * torch.randn(shape, generator=generator, dtype=torch.float64)
        theta, weights = grid(starts, trade_offs)
        for noise in (0.0, 0.3):
            for name in COMPARED_NAMES:
                if name == "metric" and not adam:  # the identity: CAGrad-Clip itself
                    continue
                for c in (0.0,) if name == "linear" else RADII:
                    losses = run(problem, theta, weights, name, c, lr=lr, noise=noise, adam=adam)
                    yield {
                        "problem": title,
                        "noise": noise,
                        "method": name,
                        "c": c,
                        "weights": len(trade_offs),
                        **_measured(problem, losses, weights, noise),
                    }


def _measured(problem: Problem, losses: Tensor, weights: Tensor, noise: float) -> dict[str, Any]:
    first = problem.distance(losses[0])
    found: dict[str, Any] = {}
    if not noise and problem.m == 2:  # a sample of a front of more losses is too coarse
        distance = torch.stack([problem.distance(row) for row in losses])
        found["steps"] = _numbers(steps_to(distance, 0.01 * first))
    last = torch.stack([problem.distance(row) for row in losses[-LAST:]]).mean(0)
    found["distance"] = _numbers(last / first)
    if problem.weighted_solution is not None:
        least = torch.stack(problem.losses(problem.weighted_solution(weights)), dim=-1)
        minimum = (weights * least).sum(-1)
        value = (losses * weights).sum(-1)
        found["deviation"] = _numbers((value[-LAST:].mean(0) - minimum) / (value[0] - minimum))
    return found


def _numbers(values: Tensor) -> list[float | None]:
    return [float(f"{x:.6g}") if x != torch.inf else None for x in values.tolist()]
