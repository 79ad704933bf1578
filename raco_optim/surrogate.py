r"""Modes that approximate: the Gram matrix of something smaller than the gradients.

Surrogates :math:`s_i` stand for the gradients :math:`g_i` in the Gram matrix,
:math:`H_{ij} = \langle s_i, s_j \rangle`: the gradients with respect to a representation that the
losses share, :math:`s_i = \partial L_i / \partial z`, or to a subset of the parameters; or H is
that of an earlier step. The combined gradient is that of :math:`\sum_i \alpha_i L_i`, by one
backward pass, whatever m. What is approximate is :math:`\alpha` alone.

References:
    The representation: Sener and Koltun, Multi-Task Learning as Multi-Objective Optimization,
    2018 (MGDA-UB).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from raco_optim import replicated
from raco_optim.combine import Coefficients, add_combined_gradient
from raco_optim.gradients import Gradient, iterate_gradients
from raco_optim.gram import gram_matrix
from raco_optim.processes import Processes

# Argument that holds the inputs -> what a loss must depend on, and the remedy.
_NEEDED = {
    "gram": "a parameter of `gram`; it reaches none. Pass parameters that all losses share, or "
    "None for a loss that is absent from this batch.",
    "representation": "`representation`; it does not. Pass the tensor itself that all losses are "
    "computed from, or None for a loss that is absent from this batch.",
}


@dataclass
class SurrogateGradients:
    """The losses with their graph, and the Gram matrix of their surrogates."""

    names: tuple[str, ...]
    losses: list[Tensor | None]
    surrogate_gram: Tensor
    processes: Processes

    def __post_init__(self) -> None:
        values = [None if loss is None else loss.detach() for loss in self.losses]
        self.values, self.where = self.processes.mean(values)

    def gram(self, shared: Sequence[bool]) -> Tensor:  # surrogates have no parts
        """Returns the Gram matrix of the surrogates, ``[m, m]``, float64."""
        return self.surrogate_gram

    def finite(self, shared: Sequence[bool]) -> Tensor:
        """Returns zeros: the gradients of the single losses are not known."""
        return self.surrogate_gram.new_zeros(len(self.names))

    def add_to_grad(
        self, parameters: Sequence[Tensor], coefficients: Coefficients, *, check: bool
    ) -> bool:
        """Adds the combined gradient to ``.grad``.

        With `check`, nothing is written and False returned where it is NaN or Inf.
        """
        with self.processes.agreeing():
            row = self._row(parameters, coefficients)
        if self.processes.several:
            one = torch.ones(1, device="cpu")
            found = [(one, row)]
            shared = coefficients.shared
            mean = replicated.collect(("sum",), found, parameters, shared, self.processes)
            row = mean.combine(parameters, one, one)
        if check:
            extremes = [torch.stack(g.aminmax()) for g in row if g is not None and g.numel()]
            if extremes and not bool(torch.cat(extremes).isfinite().all()):
                return False
        # Not `row` itself: autograd may return a tensor that user code holds too.
        add_combined_gradient(parameters, [row], torch.ones(1, device="cpu"))
        return True

    def _row(self, parameters: Sequence[Tensor], coefficients: Coefficients) -> Gradient:
        """Returns the combined gradient of this process, by a pass for each part."""
        row: Gradient = [None] * len(parameters)
        trainable = [
            (chosen, of_part)
            for positions, of_part in coefficients.parts()
            if (chosen := [j for j in positions if parameters[j].requires_grad])
        ]
        for k, (chosen, of_part) in enumerate(trainable, start=1):
            # The last pass, that of the shared part, frees the graph behind the heads too.
            keep = k < len(trainable)
            found = self._combine([parameters[j] for j in chosen], of_part, keep=keep)
            for j, g in zip(chosen, found, strict=True):
                row[j] = g
        if all(g is None for g in row):
            raise ValueError(
                "losses must depend on a parameter of the optimizer; together they reach none. Was "
                "the optimizer built from this model's parameters?"
            )
        return row

    def _combine(self, parameters: list[Tensor], coefficients: Tensor, *, keep: bool) -> Gradient:
        with torch.enable_grad():
            total = torch.stack(
                [
                    a * loss.reshape(())
                    for a, loss in zip(coefficients.detach(), self.losses, strict=True)
                    if loss is not None
                ]
            ).sum()
        name = " + ".join(self.names)
        gradients = iterate_gradients([total], parameters, [name], keep_graph=keep, needed=None)
        return next(gradients)[1]


def collect(
    names: tuple[str, ...],
    losses: list[Tensor | None],
    inputs: Sequence[Tensor],
    argument: Literal["gram", "representation"],
    processes: Processes,
) -> SurrogateGradients:
    """Computes the Gram matrix of the gradients with respect to `inputs`, given as `argument`."""
    with processes.agreeing():
        _check(losses, inputs, argument)
        needed = _NEEDED[argument]
        found = list(iterate_gradients(losses, inputs, names, keep_graph=True, needed=needed))
    if not processes.several:
        gram = gram_matrix([row for _, row in found])
    elif argument == "gram":
        whole = [True] * len(inputs)
        gram = replicated.collect(names, found, inputs, whole, processes).gram(whole)
    else:
        # The representation of the joint batch is made of those of the processes.
        gram = gram_matrix([row for _, row in found]) / processes.number**2
        gram = processes.sum([gram], inputs[0].device)[0].view_as(gram)
    return SurrogateGradients(names, losses, gram, processes)


def _check(losses: list[Tensor | None], inputs: Sequence[Tensor], argument: str) -> None:
    if not any(x.requires_grad for x in inputs):
        raise ValueError(
            f"`{argument}` must require gradients; got frozen parameters, or a tensor without a "
            f"graph (detached, or computed under torch.no_grad())."
        )
    if any(x.is_complex() for x in inputs):
        raise ValueError(f"`{argument}` must be real; got a complex tensor.")
    devices = {x.device for x in (*losses, *inputs) if x is not None}
    if len(devices) > 1:
        found = ", ".join(sorted(str(device) for device in devices))
        raise ValueError(f"`{argument}` must be on the device of the losses; got {found}.")
