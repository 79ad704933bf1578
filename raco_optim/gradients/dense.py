r"""Mode "dense", the default: the gradients of all losses are in memory at once.

.. math:: g_i = \nabla_\theta L_i, \qquad H_{ij} = \langle g_i, g_j \rangle, \qquad
          G = \sum_i \alpha_i g_i
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
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
    sparse_gradient,
)
from raco_optim.gradients.gram import gram_matrix
from raco_optim.objectives import Batch, Found, Gradient, Loss, Pending

# Bytes from which on fresh memory costs more, in page faults, than a copy into memory at hand.
_LARGE = 2**20


class Memory:
    """Holds large gradients in memory that is kept from step to step; copies of it are empty.

    On a CPU the allocator returns large blocks to the system, and to fault m gradients in anew
    costs more than the Gram matrix and the combination together. Accelerators keep them.
    """

    def __init__(self) -> None:
        self._tensors: dict[tuple[int, int], Tensor] = {}

    def hold(self, i: int, row: Gradient) -> Gradient:
        """Moves the large tensors of the i-th gradient into this memory; the row is consumed."""
        for j, g in enumerate(row):
            if g is None or g.device.type != "cpu" or g.nbytes < _LARGE:
                continue
            held = self._tensors.get((i, j))
            if held is None or (held.shape, held.dtype) != (g.shape, g.dtype):
                held = self._tensors[i, j] = torch.empty_like(g)
            row[j] = held.copy_(g)
        return row

    def __reduce__(self) -> tuple[type[Memory], tuple[()]]:
        return Memory, ()


@dataclass
class DenseGradients:
    """Values and gradients of m losses, as this process has them."""

    values: list[Tensor | None]
    rows: list[Gradient]
    shared: Sequence[bool]
    nonfinite_ranks: str = ""
    exact: bool = True

    @property
    def _device(self) -> torch.device | str:
        return next((g.device for row in self.rows for g in row if g is not None), "cpu")

    def gram(self) -> Tensor:
        """See `PerLossGradients`."""
        rows = self.rows
        if not all(self.shared):
            rows = [[g for g, s in zip(row, self.shared, strict=True) if s] for row in rows]
        return gram_matrix(rows).to(self._device)

    def head_norms(self) -> Tensor:
        """See `PerLossGradients`."""
        norms = torch.zeros(len(self.rows), dtype=torch.float64, device=self._device)
        for norm, row in zip(norms, self.rows, strict=True):
            for g, is_shared in zip(row, self.shared, strict=True):
                if g is not None and not is_shared:
                    norm += torch.linalg.vector_norm(g, dtype=torch.float64)
        return norms

    def combine(self, alpha: Tensor, weights: Tensor) -> Gradient:
        """See `PerLossGradients`."""
        return combine_rows(self.rows, alpha, weights, self.shared)


class DenseMode:
    """Computes a gradient per loss, by one backward pass each."""

    name = "dense"

    def __init__(self, gather: Gather | None = None) -> None:
        self._gather, self._memory = gather, Memory()
        self.ran = self.name  # what the last call did, and why, where it is another mode

    def check(self, batch: Batch, *, accumulate: bool) -> None:
        """Raises unless what was passed to ``backward`` is what the mode needs."""

    def rows(self, batch: Batch) -> Iterator[Found]:
        """Yields value and gradient of one loss after the other."""
        return iterate_gradients(
            batch.losses, batch.parameters.tensors, batch.names, keep_graph=batch.retain_graph
        )

    def collect(self, batch: Batch) -> PerLossGradients:
        """Gathers the gradients of this call and of earlier micro-batches."""
        found = self.rows(batch)
        if batch.pending is not None:
            found = add_pending(found, batch.pending)
        if self._gather is not None:
            return self._gather(batch, found)
        gradients = DenseGradients([], [], batch.parameters.shared)
        last = len(batch.names) - 1
        for i, (value, row) in enumerate(found):
            gradients.values.append(value)
            gradients.rows.append(row if i == last else self._memory.hold(i, row))
        return gradients

    def accumulate(self, batch: Batch, *, named: bool) -> Pending:
        """Adds the gradients of a micro-batch to those of earlier ones."""
        return accumulate(self.rows(batch), batch, named=named)


def iterate_gradients(
    losses: Sequence[Loss | None],
    parameters: Sequence[Tensor],
    names: Sequence[str],
    edges: Sequence[GradientEdge] = (),
    *,
    keep_graph: bool = False,
    needed: str | None = A_PARAMETER,
) -> Iterator[Found]:
    """Yields value and gradient of one loss after the other; see `per_loss_gradients`.

    The gradients of `edges` of the graph follow those of the parameters. `needed` says what a loss
    must depend on, and the remedy; None allows a loss that reaches nothing.
    """
    inputs: Any = (*(p for p in parameters if p.requires_grad), *edges)
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
            found: Gradient = list(
                torch.autograd.grad(value, inputs, retain_graph=retain, allow_unused=True)
            )
        except Exception as error:
            explain(name, error, again=i in tensors[1:])
            raise
        if any(g is None for g in found):
            check_no_reentrant_checkpoint(name, value, walked)
        if needed is not None and all(g is None for g in found):
            raise ValueError(f"loss {name!r} must depend on {needed}")
        value = value.detach().clone()
        del loss  # its graph
        if calls and i < calls[-1]:
            # The next callable may refill a buffer that a custom function returned as gradient.
            found = [None if g is None else g.clone() for g in found]
        if any(g is not None and g.layout != torch.strided for g in found):
            raise sparse_gradient(name, found)
        reached = iter(found)
        row = [next(reached) if p.requires_grad else None for p in parameters]
        row.extend(reached)
        # What the caller frees of the row is to be free during the next backward pass.
        del found, reached
        yield value, row


def check_losses(
    losses: Sequence[Loss | None], parameters: Sequence[Tensor], names: Sequence[str]
) -> None:
    """Raises where the losses are not what they must be, before the first backward pass."""
    for name, loss in zip(names, losses, strict=True):
        if isinstance(loss, Tensor):
            check_loss(name, loss, parameters)
        elif loss is not None and not callable(loss):
            raise TypeError(
                f"loss {name!r} must be a scalar tensor, a callable that returns one, or None; "
                f"got {type(loss).__name__}."
            )


def check_parameters(parameters: Sequence[Tensor]) -> None:
    """Raises unless parameters are real, on one device, and one at least is trainable."""
    for p in parameters:
        if p.is_complex():
            raise ValueError(
                f"parameters must be real; got one of dtype {p.dtype} and shape {list(p.shape)}. "
                f"Hold its real and imaginary parts in two parameters (torch.view_as_real)."
            )
    if not any(p.requires_grad for p in parameters):
        raise ValueError(
            f"parameters must hold one at least that requires gradients; got {len(parameters)} "
            f"that do not. Call requires_grad_() on those to train."
        )
    devices = sorted({str(p.device) for p in parameters})
    if len(devices) > 1:
        raise ValueError(
            f"parameters must be on one device; got {', '.join(devices)}. Move the model to one of "
            f"them."
        )


def check_loss(name: str, loss: object, parameters: Sequence[Tensor]) -> None:
    """Raises unless a loss, or what its callable returned, is what it must be."""
    if not isinstance(loss, Tensor):
        raise TypeError(
            f"loss {name!r} must be a scalar tensor; its callable returned {type(loss).__name__}."
        )
    if loss.numel() != 1:
        raise ValueError(
            f"loss {name!r} must be a scalar; got shape {list(loss.shape)}. Reduce it, for example "
            f"with .mean()."
        )
    if loss.is_complex():
        raise ValueError(f"loss {name!r} must be real; got dtype {loss.dtype}. Pass its .real.")
    if not loss.requires_grad:
        raise ValueError(
            f"loss {name!r} must have a graph; it was computed without gradients (under "
            f"torch.no_grad(), detached, or from frozen parameters only). Pass None for a loss "
            f"that is absent from this batch."
        )
    if parameters and loss.device != parameters[0].device:
        raise ValueError(
            f"loss {name!r} must be on the device of the parameters, {parameters[0].device}; got "
            f"{loss.device}. Move it there with .to()."
        )
