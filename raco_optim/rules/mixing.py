"""The coefficients of a CAGrad-Clip step as a function of the Gram matrix."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor

from raco_optim._checks import checked_choice
from raco_optim.rules.cagrad import CLIPS, Clip, mix
from raco_optim.rules.rule import MixingCoefficients
from raco_optim.subproblem.solve import Solver, checked_arguments


def mixing_coefficients(
    gram: Tensor | Sequence[Sequence[float]],
    weights: Sequence[float] | Mapping[str, float] | Tensor,
    c: float,
    *,
    clip: Clip = "hard",
    solver: Solver = "exact",
) -> MixingCoefficients:
    r"""Computes the coefficients of one CAGrad-Clip step from the Gram matrix.

    .. math::
        p^* &\in \arg\min_{p \in \Delta} \; p^\top H w + c \sqrt{w^\top H w} \sqrt{p^\top H p} \\
        \tilde p &= \min(p^*, w) \\
        \alpha &= w + c \sqrt{w^\top H w} \; \tilde p / \sqrt{\tilde p^\top H \tilde p}

    Then :math:`\sum_i \alpha_i g_i = g_0 + c |g_0| \tilde G / |\tilde G|`. The clipped p is not
    renormalised. With c = 0, alpha equals w exactly. Scaling all gradients does not change alpha.

    If :math:`|\tilde G|` is zero up to rounding, alpha = w. If c >= 1 and :math:`G_p` or the
    combined gradient vanishes (below 1e-4 of the sum of the norms of its terms), alpha = 0: the
    point is Pareto-critical, and with c >= 1 CAGrad must not raise any loss to first order.

    Args:
        gram: H, ``[m, m]``, real, symmetric, positive semi-definite up to rounding.
        weights: w, m numbers >= 0 that sum to 1.
        c: Radius of the trust region relative to :math:`|g_0|`, >= 0. The descent guarantee
            (Theorem 3.1) needs c < 1.
        clip: ``"hard"``: :math:`\tilde p = \min(p^*, w)`, as in the paper. ``"none"``:
            :math:`\tilde p = p^*`, weighted CAGrad. ``"soft"``:
            :math:`\tilde p_i = p_i w_i / (p_i + w_i)`, half the harmonic mean, which is smooth and
            between :math:`\min(p_i, w_i) / 2` and :math:`\min(p_i, w_i)`.
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
    H, w, c = checked_arguments(gram, weights, c, solver)
    return mix(H, w, c, clip, solver)
