"""Stages 1, 2 and 5 of a step: per-loss gradients, their Gram matrix, their combination.

A mode computes the three together, because none of them needs to exist in one piece:

- `dense`: all m gradients are in memory at once (the default);
- `ghost`: the exact Gram matrix without the gradients of wide layers, which `graph` finds;
- `per_example`: one backward pass for any number of losses that depend on one scalar per example;
- `approximate`: the Gram matrix of something smaller than the gradients, or of an earlier step.

`gram` multiplies gradients, `combine` adds them up and is the only writer of ``.grad``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Protocol

from torch import Tensor

from raco_optim.objectives import Batch, Found, Gradient


class PerLossGradients(Protocol):
    """The gradients of m losses, as every mode provides them."""

    exact: bool
    """Whether a finite Gram matrix implies a finite combined gradient."""
    values: list[Tensor | None]
    """Values of the losses; None for an absent one."""
    nonfinite_ranks: str
    """Processes with a non-finite loss in words, " on rank 1"; "" for none."""

    def gram(self) -> Tensor:
        """Computes the Gram matrix of the shared parameters' gradients, ``[m, m]``, float64."""

    def head_norms(self) -> Tensor:
        """Returns norms of the head gradients, ``[m]``; non-finite iff a head gradient is."""

    def combine(self, alpha: Tensor, weights: Tensor) -> Gradient:
        """Combines shared parameters by alpha, others by the weights; consumes the gradients."""


Gather = Callable[[Batch, Iterable[Found]], PerLossGradients]
"""Averages gradients over processes as they are computed."""
