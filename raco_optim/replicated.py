r"""Gradients of parameters that every process holds as a whole (DistributedDataParallel).

The gradients are means over the processes; the Gram matrix is that of the means, not a mean of the
processes' Gram matrices:

.. math::
    g_i = \frac{1}{R} \sum_{r=1}^{R} g_i^{(r)}, \qquad
    H_{ij} = \sum_{s=1}^{R} \langle g_{i,s}, g_{j,s} \rangle

where :math:`g_{i,s}` is the s-th of R parts of :math:`g_i`. Process s averages the s-th parts
(reduce-scatter, while the next backward pass runs), multiplies and combines them; H is summed over
the processes, and the combined parts are handed round (all-gather). A process sends
:math:`(m + 1) n (R - 1) / R` numbers, where averaging each gradient as a whole would send
:math:`2 m n (R - 1) / R`, and keeps :math:`m n / R`.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import torch
import torch.distributed as dist
from torch import Tensor

from raco_optim._checks import check_any_present
from raco_optim.combine import LOW_PRECISION, add_gradient, as_scales, combination
from raco_optim.gradients import Found, Gradient
from raco_optim.materialized import Gradients
from raco_optim.processes import Processes

# Bytes that travel together: enough for the bandwidth, little enough to begin early.
_BUCKET = 25 * 2**20


@dataclass
class Bucket:
    """Parameters of one dtype, all shared or none, whose gradients travel together."""

    shared: bool
    dtype: torch.dtype
    device: torch.device
    positions: list[int] = field(default_factory=list)
    sizes: list[int] = field(default_factory=list)

    def pieces(self, whole: Tensor) -> Sequence[Tensor]:
        """Cuts what travels into one piece per parameter, and one of padding."""
        return torch.split(whole, [*self.sizes, len(whole) - sum(self.sizes)])


@dataclass
class ReplicatedGradients:
    """This process's parts of the mean gradients, one tensor per loss and bucket.

    Attributes:
        names: Names of the losses.
        values: Means of the losses over the processes, an absent one counting as zero; None for
            one that is absent from all.
        where: Which processes have a loss that is NaN or Inf, in words; "" for none.
    """

    names: tuple[str, ...]
    values: list[Tensor | None]
    where: str
    _rows: list[Gradient]
    _gram: Tensor
    _finite: Tensor
    _reached: list[bool]
    _buckets: list[Bucket]
    _processes: Processes

    def gram(self, shared: Sequence[bool]) -> Tensor:  # known since the gradients were averaged
        """Returns the Gram matrix of the shared part, ``[m, m]``, float64."""
        return self._gram

    def finite(self, shared: Sequence[bool]) -> Tensor:
        """Returns what is finite where the other part is, one number per loss, ``[m]``."""
        return self._finite

    def add_to_grad(
        self,
        parameters: Sequence[Tensor],
        alpha: Tensor,
        weights: Tensor,
        shared: Sequence[bool],
        *,
        check: bool = True,  # a finite Gram matrix says that it is finite
    ) -> bool:
        """Adds the combined gradient to ``.grad``, with `weights` in the other part.

        The gradients are consumed.
        """
        combined = self.combine(parameters, alpha, weights)
        for parameter, gradient in zip(parameters, combined, strict=True):
            if gradient is not None:
                add_gradient(parameter, gradient)
        return True

    @torch.no_grad()
    def combine(self, parameters: Sequence[Tensor], alpha: Tensor, weights: Tensor) -> Gradient:
        """Returns the combined gradient, None where no loss of any process reaches."""
        scales = {True: as_scales(alpha), False: as_scales(weights)}
        wholes = []
        for b, bucket in enumerate(self._buckets):
            column = [part for row in self._rows if (part := row[b]) is not None]
            part = combination(column, scales[bucket.shared]).to(bucket.dtype)
            for row in self._rows:
                row[b] = None
            whole = part.new_empty(len(part) * self._processes.number)
            with self._processes.contact():
                dist.all_gather_into_tensor(whole, part, group=self._processes.group)
            wholes.append(whole)
        gradient: Gradient = [None] * len(parameters)
        for bucket, whole in zip(self._buckets, wholes, strict=True):
            pieces = bucket.pieces(whole)
            for j, piece in zip(bucket.positions, pieces, strict=False):
                if self._reached[j]:
                    gradient[j] = piece.view(parameters[j].shape)
        return gradient


def collect(
    names: tuple[str, ...],
    found: Iterable[Found],
    parameters: Sequence[Tensor],
    shared: Sequence[bool],
    processes: Processes,
) -> ReplicatedGradients:
    """Averages the gradients of every loss over the processes, each as soon as it is found.

    Args:
        names: Names of the losses.
        found: Value and gradient of one loss after the other in this process; the value of an
            absent one is None. What it raises is raised in all processes. The gradients are
            consumed.
        parameters: The parameters, the same in all processes.
        shared: Which of them enter the Gram matrix.
        processes: The processes, more than one.
    """
    buckets = _buckets(parameters, shared)
    source = iter(found)
    failure: Exception | None = None
    values: list[Tensor | None] = []
    reached = [False] * len(parameters)
    rows: list[Gradient] = []
    transfers: list[_Transfer] = []
    for _ in names:
        value: Tensor | None = None
        row: Gradient = [None] * len(parameters)
        if failure is None:
            try:
                value, row = next(source)
            except Exception as error:  # the others wait for these gradients
                failure = error
        values.append(value)
        reached = [r or g is not None for r, g in zip(reached, row, strict=True)]
        if transfers:
            rows.append([transfer.mean(processes) for transfer in transfers])
        transfers = [_Transfer(row, bucket, processes) for bucket in buckets]
    rows.append([transfer.mean(processes) for transfer in transfers])
    return _summarize(names, values, rows, reached, buckets, processes, failure)


def _summarize(
    names: tuple[str, ...],
    values: list[Tensor | None],
    rows: list[Gradient],
    reached: list[bool],
    buckets: list[Bucket],
    processes: Processes,
    failure: Exception | None,
) -> ReplicatedGradients:
    """Sums over the processes, in one message, what their parts add up to."""
    parts, shared = Gradients(names, values, rows), [bucket.shared for bucket in buckets]
    message = [
        parts.gram(shared),
        parts.finite(shared),
        torch.tensor(reached, device="cpu"),
        processes.here(failure is not None),
        *processes.pack(values),
    ]
    sums = processes.sum(message, buckets[0].device)
    gram, finite, anywhere, failed, *losses = sums
    if failed.any():
        processes.raise_everywhere(failure)
    means, where = processes.unpack(losses)
    check_any_present(means)
    return ReplicatedGradients(
        names,
        means,
        where,
        rows,
        gram.reshape(len(names), -1),
        finite,
        [count > 0 for count in anywhere.tolist()],
        buckets,
        processes,
    )


class _Transfer:
    """A gradient's part of one bucket on its way: each process gets every process's share of it."""

    def __init__(self, row: Gradient, bucket: Bucket, processes: Processes) -> None:
        number = processes.number
        share = -(-sum(bucket.sizes) // number)
        self._dtype = torch.float32 if bucket.dtype in LOW_PRECISION else bucket.dtype
        self._sent = torch.zeros(share * number, dtype=bucket.dtype, device=bucket.device)
        pieces = bucket.pieces(self._sent)
        for j, piece in zip(bucket.positions, pieces, strict=False):
            g, row[j] = row[j], None
            if g is not None:
                piece.copy_(g.reshape(-1))
        self._received = torch.empty_like(self._sent)
        with processes.contact():
            # Not a reduce-scatter: gloo's sends twice as much, and the sum in float32 of what is
            # of lower precision is then the same everywhere.
            self._work = dist.all_to_all_single(
                self._received, self._sent, group=processes.group, async_op=True
            )

    def mean(self, processes: Processes) -> Tensor:
        """Waits, and returns the mean of this process's part."""
        with processes.contact():
            self._work.wait()
        return self._received.view(processes.number, -1).mean(0, dtype=self._dtype)


def _buckets(parameters: Sequence[Tensor], shared: Sequence[bool]) -> list[Bucket]:
    full: list[Bucket] = []
    filling: dict[tuple[bool, torch.dtype], Bucket] = {}
    for j, (p, is_shared) in enumerate(zip(parameters, shared, strict=True)):
        if not p.requires_grad:
            continue
        key = is_shared, p.dtype
        bucket = filling.setdefault(key, Bucket(is_shared, p.dtype, p.device))
        bucket.positions.append(j)
        bucket.sizes.append(p.numel())
        if sum(bucket.sizes) * p.element_size() >= _BUCKET:
            full.append(filling.pop(key))
    return [*full, *filling.values()]
