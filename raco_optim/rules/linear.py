"""The rule of the weighted sum."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from raco_optim.rules.rule import MixingCoefficients, Rule
from raco_optim.subproblem.solve import copied


class LinearRule(Rule):
    r"""Linear scalarization: :math:`\alpha = w`.

    Example:
        >>> import torch
        >>> from raco_optim.rules import LinearRule
        >>> LinearRule()(torch.eye(2), [0.75, 0.25]).coefficients
        tensor([0.7500, 0.2500], dtype=torch.float64)
    """

    def __call__(self, gram: Tensor, weights: Sequence[float]) -> MixingCoefficients:
        """Returns the weights."""
        return MixingCoefficients(copied(list(weights), gram.double()))
