"""Descent on the toy problems, where the Pareto front and the weighted solution are known."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.optim import Optimizer

from benchmarks.problems import Problem, convex_quadratics
from raco_optim import Rule


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
    noise: float = 0.0,
    adam: bool = False,
) -> Descent:
    """Runs gradient descent (or Adam) from every start.

    Args:
        problem: The losses.
        starts: ``[B, d]``.
        weights: ``[B, m]``.
        rule: The method; one without a memory, as it serves all runs.
        steps: T.
        lr: Learning rate.
        noise: Normal noise on every gradient, of this size relative to the gradients' own root
            mean square at the start; the same for every rule.
        adam: Adam instead of gradient descent, where losses are ill-conditioned.
    """
    changed = torch.zeros(len(starts))

    def combine(J: Tensor, _: Optimizer) -> Tensor:
        alpha, turned = coefficients(J, weights, rule)
        changed.add_(turned)
        return alpha

    found = walk(problem, starts, combine, steps=steps, lr=lr, noise=noise, adam=adam)
    return Descent(*found, changed / steps)


def walk(
    problem: Problem,
    starts: Tensor,
    combine: Callable[[Tensor, Optimizer], Tensor],
    *,
    steps: int,
    lr: float,
    noise: float,
    adam: bool,
) -> tuple[Tensor, Tensor]:
    """The losses on the way, ``[T + 1, B, m]``, and the end, ``[B, d]``; see `descend`.

    Args:
        problem: The losses.
        starts: ``[B, d]``.
        combine: From the gradients ``[B, m, d]`` and the optimizer to the coefficients ``[B, m]``.
        steps: T.
        lr: Learning rate.
        noise: As in `descend`.
        adam: As in `descend`.
    """
    theta = starts.clone().requires_grad_()
    optimizer = (torch.optim.Adam if adam else torch.optim.SGD)([theta], lr=lr)
    generator = torch.Generator().manual_seed(0)
    trace, scale = [], None
    for _ in range(steps):
        losses = problem.losses(theta)
        trace.append(torch.stack([loss.detach() for loss in losses], dim=-1))
        J = torch.stack(
            [torch.autograd.grad(loss.sum(), theta, retain_graph=True)[0] for loss in losses], dim=1
        )
        if noise:
            scale = J.square().mean((1, 2), keepdim=True).sqrt() if scale is None else scale
            J = J + noise * scale * torch.randn(J.shape, generator=generator, dtype=J.dtype)
        theta.grad = torch.einsum("bm,bmd->bd", combine(J, optimizer), J)
        optimizer.step()
    with torch.no_grad():
        trace.append(torch.stack(problem.losses(theta), dim=-1))
    return torch.stack(trace), theta.detach()


def coefficients(J: Tensor, weights: Tensor, rule: Rule) -> tuple[Tensor, Tensor]:
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


def steps_to(values: Tensor, targets: Tensor) -> Tensor:
    """First step at which a value ``[T + 1, B]`` is at most its target ``[B]``; inf if never."""
    below = values <= targets
    first = below.double().argmax(0).double()
    return torch.where(below.any(0), first, torch.inf)
