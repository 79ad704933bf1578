r"""Candidate c: conflict measured in the metric in which the inner optimizer steps.

An optimizer that steps along :math:`P^{-1} G` with a positive diagonal P changes loss i by
:math:`-\eta \langle g_i, P^{-1} G \rangle`. So the products that tell whether gradients conflict,
and the trust region, are those of

.. math:: H_{ij} = \langle g_i, P^{-1} g_j \rangle

and with it CAGrad-Clip's guarantees hold for the step that is taken. P is that of the last step:
the root of the second moments for Adam and RMSprop, of the sum of squares for Adagrad.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.optim import Adagrad, Adam, NAdam, Optimizer, RMSprop

from raco_optim import (
    MultiObjectiveOptimizer,
    add_combined_gradient,
    gram_matrix,
    mixing_coefficients,
    per_loss_gradients,
)
from raco_optim.report import StepReport, make_report


def inverse_roots(inner: Optimizer) -> list[Tensor | None]:
    """P^(-1/2) of every parameter; None, the identity, for one that was not stepped yet.

    Raises:
        TypeError: The optimizer has no diagonal preconditioner.
    """
    if not isinstance(inner, Adam | NAdam | RMSprop | Adagrad):  # AdamW is an Adam
        raise TypeError(
            f"`inner` must be Adam, AdamW, NAdam, RMSprop or Adagrad, whose steps have a diagonal "
            f"preconditioner; got {type(inner).__name__}. Use CAGradClip."
        )
    found: list[Tensor | None] = []
    for group in inner.param_groups:
        for parameter in group["params"]:
            state = inner.state.get(parameter, {})
            if isinstance(inner, Adagrad):
                squares = state["sum"] if state and state["step"] > 0 else None
            elif not state:
                squares = None
            elif isinstance(inner, RMSprop):
                squares = state["square_avg"]
            else:
                squares = state["exp_avg_sq"] / (1 - group["betas"][1] ** float(state["step"]))
            root = None if squares is None else squares.sqrt().add_(group["eps"]).rsqrt_()
            found.append(root)
    return found


class InnerMetric(MultiObjectiveOptimizer):
    """CAGrad-Clip with the Gram matrix in the metric of the inner optimizer's last step."""

    def __init__(
        self,
        inner: Optimizer,
        weights: Sequence[float],
        c: float,
        shared: Sequence[Tensor] | None = None,
    ) -> None:
        inverse_roots(inner)
        super().__init__(
            inner,
            lambda gram: mixing_coefficients(gram, weights, c),
            weights=weights,
            shared_parameters=shared,
        )
        self._chosen = None if shared is None else {id(p) for p in shared}

    def backward(self, losses: Sequence[Tensor | None]) -> None:  # type: ignore[override]
        """Adds the combined gradient to ``.grad``."""
        parameters = [p for group in self.param_groups for p in group["params"]]
        present = [loss for loss in losses if loss is not None]
        given = iter(per_loss_gradients(present, parameters))
        none: list[Tensor | None] = [None] * len(parameters)
        rows = [none if loss is None else next(given) for loss in losses]
        roots = inverse_roots(self.optimizer)
        shared = [
            j for j, p in enumerate(parameters) if self._chosen is None or id(p) in self._chosen
        ]
        heads = [j for j in range(len(parameters)) if j not in shared]
        trunk = [[row[j] for j in shared] for row in rows]
        scaled = [
            [
                g if g is None or roots[j] is None else g * roots[j]
                for g, j in zip(row, shared, strict=True)
            ]
            for row in trunk
        ]
        mixing = self.rule(gram_matrix(scaled))
        gram = gram_matrix(trunk)
        weights = gram.new_tensor(self.weights)
        self._made = make_report(
            names=[str(i) for i in range(len(losses))],
            weights=weights.tolist(),
            gradients=gram,
            p=mixing.p,
            p_clipped=mixing.p_clipped,
            coefficients=mixing.coefficients,
            gap=mixing.gap,
            losses=torch.stack(
                [weights.new_zeros(()) if x is None else x.detach().to(weights) for x in losses]
            ),
            absent=[x is None for x in losses],
            skip=False,
            skipped=0,
        )
        add_combined_gradient([parameters[j] for j in shared], trunk, mixing.coefficients)
        if heads:
            rest = [[row[j] for j in heads] for row in rows]
            add_combined_gradient([parameters[j] for j in heads], rest, weights)

    @property
    def report(self) -> StepReport:
        """What the last `backward` did; the Gram matrix is the Euclidean one."""
        return self._made
