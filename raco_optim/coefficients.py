"""Stages 3 and 4: Gram matrix -> simplex subproblem -> clipping -> coefficients."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from raco_optim._checks import ZERO, checked_choice
from raco_optim.simplex import Solver, checked_arguments, min_norm_point, solve_checked

Clip = Literal["hard", "soft", "none"]
CLIPS = ("hard", "soft", "none")


@dataclass(frozen=True)
class MixingCoefficients:
    """Coefficients of the combined gradient and where they come from; float64 tensors.

    Attributes:
        coefficients: alpha, ``[m]``: the combined gradient is ``sum_i alpha_i g_i``.
        p: Solution of the subproblem on the simplex, ``[m]``, or None.
        p_clipped: The clipped solution p~, ``[m]``, or None.
        gap: Relative Frank-Wolfe gap of p, a scalar, or None.

    Example:
        >>> import torch
        >>> from raco_optim import MixingCoefficients
        >>> MixingCoefficients(torch.tensor([0.7, 0.3])).p is None
        True
    """

    coefficients: Tensor
    p: Tensor | None = None
    p_clipped: Tensor | None = None
    gap: Tensor | None = None


def mixing_coefficients(
    gram: Tensor | Sequence[Sequence[float]],
    weights: Sequence[float] | Mapping[str, float] | Tensor,
    c: float,
    *,
    clip: Clip = "hard",
    solver: Solver = "exact",
) -> MixingCoefficients:
    r"""Computes the coefficients of one CAGrad-Clip step from the Gram matrix alone.

    .. math::
        p^* &\in \arg\min_{p \in \Delta} \; p^\top H w + c \sqrt{w^\top H w} \sqrt{p^\top H p} \\
        \tilde p &= \min(p^*, w) \\
        \alpha &= w + c \sqrt{w^\top H w} \; \tilde p / \sqrt{\tilde p^\top H \tilde p}

    so that :math:`\sum_i \alpha_i g_i = g_0 + c |g_0| \tilde G / |\tilde G|`. The clipped p is
    never renormalised: the division by its norm does that. Where :math:`|\tilde G|` is zero to
    rounding, or c = 0, alpha = w exactly. alpha does not change when the gradients are scaled.

    Args:
        gram: H, ``[m, m]``, real, symmetric, positive semi-definite up to rounding.
        weights: w, m numbers on the simplex.
        c: Radius of the trust region relative to :math:`|g_0|`, >= 0. The descent guarantee
            (Theorem 3.1) needs c < 1.
        clip: ``"hard"``: :math:`\tilde p = \min(p^*, w)`, the paper. ``"none"``:
            :math:`\tilde p = p^*`, CAGrad with weights. ``"soft"``:
            :math:`\tilde p_i = p_i w_i / (p_i + w_i)`, half the harmonic mean, smooth and between
            :math:`\min(p_i, w_i) / 2` and :math:`\min(p_i, w_i)`.
        solver: See `solve_subproblem`.

    Returns:
        The coefficients, p, the clipped p and the gap of p, on the device of `gram`.

    Raises:
        ValueError: An argument is out of its range; the message names it.

    Example:
        >>> import torch
        >>> from raco_optim import mixing_coefficients
        >>> g = torch.tensor([[1.0, -4.0], [-1.0, 1.0]], dtype=torch.float64)
        >>> mixing = mixing_coefficients(g @ g.T, weights=[0.2, 0.8], c=0.5)
        >>> mixing.p
        tensor([0.3561, 0.6439], dtype=torch.float64)
        >>> mixing.p_clipped
        tensor([0.2000, 0.6439], dtype=torch.float64)

    References:
        Algorithm 1, lines 5 to 8, of arXiv 2602.02495.
    """
    checked_choice("clip", clip, CLIPS)
    H, checked, c = checked_arguments(gram, weights, c, solver)
    solution = solve_checked(H, checked, c, solver)
    w, p = H.new_tensor(checked), solution.p
    if clip == "hard":
        p_clipped = torch.minimum(p, w)
    elif clip == "soft":
        p_clipped = torch.nan_to_num(p * w / (p + w))  # 0 / 0, where both are zero, is 0
    else:
        p_clipped = p
    # Scaled first, so that no square leaves the range of float64.
    unit = H / H.diagonal().amax().clamp(min=torch.finfo(H.dtype).tiny)
    squared_g0 = w @ (unit @ w)
    squared_norm = p_clipped @ (unit @ p_clipped)
    nonzero = squared_norm > ZERO * (p_clipped @ unit.diagonal().sqrt()).square()
    ratio = torch.where(nonzero, squared_g0 / squared_norm, 0.0)
    coefficients = w + c * ratio.clamp(min=0).sqrt() * p_clipped
    return MixingCoefficients(coefficients, p, p_clipped, solution.gap)


def min_norm_coefficients(gram: Tensor) -> MixingCoefficients:
    """Returns the min-norm point of the gradients as coefficients: the step of MGDA.

    Args:
        gram: H, ``[m, m]``.

    Returns:
        Coefficients that are p, and its gap.

    Raises:
        ValueError: `gram` is not a Gram matrix.

    Example:
        >>> import torch
        >>> from raco_optim import min_norm_coefficients
        >>> min_norm_coefficients(torch.eye(2)).coefficients
        tensor([0.5000, 0.5000], dtype=torch.float64)

    References:
        Désidéri, Multiple-gradient descent algorithm (MGDA) for multiobjective optimization, 2012.
    """
    solution = min_norm_point(gram)
    return MixingCoefficients(solution.p, p=solution.p, gap=solution.gap)
