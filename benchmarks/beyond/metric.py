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
    StepReport,
    add_combined_gradient,
    gram_matrix,
    per_loss_gradients,
)
from raco_optim.rules import CAGradRule


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
        super().__init__(inner, CAGradRule(c), weights=weights, shared_parameters=shared)
        self._chosen = None if shared is None else {id(p) for p in shared}
        self._made: StepReport | None = None

    def backward(self, losses: Sequence[Tensor | None]) -> None:  # type: ignore[override]
        """Adds the combined gradient to ``.grad``."""
        parameters = [p for group in self.param_groups for p in group["params"]]
        present = [i for i, loss in enumerate(losses) if loss is not None]
        rows = per_loss_gradients([losses[i] for i in present], parameters)
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
        w = torch.tensor(self.weights, dtype=torch.float64)
        mixing = self.rule(gram_matrix(scaled), w[present].tolist())
        m = len(losses)
        gram = w.new_zeros(m, m)
        gram[torch.tensor(present)[:, None], present] = gram_matrix(trunk)
        values = [losses[i].detach() for i in present]

        def spread(x: Tensor, fill: float) -> Tensor:
            return w.new_full((m,), fill).index_put_((torch.tensor(present),), x.to(w))

        self._made = StepReport(
            names=tuple(map(str, range(m))),
            weights=w,
            gram=gram,
            coefficients=spread(mixing.coefficients, 0.0),
            losses=spread(torch.stack(values), 0.0),
            p=spread(mixing.p, torch.nan),
            p_clipped=spread(mixing.p_clipped, torch.nan),
            gap=mixing.gap,
            absent=tuple(str(i) for i in range(m) if i not in present),
        )
        add_combined_gradient([parameters[j] for j in shared], trunk, mixing.coefficients)
        if heads:
            rest = [[row[j] for j in heads] for row in rows]
            add_combined_gradient([parameters[j] for j in heads], rest, w[present])

    @property
    def last_step(self) -> StepReport | None:
        """What the last `backward` did; the Gram matrix is the Euclidean one."""
        return self._made
