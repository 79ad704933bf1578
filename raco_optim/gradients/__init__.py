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
    """What every mode offers of the gradients of m losses."""

    exact: bool
    """Whether a finite Gram matrix says that the combined gradient is finite."""
    values: list[Tensor | None]
    """Values of the losses; None for an absent one."""
    nonfinite_ranks: str
    """Which processes have a loss that is NaN or Inf, in words: " on rank 1"; "" for none."""

    def gram(self) -> Tensor:
        """Computes the Gram matrix of the shared parameters' gradients, ``[m, m]``, float64."""

    def head_norms(self) -> Tensor:
        """Returns norms of the head gradients, ``[m]``; non-finite iff a head gradient is."""

    def combine(self, alpha: Tensor, weights: Tensor) -> Gradient:
        """Combines by alpha where parameters are shared, else by the weights; consumes them."""


Gather = Callable[[Batch, Iterable[Found]], PerLossGradients]
"""Averages gradients over processes, as soon as each is found."""
