r"""Mode "dense", the default: the gradients of all losses are in memory at once.

.. math:: g_i = \nabla_\theta L_i, \qquad H_{ij} = \langle g_i, g_j \rangle, \qquad
          G = \sum_i \alpha_i g_i
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge

from raco_optim.gradients import Gather, PerLossGradients
from raco_optim.gradients.accumulation import accumulate, add_pending
from raco_optim.gradients.combine import combine_rows
from raco_optim.gradients.explain import (
    A_PARAMETER,
    check_no_reentrant_checkpoint,
    evaluate,
    explain,
    refused_loss,
    refused_parameters,
    sparse_gradient,
)
from raco_optim.gradients.gram import Workspace
from raco_optim.objectives import Batch, Found, Gradient, Loss, Pending


class Memory:
    """Keeps scratch memory and, on a CPU, empty tensors in place of m - 1 consumed gradients.

    Otherwise the allocator returns large blocks to the system, and page faults for new gradients
    cost as much as their Gram matrix. Blanks of a row are freed just before its backward pass.
    """

    def __init__(self) -> None:
        self.workspace = Workspace()
        self.blanks: list[list[Tensor]] = []

    def passes(self, found: Iterable[Found], m: int) -> Iterator[Found]:
        """Yields m values and gradients, and frees memory before each is computed."""
        old, self.blanks = self.blanks[:m], [[] for _ in range(m)]
        source = iter(found)
        for i in range(m):
            if i < len(old):
                old[i].clear()
            yield next(source)


@dataclass
class DenseGradients:
    """Values and gradients of m losses in this process."""

    values: list[Tensor | None]
    rows: list[Gradient]
    shared: Sequence[bool]
    nonfinite_ranks: str = ""
    exact: bool = True
    memory: Memory = field(default_factory=Memory)

    @property
    def _device(self) -> torch.device | str:
        return next((g.device for row in self.rows for g in row if g is not None), "cpu")

    def gram(self) -> Tensor:
        """See `PerLossGradients`."""
        rows = self.rows
        if not all(self.shared):
            rows = [[g for g, s in zip(row, self.shared, strict=True) if s] for row in rows]
        return self.memory.workspace.gram(rows).to(self._device)

    def head_norms(self) -> Tensor:
        """See `PerLossGradients`."""
        norms = torch.zeros(len(self.rows), dtype=torch.float64, device=self._device)
        if not all(self.shared):
            for i, row in enumerate(self.rows):
                for g, is_shared in zip(row, self.shared, strict=True):
                    if g is not None and not is_shared:
                        norms[i] += torch.linalg.vector_norm(g, dtype=torch.float64)
        return norms

    def combine(self, alpha: Tensor, weights: Tensor) -> Gradient:
        """See `PerLossGradients`."""
        return combine_rows(self.rows, alpha, weights, self.shared, self.memory.blanks)


class DenseMode:
    """Computes a gradient per loss, with a backward pass for each."""

    name = "dense"

    def __init__(self, gather: Gather | None = None) -> None:
        self._gather, self._memory = gather, Memory()
        self.ran = self.name  # the mode of the last call, and the reason if it is another one

    def check(self, batch: Batch, *, accumulate: bool) -> None:
        """Raises unless the arguments of ``backward`` fit the mode."""

    def rows(self, batch: Batch) -> Iterator[Found]:
        """Yields the value and the gradient of each loss."""
        return iterate_gradients(
            batch.losses, batch.parameters.tensors, batch.names, keep_graph=batch.retain_graph
        )

    def collect(self, batch: Batch) -> PerLossGradients:
        """Returns the gradients of this call, added to those of earlier micro-batches."""
        found = self.rows(batch)
        if batch.pending is not None:
            found = add_pending(found, batch.pending)
        if self._gather is not None:
            return self._gather(batch, found)
        gradients = DenseGradients([], [], batch.parameters.shared, memory=self._memory)
        for value, row in self._memory.passes(found, len(batch.names)):
            gradients.values.append(value)
            gradients.rows.append(row)
        return gradients

    def accumulate(self, batch: Batch, *, named: bool) -> Pending:
        """Adds the gradients of a micro-batch to the pending ones."""
        found = self._memory.passes(self.rows(batch), len(batch.names))
        return accumulate(found, batch, named=named)


def iterate_gradients(
    losses: Sequence[Loss | None],
    parameters: Sequence[Tensor],
    names: Sequence[str],
    edges: Sequence[GradientEdge] = (),
    *,
    keep_graph: bool = False,
    needed: str | None = A_PARAMETER,
) -> Iterator[Found]:
    """Yields the value and the gradient of each loss; see `per_loss_gradients`.

    Gradients of `edges` of the graph follow those of the parameters. `needed` says what a loss must
    depend on, and the remedy; None allows a loss that reaches nothing.
    """
    trained = [p.requires_grad for p in parameters]
    inputs: Any = (*(p for p, t in zip(parameters, trained, strict=True) if t), *edges)
    tensors = [i for i, loss in enumerate(losses) if isinstance(loss, Tensor)]
    calls = [i for i, loss in enumerate(losses) if loss is not None and i not in tensors]
    walked: set[Any] = set()
    for i, (name, loss) in enumerate(zip(names, losses, strict=True)):
        if loss is None:
            yield None, [None] * (len(parameters) + len(edges))
            continue
        value = loss if isinstance(loss, Tensor) else evaluate(name, loss)
        if value is not loss:
            check_loss(name, value, parameters)
        retain = keep_graph or i in tensors[:-1]
        try:
            row: Gradient = list(
                torch.autograd.grad(value, inputs, retain_graph=retain, allow_unused=True)
            )
        except Exception as error:
            explain(name, error, again=i in tensors[1:])
            raise
        there = [g for g in row if g is not None]
        if len(there) < len(row):
            check_no_reentrant_checkpoint(name, value, walked)
        if needed is not None and not there:
            raise ValueError(f"loss {name!r} must depend on {needed}")
        if any(g.layout != torch.strided for g in there):
            raise sparse_gradient(name, row)
        value = value.detach().clone()
        del loss, there  # frees its graph, and gradients that the caller drops before the next pass
        if calls and i < calls[-1]:
            # The next callable may overwrite a buffer that a custom function returned as gradient.
            row = [None if g is None else g.clone() for g in row]
        if not all(trained):
            found = iter(row)
            row = [next(found) if t else None for t in (*trained, *(True for _ in edges))]
            del found
        yield value, row


def check_losses(
    losses: Sequence[Loss | None], parameters: Sequence[Tensor], names: Sequence[str]
) -> None:
    """Raises if a loss is invalid, before the first backward pass."""
    for name, loss in zip(names, losses, strict=True):
        if isinstance(loss, Tensor) or not (loss is None or callable(loss)):
            check_loss(name, loss, parameters, called=False)


def check_loss(name: str, loss: Any, parameters: Sequence[Tensor], *, called: bool = True) -> None:  # noqa: ANN401  # checked here
    """Raises if a loss, or the result of its callable, is invalid."""
    fits = isinstance(loss, Tensor) and loss.numel() == 1 and loss.requires_grad
    if fits and not loss.is_complex() and (not parameters or loss.device == parameters[0].device):
        return
    raise refused_loss(name, loss, parameters, called=called)


def check_parameters(parameters: Sequence[Tensor]) -> None:
    """Raises unless parameters are real, on one device, and at least one is trainable."""
    some_complex = any(p.is_complex() for p in parameters)
    trained = any(p.requires_grad for p in parameters)
    if some_complex or not trained or len({p.device for p in parameters}) > 1:
        raise refused_parameters(parameters)
