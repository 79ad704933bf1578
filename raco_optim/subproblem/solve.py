"""The subproblem of CAGrad, with a choice of solvers."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from raco_optim._checks import as_gram, checked_choice, checked_radius, checked_weights
from raco_optim.subproblem.certificate import Array, equal_where_tied
from raco_optim.subproblem.few_losses import FEW, solve_few_losses
from raco_optim.subproblem.projected_gradient import projected_gradient
from raco_optim.subproblem.several_losses import solve_several
from raco_optim.subproblem.two_losses import solve_two_losses

Solver = Literal["exact", "pgd", "slsqp"]
SOLVERS = ("exact", "pgd", "slsqp")
PROMISED = 1e-9
"""Largest gap of ``"exact"``; on a CPU, ``"pgd"`` passes problems with a larger one to it."""


@dataclass(frozen=True)
class SubproblemSolution:
    r"""A point of the simplex with a certificate of its accuracy; float64 tensors.

    Attributes:
        p: ``[m]`` (``[..., m]`` for a batch), non-negative, summing to 1.
        value: :math:`\Phi(p)`, a scalar (``[...]``), in the units of the Gram matrix.
        gap: Frank-Wolfe gap relative to :math:`|g_0| \max_i |g_i|`, a scalar (``[...]``): an upper
            bound on Phi(p) minus its minimum.

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

    Scaling H does not change the minimiser. If there are several (dependent gradients),
    ``"exact"`` returns the one closest to w. If the weighted gradient is zero up to rounding,
    p = w.

    Args:
        gram: H, ``[m, m]``, real, symmetric, positive semi-definite up to rounding; any device.
            With ``solver="pgd"`` also a batch ``[..., m, m]``.
        weights: w, m numbers >= 0 that sum to 1 within 1e-6 (then normalised).
        c: Radius of the trust region relative to :math:`|g_0|`, >= 0, finite.
        solver: ``"exact"``: a closed form for m = 2, an active-set method for m > 2, in float64 on
            the CPU (one copy of H from an accelerator). ``"pgd"``: projected gradient on the dual
            in torch, batched, on the device of H and without waiting for it; it does not check the
            values of H. ``"slsqp"``: scipy's sequential quadratic programming, on the CPU. The gap
            of ``"exact"`` is at most 1e-9, unless the gradients cancel to the last digits of H.
            The gaps of the others usually are; check them. On a CPU, ``"pgd"`` passes Gram matrices
            with a larger gap to ``"exact"``.

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
    return solve(*checked_arguments(gram, weights, c, solver, batched=solver == "pgd"), solver)


def checked_arguments(
    gram: Tensor | Sequence[Sequence[float]],
    weights: Sequence[float] | Mapping[str, float] | Tensor,
    c: float,
    solver: Solver,
    *,
    batched: bool = False,
) -> tuple[Tensor, list[float], float]:
    """Returns H, w and c of `solve_subproblem`, or raises."""
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


def solve(H: Tensor, w: list[float], c: float, solver: Solver) -> SubproblemSolution:
    """Solves the subproblem for checked arguments; the values of H are still unchecked."""
    if solver != "pgd":
        p, value, gap = solve_on_host(H.cpu().numpy(), w, c, solver)
        numbers = copied([*p, value, gap], H)
        return SubproblemSolution(numbers[:-2], numbers[-2], numbers[-1])
    solution = SubproblemSolution(*projected_gradient(H, copied(w, H), c))
    if H.device.type == "cpu":  # reading the gap does not wait
        ps, values, gaps = (x.numpy() for x in (solution.p, solution.value, solution.gap))
        for index in map(tuple, np.argwhere(gaps > PROMISED)):
            # "pgd" does not check the values, on any device.
            with contextlib.suppress(ValueError):
                found = solve_on_host(H[index].numpy(), w, c, "exact")
                ps[index], values[index], gaps[index] = found
    return solution


def solve_on_host(
    values: Array, w: list[float], c: float, solver: Solver
) -> tuple[list[float], float, float]:
    """Returns p, Phi(p) and the gap from ``"exact"`` or ``"slsqp"``."""
    found, rows = None, values.tolist()
    if len(w) <= FEW and solver == "exact" and c > 0:
        found = (solve_two_losses if len(w) == 2 else solve_few_losses)(rows, w, c)
    p, value, gap = found or solve_several(values, w, c, solver)
    if len({row[i] for i, row in enumerate(rows)}) < len(rows):  # equal gradients, equal norms
        p = equal_where_tied(p, rows, w)
    return p, value, gap


def copied(numbers: list[Any], like: Tensor) -> Tensor:
    """Returns numbers on the device of `like`; `new_tensor` would wait for the device."""
    made = torch.tensor(numbers, dtype=like.dtype, device="cpu")
    return made.to(like.device, non_blocking=True)
