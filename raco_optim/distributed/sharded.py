r"""Gradients of parameters of which a process holds a part (`DTensor`: FSDP2, tensor parallelism).

The library that shards the model also averages its gradients, in its own hooks. These run in
``backward()`` and not in `torch.autograd.grad`, so here each loss has a ``backward()``. A process
then holds its shards of the m gradients, multiplies them with each other, and combines them
without any message:

.. math:: H_{ij} = \sum_s \langle g_{i,s}, g_{j,s} \rangle

where s runs over the shards, each of which counts once, however many processes hold it.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

from raco_optim._checks import add_note
from raco_optim.distributed.agreement import raise_together
from raco_optim.distributed.group import Group
from raco_optim.distributed.replicated import SummedGradients
from raco_optim.gradients.combine import stashed_gradients
from raco_optim.gradients.dense import DenseGradients, DenseMode, check_loss
from raco_optim.gradients.explain import evaluate, explain
from raco_optim.objectives import Batch, Found
from raco_optim.wrapper.parameters import Parameters

_BROKEN = (
    "A model under fully_shard does not recover from a backward pass that failed: start again from "
    "the last checkpoint."
)


class ShardedMode(DenseMode):
    """Computes the gradients by one ``backward()`` per loss."""

    def __init__(self, asked: str) -> None:
        super().__init__(gather)
        self.ran = "dense" if asked == "dense" else "dense: DTensor parameters"

    def rows(self, batch: Batch) -> Iterator[Found]:
        """Yields value and gradient of one loss after the other, each from a ``backward()``.

        If a callable fails in one process after its forward pass, all processes raise. Tensors
        that the optimizer does not hold get the sum of the gradients, as by ``backward()``.
        """
        parameters, losses = batch.parameters.tensors, batch.losses
        last = max((i for i, loss in enumerate(losses) if isinstance(loss, Tensor)), default=-1)
        with stashed_gradients(parameters) as take:
            for i, (name, loss) in enumerate(zip(batch.names, losses, strict=True)):
                if loss is None:
                    yield None, [None] * len(parameters)
                    continue
                retain = batch.retain_graph or (isinstance(loss, Tensor) and i < last)
                if not isinstance(loss, Tensor):
                    with raise_together(batch.group):
                        loss = evaluate(name, loss)
                        check_loss(name, loss, parameters)
                try:
                    torch.autograd.backward(loss, retain_graph=retain)
                except Exception as error:
                    explain(name, error)
                    add_note(error, _BROKEN)
                    raise
                value = loss.detach()
                value = (value.full_tensor() if isinstance(value, DTensor) else value).clone()
                row = take()
                if all(g is None for g in row):
                    raise ValueError(
                        f"loss {name!r} must depend on a parameter of the optimizer; none has a "
                        f"gradient of it. Build the optimizer after fully_shard or "
                        f"parallelize_module, and leave FSDP2's set_requires_gradient_sync at True."
                    )
                yield value, [_placed(g, p) for g, p in zip(row, parameters, strict=True)]
                del loss, row


def gather(batch: Batch, found: Iterable[Found]) -> SummedGradients:
    """Collects the shards, and sums their products and the losses over the processes."""
    parameters, group = batch.parameters, batch.group or Group()
    layouts = _layouts(parameters, group)
    values, rows = map(list, zip(*found, strict=True))
    local = [[g.to_local() if isinstance(g, DTensor) else g for g in row] for row in rows]
    device, m = parameters.tensors[0].device, len(batch.names)

    def shards(chosen: Sequence[bool]) -> DenseGradients:
        return DenseGradients(values, local, chosen)

    gram = torch.zeros(m, m, dtype=torch.float64, device=device)
    norms: dict[_Layout, Tensor] = {}
    for layout, positions in layouts.items():
        both = [j in positions and s for j, s in enumerate(parameters.shared)]
        gram += shards(both).gram().to(device) * (layout.parts / group.world_size)
        if len(layout.ranks) < group.world_size:
            elsewhere = [j not in positions for j in range(len(parameters.tensors))]
            norms[layout] = shards(elsewhere).head_norms().to(device)
    if norms:
        _check_equal(norms, batch.names, group)
    message = [gram, shards(parameters.shared).head_norms(), *group.pack_losses(values)]
    gram, head_norms, *losses = group.sum(message, device)
    means, nonfinite_ranks = group.unpack_losses(losses)
    shared = parameters.shared
    return SummedGradients(means, rows, shared, nonfinite_ranks, products=gram, norms=head_norms)


class _Layout(NamedTuple):
    """Into how many parts parameters are cut, and the processes that hold all of them together."""

    parts: int
    ranks: tuple[int, ...]


def _layouts(parameters: Parameters, group: Group) -> dict[_Layout, set[int]]:
    """Returns the positions of the parameters of each layout."""
    members, own = group.ranks, group.rank
    found: dict[_Layout, set[int]] = {}
    for j, p in enumerate(parameters.tensors):
        if not p.requires_grad:
            continue
        layout = _Layout(1, (own,))
        if isinstance(p, DTensor):
            mesh, sizes = p.device_mesh.mesh, p.device_mesh.mesh.shape
            cut = [n for n, q in zip(sizes, p.placements, strict=True) if not q.is_replicate()]
            holders = mesh.reshape(-1).tolist()
            if not set(holders) <= set(members):
                raise ValueError(
                    f"`process_group` must hold all processes of the mesh of a DTensor parameter, "
                    f"{holders}; got the processes {members}."
                )
            layout = _Layout(math.prod(cut), tuple(members.index(rank) for rank in holders))
        found.setdefault(layout, set()).add(j)
    return found


def _check_equal(norms: dict[_Layout, Tensor], names: Sequence[str], group: Group) -> None:
    """Raises if processes that hold the same parts have gradients of different norms."""
    rows = torch.stack(
        [norm.new_zeros(group.world_size, len(names) + 1) for norm in norms.values()]
    )
    for row, (layout, norm) in zip(rows, norms.items(), strict=True):
        # All processes of a layout add to the row of its first one.
        share = torch.cat([norm * layout.parts, norm.new_ones(1)])
        row[min(layout.ranks)] = share / len(layout.ranks)
    with group.contact():
        dist.all_reduce(rows, group=group.group)
    for row in rows.cpu():
        used = row[row[:, -1] > 0, :-1]
        for name, least, largest in zip(names, used.amin(0), used.amax(0), strict=True):
            if bool(largest - least > 1e-3 * largest):
                raise ValueError(
                    f"gradients must be the same in all processes that hold the same part of a "
                    f"parameter; those of loss {name!r} have norms from {least:.3g} to "
                    f"{largest:.3g}. Apply fully_shard to the whole model, with a mesh of all "
                    f"processes that get other data (and SequenceParallel to a norm whose "
                    f"activations are cut)."
                )


def _placed(gradient: Tensor | None, parameter: Tensor) -> Tensor | None:
    """Returns the gradient cut as its parameter is."""
    if isinstance(gradient, DTensor) and isinstance(parameter, DTensor):
        return gradient.redistribute(placements=parameter.placements)
    return gradient
