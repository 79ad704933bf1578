"""Sums the gradients of micro-batches, separately for each loss."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from torch import Tensor

from raco_optim.objectives import Batch, Found, Pending


def accumulate(found: Iterable[Found], batch: Batch, *, named: bool) -> Pending:
    """Adds the gradients of a micro-batch to the pending ones."""
    pending = Pending(batch.names, named, batch.parameters, [], [])
    for value, row in add_pending(found, batch.pending):
        pending.values.append(value)
        # Copied, because autograd may return a tensor that user code holds too.
        pending.rows.append([None if g is None else g.clone() for g in row])
    return pending


def add_pending(
    found: Iterable[Found], pending: Pending | None, *, in_place: bool = False
) -> Iterator[Found]:
    """Adds pending gradients to new ones, which `in_place` overwrites."""
    if pending is None:
        yield from found
        return
    for (value, row), before, earlier in zip(found, pending.values, pending.rows, strict=True):
        for j, g in enumerate(earlier):  # one at a time, to free each at once
            row[j] = _sum(g, row[j], in_place)
        yield _sum(before, value), row


def _sum(earlier: Tensor | None, later: Tensor | None, in_place: bool = False) -> Tensor | None:
    if earlier is None or later is None:
        return later if earlier is None else earlier
    return later.add_(earlier) if in_place else earlier + later
