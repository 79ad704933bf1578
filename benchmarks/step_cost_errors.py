"""How far an approximation's combined gradient is from the exact one, along a training run."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from benchmarks.step_cost_candidates import (
    APPROXIMATIONS,
    DENSE,
    GHOST,
    WEIGHTED_SUM,
    Candidate,
    Problem,
)
from benchmarks.step_cost_models import Case, make

# What is compared with the exact step; the weighted sum says what no correction at all would give.
COMPARED = (WEIGHTED_SUM, GHOST, *APPROXIMATIONS)
# The 4th and the 8th are those just before a Gram matrix that serves four steps is computed anew.
STEPS = (1, 4, 8)
LEARNING_RATE = 3e-4


def measure_errors(case: Case, m: int, names: Sequence[str], seed: int) -> dict[str, Any]:
    """Trains along the exact step; compares the others at the same parameters and batch.

    Returns:
        Per candidate and step 1 - cos of the angle to the exact ``.grad``, the norm of the
        difference relative to its norm, max |p - p_exact|, and for ghost the largest error of the
        Gram matrix relative to its largest entry.
    """
    model, batches = make(case, m, seed)
    problem = Problem(model, LEARNING_RATE)
    exact = problem.candidate(DENSE)
    others = {name: problem.candidate(name) for name in COMPARED if name in names}
    found: dict[str, Any] = {name: {} for name in others}
    for step in range(1, STEPS[-1] + 1):
        batch = batches[step % len(batches)]
        wanted = _gradients(exact, batch)
        for name, other in others.items():
            if step in STEPS:
                found[name][step] = _compare(other, _gradients(other, batch), exact, wanted)
                if name == GHOST:
                    found[name][step]["gram_error"] = _gram_error(other, exact)
            elif other.cycle > 1:  # it counts its steps by these calls
                _gradients(other, batch)
        for p, g in zip(problem.parameters, wanted, strict=True):
            p.grad = g
        exact.step()
    return found


def _gradients(candidate: Candidate, batch: Any) -> list[Tensor]:  # noqa: ANN401
    candidate.zero_grad()
    candidate.fill(batch)
    found = [torch.zeros_like(p) if p.grad is None else p.grad for p in candidate.parameters]
    candidate.zero_grad()
    return found


def _compare(
    candidate: Candidate, found: list[Tensor], exact: Candidate, wanted: list[Tensor]
) -> dict[str, float]:
    squares = _inner(found, found), _inner(wanted, wanted)
    difference = [a - b for a, b in zip(found, wanted, strict=True)]
    cosine = _inner(found, wanted) / (squares[0] * squares[1]) ** 0.5
    errors = {
        "one_minus_cos": max(0.0, 1 - cosine),
        "gradient_error": (_inner(difference, difference) / squares[1]) ** 0.5,
    }
    if candidate.optimizer is not None and exact.optimizer is not None:
        p, p_exact = candidate.optimizer.report.p, exact.optimizer.report.p
        assert p is not None
        assert p_exact is not None
        errors["p_error"] = float((p - p_exact).abs().max())
    return errors


def _gram_error(candidate: Candidate, exact: Candidate) -> float:
    assert candidate.optimizer is not None
    assert exact.optimizer is not None
    wanted = exact.optimizer.report.gram
    return float((candidate.optimizer.report.gram - wanted).abs().max() / wanted.abs().max())


def _inner(a: list[Tensor], b: list[Tensor]) -> float:
    return sum(float((x.double() * y.double()).sum()) for x, y in zip(a, b, strict=True))
