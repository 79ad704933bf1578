r"""Gradients of parameters that every process holds completely (DistributedDataParallel).

The Gram matrix is computed from the mean gradients; it is not a mean of Gram matrices:

.. math::
    g_i = \frac{1}{R} \sum_{r=1}^{R} g_i^{(r)}, \qquad
    H_{ij} = \sum_{s=1}^{R} \langle g_{i,s}, g_{j,s} \rangle

where :math:`g_{i,s}` is the s-th of R parts of :math:`g_i`; process s averages, multiplies and
combines it. docs/distributed.md counts the numbers that are sent.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

import torch
import torch.distributed as dist
from torch import Tensor

from raco_optim.distributed.agreement import error_everywhere
from raco_optim.distributed.group import Group
from raco_optim.gradients.combine import LOW_PRECISION, as_scales, combination, grad_dtype
from raco_optim.gradients.dense import DenseGradients
from raco_optim.objectives import Batch, Found, Gradient
from raco_optim.wrapper.parameters import Parameters

# Bytes per message: enough to use the bandwidth, few enough to start early.
_BUCKET = 25 * 2**20


@dataclass
class SummedGradients(DenseGradients):
    """This process's parts of the gradients, with losses and products of all processes."""

    products: Tensor = field(kw_only=True)
    norms: Tensor = field(kw_only=True)

    def __post_init__(self) -> None:
        gram = self.products.reshape(len(self.values), -1)
        self.products = (gram + gram.T) / 2  # an all-reduce may add each entry in another order

    def gram(self) -> Tensor:
        """See `PerLossGradients`."""
        return self.products

    def head_norms(self) -> Tensor:
        """See `PerLossGradients`."""
        return self.norms


@dataclass
class Bucket:
    """Parameters whose gradients are sent together: one dtype, all shared or all heads."""

    shared: bool
    dtype: torch.dtype
    device: torch.device
    parameters: dict[int, Tensor] = field(default_factory=dict)
    """By their position."""
    length: int = 0

    def pieces(self, whole: Tensor) -> Iterator[tuple[int, Tensor]]:
        """Yields each parameter's position and a view of its part, with its strides."""
        start = 0
        for j, p in self.parameters.items():
            dense = p if p.is_contiguous() else torch.empty_like(p, device="meta")
            yield j, whole.as_strided(p.shape, dense.stride(), start)
            start += p.numel()


@dataclass
class ReplicatedGradients(SummedGradients):
    """This process's parts of the mean gradients: a tensor per loss and bucket in ``rows``."""

    buckets: list[Bucket] = field(kw_only=True)
    reached: list[bool] = field(kw_only=True)  # whether a loss of any process reaches a parameter
    group: Group = field(kw_only=True)

    @torch.no_grad()
    def combine(self, alpha: Tensor, weights: Tensor) -> Gradient:
        """Returns the combined gradient; None if no loss of any process reaches a parameter."""
        scales = {True: as_scales(alpha), False: as_scales(weights)}
        wholes = []
        for b, bucket in enumerate(self.buckets):
            column = [part for row in self.rows if (part := row[b]) is not None]
            part = combination(column, scales[bucket.shared]).to(bucket.dtype)
            for row in self.rows:
                row[b] = None
            whole = part.new_empty(self.group.world_size, len(part))
            with self.group.contact():
                dist.all_gather(list(whole), part, group=self.group.group)
            wholes.append(whole)
        gradient: Gradient = [None] * len(self.reached)
        for bucket, whole in zip(self.buckets, wholes, strict=True):
            for j, piece in bucket.pieces(whole):
                if self.reached[j]:
                    gradient[j] = piece
        return gradient


def gather(batch: Batch, found: Iterable[Found]) -> ReplicatedGradients:
    """Averages each loss's gradients as they are computed, and consumes them; all raise."""
    parameters, group = batch.parameters, batch.group
    assert group is not None
    tensors, device = parameters.tensors, parameters.tensors[0].device
    group.check_device(device)
    buckets = _buckets(parameters)
    source = iter(found)
    failure: Exception | None = None
    parts = DenseGradients([], [], [bucket.shared for bucket in buckets])
    reached = [False] * len(tensors)
    transfers: list[_Transfer] = []
    for _ in batch.names:
        value: Tensor | None = None
        row: Gradient = [None] * len(tensors)
        if failure is None:
            try:
                value, row = next(source)
            except Exception as error:  # the other processes wait for these gradients
                failure = error
        parts.values.append(value)
        reached = [r or g is not None for r, g in zip(reached, row, strict=True)]
        if transfers:
            parts.rows.append([transfer.mean() for transfer in transfers])
        transfers = [_Transfer(row, bucket, group) for bucket in buckets]
    parts.rows.append([transfer.mean() for transfer in transfers])
    flags = torch.tensor([failure is not None, *reached], device="cpu")
    message = [parts.gram(), parts.head_norms(), flags, *group.pack_losses(parts.values)]
    gram, norms, (failed, *anywhere), *losses = group.sum(message, device)
    if failed:
        try:
            raise error_everywhere(group, failure)
        finally:
            del failure  # breaks a reference cycle with its traceback, which keeps the graph
    values, nonfinite_ranks = group.unpack_losses(losses)
    return ReplicatedGradients(
        values,
        parts.rows,
        parts.shared,
        nonfinite_ranks,
        products=gram,
        norms=norms,
        buckets=buckets,
        reached=[bool(count) for count in anywhere],
        group=group,
    )


class _Transfer:
    """Sends a gradient's part of one bucket: each process receives its share from all."""

    def __init__(self, row: Gradient, bucket: Bucket, group: Group) -> None:
        number = group.world_size
        share = -(-bucket.length // number)
        self._group = group
        self._dtype = torch.float32 if bucket.dtype in LOW_PRECISION else bucket.dtype
        self._sent = torch.empty(number, share, dtype=bucket.dtype, device=bucket.device)
        self._sent.view(-1)[bucket.length :] = 0
        for j, piece in bucket.pieces(self._sent):
            g, row[j] = row[j], None
            if g is None:
                piece.zero_()
            else:
                piece.copy_(g)
        self._received = torch.empty_like(self._sent)
        with group.contact():
            # Not a reduce-scatter, which sends twice as much with gloo. Low-precision numbers are
            # then summed in float32, in the same order everywhere.
            self._work = dist.all_to_all_single(
                self._received, self._sent, group=group.group, async_op=True
            )

    def mean(self) -> Tensor:
        """Waits, frees the buffers, and returns the mean of this process's part."""
        with self._group.contact():
            self._work.wait()
        mean = self._received.mean(0, dtype=self._dtype)
        del self._received, self._sent, self._work
        return mean


def _buckets(parameters: Parameters) -> list[Bucket]:
    full: list[Bucket] = []
    filling: dict[tuple[bool, torch.dtype], Bucket] = {}
    for j, (p, is_shared) in enumerate(zip(parameters.tensors, parameters.shared, strict=True)):
        if not p.requires_grad:
            continue
        key = is_shared, grad_dtype(p)
        bucket = filling.setdefault(key, Bucket(*key, p.device))
        bucket.parameters[j] = p
        bucket.length += p.numel()
        if bucket.length * bucket.dtype.itemsize >= _BUCKET:
            full.append(filling.pop(key))
    return [*full, *filling.values()]
