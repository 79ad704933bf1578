"""The methods: each is `MultiObjectiveOptimizer` with a rule from Gram matrix to coefficients."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from torch import Tensor
from torch.optim import Optimizer

from raco_optim._checks import checked_choice, checked_radius, checked_weights
from raco_optim.coefficients import (
    CLIPS,
    Clip,
    MixingCoefficients,
    min_norm_coefficients,
    mixing_coefficients,
)
from raco_optim.optimizer import MultiObjectiveOptimizer
from raco_optim.simplex import SOLVERS, Solver
from raco_optim.step import Mode, NonFinite
from raco_optim.weights import Weights

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


class CAGradClip(MultiObjectiveOptimizer):
    r"""CAGrad with weights and clipping: the optimizer of RACO.

    With :math:`g_i = \nabla L_i`, :math:`g_0 = \sum_i w_i g_i` and :math:`G_p = \sum_i p_i g_i`,

    .. math::
        p^* &\in \arg\min_{p \in \Delta} \; \langle G_p, g_0 \rangle + c |g_0| |G_p| \\
        \tilde p &= \min(p^*, w) \\
        G_0 &= g_0 + c |g_0| \tilde G / |\tilde G|, \quad \tilde G = \sum_i \tilde p_i g_i

    and the inner optimizer steps along :math:`G_0`.

    Args:
        inner: The optimizer to drive, any of `torch.optim`.
        weights: w, one number >= 0 per loss, summing to 1, or a mapping from the losses' names to
            them; `backward` then takes a mapping with the same keys.
        c: Radius of the correction relative to :math:`|g_0|`, in [0, 1). 0 is the weighted sum.
            The length of the combined gradient lies between 1 - c and 1 + c times that of
            :math:`g_0`.
        clip: ``"hard"`` (the paper), ``"soft"`` or ``"none"``; see `mixing_coefficients`.
        solver: ``"exact"``, ``"pgd"`` or ``"slsqp"``; see `solve_subproblem`.
        shared_parameters: Only these enter the Gram matrix and get :math:`G_0`; the other
            parameters (task heads) get their part of :math:`g_0`. Default: all of `inner`.
        nonfinite: ``"raise"``, ``"skip"`` or ``"propagate"``; see `MultiObjectiveOptimizer`.
        gram: How the Gram matrix is had: ``"materialized"`` or ``"ghost"`` (exact), or
            ``"representation"`` or parameters (approximate); see `MultiObjectiveOptimizer`.
        solve_every: Steps that one Gram matrix serves; above 1 an approximation.
        process_group: The processes that train the model together; see `MultiObjectiveOptimizer`.

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

    _deterministic = True

    def __init__(
        self,
        inner: Optimizer,
        weights: Weights,
        c: float = 0.4,
        *,
        clip: Clip = "hard",
        solver: Solver = "exact",
        shared_parameters: Iterable[Tensor] | None = None,
        nonfinite: NonFinite = "raise",
        gram: Mode | Iterable[Tensor] = "materialized",
        solve_every: int = 1,
        process_group: ProcessGroup | None = None,
    ) -> None:
        checked_weights(weights)
        self.c = c
        self.clip: Clip = checked_choice("clip", clip, CLIPS)
        self.solver: Solver = checked_choice("solver", solver, SOLVERS)
        super().__init__(
            inner,
            self._mix,
            weights=weights,
            shared_parameters=shared_parameters,
            nonfinite=nonfinite,
            gram=gram,
            solve_every=solve_every,
            process_group=process_group,
        )

    @property
    def c(self) -> float:
        """Radius of the correction relative to the weighted gradient; may be set between steps."""
        return self._c

    @c.setter
    def c(self, c: float) -> None:
        self._c = self._checked_c(c)

    @staticmethod
    def _checked_c(c: float) -> float:
        return checked_radius(c, below_one=True)

    def _mix(self, gram: Tensor) -> MixingCoefficients:
        w = self._weights.of(len(gram))
        return mixing_coefficients(gram, w, self.c, clip=self.clip, solver=self.solver)

    def _described(self) -> dict[str, Any]:
        return {"weights": self.weights, "c": self.c, "clip": self.clip, "solver": self.solver}

    def _own_state(self) -> dict[str, Any]:
        return {**super()._own_state(), "c": self.c}

    def _check_own_state(self, own: dict[str, Any]) -> None:
        super()._check_own_state(own)
        self._checked_c(own["c"])

    def _load_own_state(self, own: dict[str, Any]) -> None:
        super()._load_own_state(own)
        self.c = own["c"]


class CAGrad(CAGradClip):
    r"""CAGrad with weights and without clipping: :math:`\tilde p = p^*`.

    Args:
        inner: The optimizer to drive.
        weights: See `CAGradClip`.
        c: Radius of the correction, >= 0. For c >= 1 no combined gradient conflicts with any loss,
            but the guarantee of descent on the weighted loss (Theorem 3.1) is gone.
        solver: See `CAGradClip`.
        shared_parameters: See `CAGradClip`.
        nonfinite: See `CAGradClip`.
        gram: See `CAGradClip`.
        solve_every: See `CAGradClip`.
        process_group: See `CAGradClip`.

    Raises:
        TypeError: `inner` is not an optimizer.
        ValueError: Another argument is out of its range; the message names it.

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
        inner: Optimizer,
        weights: Weights,
        c: float = 0.4,
        *,
        solver: Solver = "exact",
        shared_parameters: Iterable[Tensor] | None = None,
        nonfinite: NonFinite = "raise",
        gram: Mode | Iterable[Tensor] = "materialized",
        solve_every: int = 1,
        process_group: ProcessGroup | None = None,
    ) -> None:
        super().__init__(
            inner,
            weights,
            c,
            clip="none",
            solver=solver,
            shared_parameters=shared_parameters,
            nonfinite=nonfinite,
            gram=gram,
            solve_every=solve_every,
            process_group=process_group,
        )

    @staticmethod
    def _checked_c(c: float) -> float:
        return checked_radius(c, below_one=False)


class MGDA(MultiObjectiveOptimizer):
    """The min-norm point of the gradients: a direction in which no loss rises.

    Args:
        inner: The optimizer to drive.
        weights: They name the losses and combine the gradients of the heads; the min-norm point
            does not depend on them. Default: any number of losses.
        shared_parameters: See `CAGradClip`.
        nonfinite: See `CAGradClip`.
        gram: See `CAGradClip`.
        solve_every: See `CAGradClip`.
        process_group: See `CAGradClip`.

    Raises:
        TypeError: `inner` is not an optimizer.
        ValueError: Another argument is out of its range; the message names it.

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

    _deterministic = True

    def __init__(
        self,
        inner: Optimizer,
        weights: Weights | None = None,
        *,
        shared_parameters: Iterable[Tensor] | None = None,
        nonfinite: NonFinite = "raise",
        gram: Mode | Iterable[Tensor] = "materialized",
        solve_every: int = 1,
        process_group: ProcessGroup | None = None,
    ) -> None:
        super().__init__(
            inner,
            min_norm_coefficients,
            weights=weights,
            shared_parameters=shared_parameters,
            nonfinite=nonfinite,
            gram=gram,
            solve_every=solve_every,
            process_group=process_group,
        )


class LinearScalarization(MultiObjectiveOptimizer):
    """The weighted sum of the gradients, with the report of a multi-objective step.

    The gradients are computed per loss, for the report's sake; one backward pass of the weighted
    loss gives the same update for less.

    Args:
        inner: The optimizer to drive.
        weights: See `CAGradClip`.
        nonfinite: See `CAGradClip`.
        process_group: See `CAGradClip`.

    Raises:
        TypeError: `inner` is not an optimizer.
        ValueError: Another argument is out of its range; the message names it.

    Example:
        >>> import torch
        >>> from raco_optim import LinearScalarization
        >>> x = torch.nn.Parameter(torch.tensor([1.0, 1.0]))
        >>> opt = LinearScalarization(torch.optim.SGD([x], lr=0.1), weights=[0.75, 0.25])
        >>> opt.backward([x[0], x[1]])
        >>> x.grad
        tensor([0.7500, 0.2500])
    """

    _deterministic = True

    def __init__(
        self,
        inner: Optimizer,
        weights: Weights,
        *,
        nonfinite: NonFinite = "raise",
        process_group: ProcessGroup | None = None,
    ) -> None:
        checked_weights(weights)
        super().__init__(
            inner, self._mix, weights=weights, nonfinite=nonfinite, process_group=process_group
        )

    def _mix(self, gram: Tensor) -> MixingCoefficients:
        return MixingCoefficients(gram.new_tensor(self._weights.of(len(gram))))
