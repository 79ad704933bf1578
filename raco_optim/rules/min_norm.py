"""The rule of MGDA: the shortest vector in the convex hull of the gradients."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from raco_optim.rules.rule import MixingCoefficients, Rule
from raco_optim.subproblem.min_norm import min_norm_point


class MinNormRule(Rule):
    r"""MGDA: :math:`\alpha = p^* \in \arg\min_{p \in \Delta} |\sum_i p_i g_i|`, for any weights.

    Example:
        >>> import torch
        >>> from raco_optim.rules import MinNormRule
        >>> MinNormRule()(torch.diag(torch.tensor([1.0, 3.0])), [0.5, 0.5]).coefficients
        tensor([0.7500, 0.2500], dtype=torch.float64)

    References:
        Désidéri, Multiple-gradient descent algorithm (MGDA) for multiobjective optimization, 2012.
    """

    def __call__(self, gram: Tensor, weights: Sequence[float]) -> MixingCoefficients:
        """Returns the min-norm point; ignores the weights."""
        point = min_norm_point(gram)
        return MixingCoefficients(point.p, p=point.p, gap=point.gap)
