"""The optimizers: `MultiObjectiveOptimizer` with one rule each."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

from torch import Tensor
from torch.optim import Optimizer

from raco_optim._checks import checked_weights
from raco_optim.objectives import Weights
from raco_optim.optimizer import Mode, MultiObjectiveOptimizer, Options
from raco_optim.rules.cagrad import CAGradRule, Clip
from raco_optim.rules.linear import LinearRule
from raco_optim.rules.min_norm import MinNormRule
from raco_optim.subproblem.solve import Solver

if TYPE_CHECKING:
    from typing_extensions import Unpack


class AllOptions(Options, total=False):
    """Keyword arguments of `MultiObjectiveOptimizer`, except rule and weights."""

    shared_parameters: Iterable[Tensor] | None
    gradients: Mode | Iterable[Tensor]


def _of_rule(name: str, doc: str) -> Any:  # noqa: ANN401  # a property
    return property(
        lambda self: getattr(self._core.rule, name),
        lambda self, value: setattr(self._core.rule, name, value),
        doc=doc,
    )


class _WithRadius(MultiObjectiveOptimizer):
    """An optimizer whose rule has a radius c and a solver."""

    c = _of_rule(
        "c", "Radius of the correction relative to the weighted gradient; may be set between steps."
    )
    solver = _of_rule("solver", "The solver of the subproblem; may be set between steps.")


class CAGradClip(_WithRadius):
    r"""Weighted CAGrad with clipping: the optimizer of RACO.

    With :math:`g_i = \nabla L_i`, :math:`g_0 = \sum_i w_i g_i` and :math:`G_p = \sum_i p_i g_i`,

    .. math::
        p^* &\in \arg\min_{p \in \Delta} \; \langle G_p, g_0 \rangle + c |g_0| |G_p| \\
        \tilde p &= \min(p^*, w) \\
        G_0 &= g_0 + c |g_0| \tilde G / |\tilde G|, \quad \tilde G = \sum_i \tilde p_i g_i

    and the inner optimizer steps along :math:`G_0`.

    Args:
        inner: The optimizer to wrap, any of `torch.optim`, or a list of optimizers that step
            together.
        weights: w, one number >= 0 per loss, summing to 1, or a mapping from the losses' names to
            them; `backward` then takes a mapping with the same keys.
        c: Radius of the correction relative to :math:`|g_0|`, in [0, 1). 0 gives the weighted sum.
            The combined gradient is between 1 - c and 1 + c times as long as :math:`g_0`.
        clip: ``"hard"`` (the paper), ``"soft"`` or ``"none"``; see `mixing_coefficients`.
        solver: ``"exact"``, ``"pgd"`` or ``"slsqp"``; see `solve_subproblem`.
        **options: ``shared_parameters``, ``gradients``, ``gram_every``, ``model``,
            ``nonfinite`` and ``process_group``; see `MultiObjectiveOptimizer`.

    Raises:
        TypeError: `inner` is not an optimizer.
        ValueError: Another argument is out of its range; the message names it.

    Example:
        >>> import torch
        >>> from raco_optim import CAGradClip
        >>> model = torch.nn.Linear(3, 2)
        >>> opt = CAGradClip(torch.optim.AdamW(model.parameters()), weights=[0.7, 0.3], c=0.4)
        >>> loss_a, loss_b = model(torch.ones(3)).square()
        >>> opt.zero_grad()
        >>> opt.backward([loss_a, loss_b])
        >>> opt.step()
        >>> opt.report.outcome.name
        'CORRECTED'

    References:
        Algorithm 1 of arXiv 2602.02495. Liu et al., Conflict-Averse Gradient Descent, 2021.
    """

    def __init__(
        self,
        inner: Optimizer | Sequence[Optimizer],
        weights: Weights,
        c: float = 0.4,
        *,
        clip: Clip = "hard",
        solver: Solver = "exact",
        **options: Unpack[AllOptions],
    ) -> None:
        rule = CAGradRule(c, clip, solver)
        super().__init__(inner, rule, weights=_given(weights), **options)

    clip = _of_rule("clip", "How p is clipped; may be set between steps.")


class CAGrad(_WithRadius):
    r"""Weighted CAGrad without clipping: :math:`\tilde p = p^*` in `CAGradClip`.

    Args:
        inner: The optimizer to wrap.
        weights: See `CAGradClip`.
        c: Radius of the correction, >= 0. With c >= 1 the combined gradient conflicts with no loss,
            but descent on the weighted loss (Theorem 3.1) is no longer guaranteed.
        solver: See `CAGradClip`.
        **options: See `CAGradClip`.

    Raises:
        TypeError, ValueError: See `CAGradClip`.

    Example:
        >>> import torch
        >>> from raco_optim import CAGrad
        >>> x = torch.nn.Parameter(torch.tensor([1.0, 1.0]))
        >>> opt = CAGrad(torch.optim.SGD([x], lr=0.1), weights=[0.5, 0.5], c=0.5)
        >>> opt.backward([x[0], x[1]])
        >>> x.grad
        tensor([0.7500, 0.7500])

    References:
        Liu et al., Conflict-Averse Gradient Descent for Multi-task Learning, NeurIPS 2021.
    """

    def __init__(
        self,
        inner: Optimizer | Sequence[Optimizer],
        weights: Weights,
        c: float = 0.4,
        *,
        solver: Solver = "exact",
        **options: Unpack[AllOptions],
    ) -> None:
        rule = CAGradRule(c, "none", solver, below_one=False)
        super().__init__(inner, rule, weights=_given(weights), **options)


class MGDA(MultiObjectiveOptimizer):
    r"""Steps along the min-norm point of the gradients, a direction in which no loss rises.

    .. math:: G = \sum_i p^*_i g_i, \quad p^* \in \arg\min_{p \in \Delta} |\sum_i p_i g_i|

    Args:
        inner: The optimizer to wrap.
        weights: Names of the losses, and weights for the gradients of the heads; the min-norm point
            does not depend on them. Default: any number of losses.
        **options: See `CAGradClip`.

    Raises:
        TypeError, ValueError: See `CAGradClip`.

    Example:
        >>> import torch
        >>> from raco_optim import MGDA
        >>> x = torch.nn.Parameter(torch.tensor([1.0, 1.0]))
        >>> opt = MGDA(torch.optim.SGD([x], lr=0.1))
        >>> opt.backward([x[0], 3 * x[1]])
        >>> x.grad
        tensor([0.9000, 0.3000])

    References:
        Désidéri, 2012; Sener and Koltun, Multi-Task Learning as Multi-Objective Optimization, 2018.
    """

    def __init__(
        self,
        inner: Optimizer | Sequence[Optimizer],
        weights: Weights | None = None,
        **options: Unpack[AllOptions],
    ) -> None:
        super().__init__(inner, MinNormRule(), weights=weights, **options)


class LinearScalarization(MultiObjectiveOptimizer):
    """Steps along the weighted sum of the gradients, with the report of a multi-objective step.

    It computes one gradient per loss for the report. Without the report, one backward pass of the
    weighted loss gives the same update and costs less.

    Args:
        inner: The optimizer to wrap.
        weights: See `CAGradClip`.
        **options: See `CAGradClip`.

    Raises:
        TypeError, ValueError: See `CAGradClip`.

    Example:
        >>> import torch
        >>> from raco_optim import LinearScalarization
        >>> x = torch.nn.Parameter(torch.tensor([1.0, 1.0]))
        >>> opt = LinearScalarization(torch.optim.SGD([x], lr=0.1), weights=[0.75, 0.25])
        >>> opt.backward([x[0], x[1]])
        >>> x.grad
        tensor([0.7500, 0.2500])
    """

    def __init__(
        self,
        inner: Optimizer | Sequence[Optimizer],
        weights: Weights,
        **options: Unpack[AllOptions],
    ) -> None:
        super().__init__(inner, LinearRule(), weights=_given(weights), **options)


def _given(weights: Weights | None) -> Weights | None:
    """Refuses None, which is allowed only if the rule ignores weights."""
    if weights is None:
        checked_weights(weights)
    return weights
