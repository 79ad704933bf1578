r"""Mode "materialized", the default: the gradients of all losses are there at once.

.. math:: H_{ij} = \langle g_i, g_j \rangle, \qquad G = \sum_i \alpha_i g_i
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from raco_optim.combine import Coefficients, add_combined_gradient
from raco_optim.gradients import Found, Gradient
from raco_optim.gram import gram_matrix

# Bytes from which on fresh memory costs more, in page faults, than a copy into memory at hand.
_LARGE = 2**20


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
class Gradients:
    """Per-loss values and gradients, summed over the micro-batches of one step."""

    names: tuple[str, ...]
    values: list[Tensor | None]
    rows: list[Gradient]
    named: bool = False
    """Whether the user named the losses, or their positions do."""
    where: str = ""
    """Which processes have a loss that is NaN or Inf, in words: " on rank 1"; "" for none."""

    @property
    def _device(self) -> torch.device | str:
        return next((g.device for row in self.rows for g in row if g is not None), "cpu")

    def gram(self, shared: Sequence[bool]) -> Tensor:
        """Computes the Gram matrix of the shared part, ``[m, m]``, float64."""
        rows = [[g for g, s in zip(row, shared, strict=True) if s] for row in self.rows]
        return gram_matrix(rows).to(self._device)

    def finite(self, shared: Sequence[bool]) -> Tensor:
        """Computes what is finite where the other part is, one number per loss, ``[m]``."""
        zero = torch.zeros((), dtype=torch.float64, device=self._device)
        return torch.stack(
            [
                sum(
                    (
                        torch.linalg.vector_norm(g, dtype=torch.float64)
                        for g, s in zip(row, shared, strict=True)
                        if g is not None and not s
                    ),
                    start=zero,
                )
                for row in self.rows
            ]
        )

    def add_to_grad(
        self, parameters: Sequence[Tensor], coefficients: Coefficients, *, check: bool
    ) -> bool:
        """Adds the combined gradient to ``.grad``.

        The gradients are consumed. A finite Gram matrix says that it is finite.
        """
        for chosen, of_part in coefficients.parts():
            rows: list[Gradient] = []
            for row in self.rows:
                rows.append([row[j] for j in chosen])
                for j in chosen:
                    row[j] = None
            add_combined_gradient([parameters[j] for j in chosen], rows, of_part)
        return True


def collect(
    names: tuple[str, ...],
    found: Iterable[Found],
    *,
    keep: bool = False,
    memory: Memory | None = None,
) -> Gradients:
    """Gathers value and gradient of one loss after the other.

    With `keep`, the result outlives this call, and what autograd returned is copied: it may be a
    tensor that user code holds too. With `memory` it lives until the next call at most.
    """
    gathered = Gradients(names, [], [])
    for i, (value, row) in enumerate(found):
        if keep:
            row = [None if g is None else g.clone() for g in row]
        elif memory is not None and i < len(names) - 1:
            row = memory.hold(i, row)
        gathered.values.append(value)
        gathered.rows.append(row)
    return gathered


def add_pending(found: Iterable[Found], pending: Gradients | None) -> Iterator[Found]:
    """Adds the pending values and gradients, which stay as they are, to those found."""
    if pending is None:
        yield from found
        return
    for (value, row), before, earlier in zip(found, pending.values, pending.rows, strict=True):
        for j, g in enumerate(earlier):  # one at a time, so that each is freed at once
            row[j] = _sum(g, row[j])
        yield _sum(before, value), row


def _sum(earlier: Tensor | None, later: Tensor | None) -> Tensor | None:
    if earlier is None or later is None:
        return later if earlier is None else earlier
    return earlier + later
