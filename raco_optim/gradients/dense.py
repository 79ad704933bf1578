r"""Mode "dense", the default: the gradients of all losses are in memory at once.

.. math:: g_i = \nabla_\theta L_i, \qquad H_{ij} = \langle g_i, g_j \rangle, \qquad
          G = \sum_i \alpha_i g_i
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge

from raco_optim._checks import add_note, as_list, check_any_present
from raco_optim.gradients.accumulation import accumulate, add_pending
from raco_optim.gradients.combine import combine_rows
from raco_optim.gradients.explain import check_no_reentrant_checkpoint, explain
from raco_optim.gradients.gram import gram_matrix
from raco_optim.objectives import Batch, Found, Gradient, Loss, Pending

_A_PARAMETER = (
    "a parameter of the optimizer; it reaches none. Was the optimizer built from this model's "
    "parameters? Pass None for a loss that is absent from this batch."
)
# Bytes from which on fresh memory costs more, in page faults, than a copy into memory at hand.
_LARGE = 2**20


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


def per_loss_gradients(
    losses: Iterable[Loss | None], parameters: Iterable[Tensor]
) -> list[Gradient]:
    r"""Computes the gradient of every loss with respect to every parameter.

    .. math:: g_i = \nabla_\theta L_i, \quad i = 1, \dots, m

    The gradients stay lists of per-parameter tensors and are never copied into one
    ``[m, n]`` matrix. The last backward pass frees the graph; with callables each graph is
    freed before the next forward pass. ``.grad`` is neither read nor written, so hooks on the
    accumulation of ``.grad`` (those of DistributedDataParallel among them) do not run.

    Args:
        losses: m scalar tensors that share a graph or not, or callables without arguments that
            return one, evaluated one at a time; None stands for a loss that is absent from this
            batch and has a zero gradient.
        parameters: Leaf tensors, real, on one device. Frozen ones have no gradient.

    Returns:
        m lists, one tensor per parameter in its shape and dtype, or None where the loss does not
        reach the parameter.

    Raises:
        TypeError: A loss is neither a tensor nor a callable nor None.
        ValueError: A loss is not a scalar, is complex, has no graph or reaches no parameter; all
            losses are None; no parameter is trainable, or one is complex; devices differ; a
            gradient is sparse.
        RuntimeError: Reentrant activation checkpointing hides parameters from a backward pass.
            What a backward pass raises keeps its class; a note names the loss and the remedy.

    Example:
        >>> import torch
        >>> from raco_optim import per_loss_gradients
        >>> x = torch.tensor([3.0, 4.0], requires_grad=True)
        >>> y = torch.tensor([1.0], requires_grad=True)
        >>> per_loss_gradients([(x**2).sum(), (x[0] * y).sum()], [x, y])
        [[tensor([6., 8.]), None], [tensor([1., 0.]), tensor([3.])]]

    References:
        Algorithm 1, line 3, of arXiv 2602.02495.
    """
    ordered = as_list(losses)
    check_any_present(ordered)
    names, chosen = [str(i) for i in range(len(ordered))], list(parameters)
    check_parameters(chosen)
    check_losses(ordered, chosen, names)
    return [gradient for _, gradient in iterate_gradients(ordered, chosen, names)]


Gather = Callable[[Batch, Iterable[Found]], PerLossGradients]
"""Averages gradients over processes, as soon as each is found."""


class Memory:
    """Holds large gradients in memory that is kept from step to step.

    On a CPU the allocator gives large blocks back to the system, and faulting m gradients in anew
    costs more than the Gram matrix and the combination together. On an accelerator it keeps them
    by itself. Copies and pickles of this memory are empty.
    """

    def __init__(self) -> None:
        self._tensors: dict[tuple[int, int], Tensor] = {}

    def hold(self, i: int, row: Gradient) -> Gradient:
        """Moves the large tensors of the i-th gradient into this memory; the row is consumed."""
        for j, g in enumerate(row):
            if g is None or g.device.type != "cpu" or g.nbytes < _LARGE:
                continue
            held = self._tensors.get((i, j))
            if held is None or held.shape != g.shape or held.dtype != g.dtype:
                held = torch.empty_like(g)
                self._tensors[i, j] = held
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
        for j in [j for j, s in enumerate(self.shared) if not s]:
            for i, row in enumerate(self.rows):
                g = row[j]
                if g is not None:
                    norms[i] += torch.linalg.vector_norm(g, dtype=torch.float64)
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
    needed: str | None = _A_PARAMETER,
) -> Iterator[Found]:
    """Yields value and gradient of one loss after the other; see `per_loss_gradients`.

    `check_losses` is the caller's part. Behind the gradients of the parameters come those of
    `edges` of the losses' graph. `needed` says what a loss that reaches none of them was to depend
    on, and the remedy; None allows it.
    """
    inputs: Any = (*(p for p in parameters if p.requires_grad), *edges)
    tensors = [i for i, loss in enumerate(losses) if isinstance(loss, Tensor)]
    calls = [i for i, loss in enumerate(losses) if loss is not None and i not in tensors]
    walked: set[Any] = set()
    for i, (name, loss) in enumerate(zip(names, losses, strict=True)):
        if loss is None:
            yield None, [None] * (len(parameters) + len(edges))
            continue
        value = loss if isinstance(loss, Tensor) else evaluate(name, loss, parameters)
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
        reached = iter(found)
        row = [_dense(next(reached), p, name) if p.requires_grad else None for p in parameters]
        row.extend(reached)
        # What the caller frees of the row is to be free during the next backward pass.
        del found, reached
        yield value, row


def evaluate(name: str, loss: Callable[[], Tensor], parameters: Sequence[Tensor]) -> Tensor:
    """Calls a loss that is given as a callable, and checks what it returns."""
    try:
        with torch.enable_grad():
            value = loss()
    except Exception as error:
        add_note(error, f"It was raised by the callable of loss {name!r}.")
        raise
    check_loss(name, value, parameters)
    return value


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


def _dense(gradient: Tensor | None, parameter: Tensor, name: str) -> Tensor | None:
    if gradient is not None and gradient.layout != torch.strided:
        raise ValueError(
            f"gradients must be dense; loss {name!r} has a {gradient.layout} gradient for the "
            f"parameter of shape {list(parameter.shape)}. Build the embedding with sparse=False."
        )
    return gradient
