"""The point of smallest norm in the convex hull of the gradients: the subproblem of MGDA."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from torch import Tensor

from raco_optim._checks import as_gram
from raco_optim.subproblem.active_set import solve_active_set
from raco_optim.subproblem.certificate import Problem, equal_where_tied
from raco_optim.subproblem.several_losses import cosines
from raco_optim.subproblem.slsqp import solve_slsqp


@dataclass(frozen=True)
class MinNormPoint:
    r"""A point of the convex hull of the gradients with a certificate; float64 tensors.

    Attributes:
        p: ``[m]``, non-negative, summing to 1.
        norm: :math:`|\sum_i p_i g_i| = \sqrt{p^\top H p}`, a scalar.
        gap: Frank-Wolfe gap relative to :math:`\max_i |g_i|`, a scalar: an upper bound on the norm
            minus its minimum.

    Example:
        >>> from raco_optim import min_norm_point
        >>> min_norm_point([[4.0, 0.0], [0.0, 4.0]]).norm
        tensor(1.4142, dtype=torch.float64)
    """

    p: Tensor
    norm: Tensor
    gap: Tensor


def min_norm_point(gram: Tensor | Sequence[Sequence[float]]) -> MinNormPoint:
    r"""Finds the point of smallest norm in the convex hull of the gradients.

    .. math:: p^* \in \arg\min_{p \in \Delta} \sqrt{p^\top H p}

    It is the direction of MGDA; its norm is 0 if and only if the point is Pareto-critical. If there
    are several minimisers, the result is the one closest to uniform weights.

    Args:
        gram: H, ``[m, m]``, as in `solve_subproblem`.

    Returns:
        p, the norm in the units of the gradients, and the gap, on the device of `gram`.

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
    scale, C, D = cosines(H.cpu().numpy().astype(np.longdouble))
    m = len(D)
    p, norm, gap = np.full(m, 1 / m), 0.0, 0.0
    if scale > 0:
        problem = Problem(C, D, np.zeros(m), 1.0, p)
        solution = solve_active_set(problem) or solve_slsqp(problem)
        p, norm, gap = solution.p, solution.value * scale, solution.gap
    shares = equal_where_tied(list(p), H.tolist(), [1.0] * m)
    numbers = H.new_tensor([*shares, norm, gap])
    return MinNormPoint(numbers[:m], numbers[m], numbers[m + 1])
