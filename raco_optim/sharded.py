r"""Gradients of parameters of which a process holds a part (`DTensor`: FSDP2, tensor parallelism).

What shards the model averages its gradients too, in its own hooks, which `torch.autograd.grad`
would pass by: each loss has a ``backward()`` here. A process then holds its shards of the m
gradients, multiplies them with each other, and combines them without any message:

.. math:: H_{ij} = \sum_s \langle g_{i,s}, g_{j,s} \rangle

where s runs over the shards, each of which counts once, however many processes hold it.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Placement, Replicate

from raco_optim.combine import stashed_gradients
from raco_optim.gradients import Found, Loss, check_loss, check_losses, failed_pass
from raco_optim.materialized import Gradients
from raco_optim.processes import Processes

Layout = tuple[DeviceMesh, tuple[Placement, ...]] | None


@dataclass
class ShardedGradients(Gradients):
    """This process's shards of the gradients; losses and products are those of all processes."""

    products: Tensor | None = None
    others: Tensor | None = None

    def gram(self, shared: Sequence[bool]) -> Tensor:  # known since the messages were exchanged
        """Returns the Gram matrix of the shared part, ``[m, m]``, float64."""
        assert self.products is not None
        return self.products

    def finite(self, shared: Sequence[bool]) -> Tensor:
        """Returns what is finite where the other part is, one number per loss, ``[m]``."""
        assert self.others is not None
        return self.others


def iterate_gradients(
    losses: Sequence[Loss | None], parameters: Sequence[Tensor], names: Sequence[str]
) -> Iterator[Found]:
    """Yields value and gradient of one loss after the other, each from a ``backward()``.

    Other tensors that the losses depend on gather the sum of the gradients in their ``.grad``.
    """
    check_losses(losses, parameters, names)
    last = max((i for i, loss in enumerate(losses) if isinstance(loss, Tensor)), default=-1)
    with stashed_gradients(parameters) as take:
        for i, (name, loss) in enumerate(zip(names, losses, strict=True)):
            if loss is None:
                yield None, [None] * len(parameters)
                continue
            if not isinstance(loss, Tensor):
                with torch.enable_grad():
                    loss = loss()
                check_loss(name, loss, parameters)
            try:
                torch.autograd.backward(loss, retain_graph=i < last)
            except RuntimeError as error:
                raise failed_pass(name, error) from error
            value = loss.detach().clone()
            row = take()
            if all(g is None for g in row):
                raise ValueError(
                    f"loss {name!r} must depend on a parameter of the optimizer; it reaches none. "
                    f"Build the optimizer after fully_shard or parallelize_module."
                )
            yield _whole(value), [_placed(g, p) for g, p in zip(row, parameters, strict=True)]
            del loss, row


def collect(
    names: tuple[str, ...],
    found: Iterable[Found],
    parameters: Sequence[Tensor],
    shared: Sequence[bool],
    processes: Processes,
) -> ShardedGradients:
    """Gathers the gradients, and sums over the processes what their shards add up to.

    Args:
        names: Names of the losses.
        found: Value and gradient of one loss after the other.
        parameters: The parameters.
        shared: Which of them enter the Gram matrix.
        processes: The processes over which the losses are averaged.

    Raises:
        ValueError: A parameter that is no `DTensor` has other gradients in other processes.
    """
    gathered = ShardedGradients(names, [], [])
    for value, row in found:
        gathered.values.append(value)
        gathered.rows.append(row)
    shards = Gradients(names, gathered.values, [[_local(g) for g in row] for row in gathered.rows])
    device, m = parameters[0].device, len(names)
    gram = torch.zeros(m, m, dtype=torch.float64, device=device)
    for layout, positions in _layouts(parameters, shared).items():
        chosen = set(positions)
        part = shards.gram([j in chosen for j in range(len(parameters))]).to(device)
        gram += _check_equal(part, processes) if layout is None else _sum(part, *layout)
    message = [shards.finite(shared), *processes.pack(gathered.values)]
    gathered.others, *losses = processes.sum(message, device)
    gathered.values, gathered.where = processes.unpack(losses)
    gathered.products = gram.cpu()
    return gathered


def _layouts(parameters: Sequence[Tensor], shared: Sequence[bool]) -> dict[Layout, list[int]]:
    """Returns the positions of the shared parameters of each layout."""
    found: dict[Layout, list[int]] = {}
    for j, (p, is_shared) in enumerate(zip(parameters, shared, strict=True)):
        if p.requires_grad and is_shared:
            layout = (p.device_mesh, tuple(p.placements)) if isinstance(p, DTensor) else None
            found.setdefault(layout, []).append(j)
    return found


def _sum(part: Tensor, mesh: DeviceMesh, placements: tuple[Placement, ...]) -> Tensor:
    """Sums over the dimensions of the mesh along which the parameters are cut."""
    summed = [Replicate() if p.is_replicate() else Partial("sum") for p in placements]
    return DTensor.from_local(part, mesh, summed, run_check=False).full_tensor()


def _check_equal(part: Tensor, processes: Processes) -> Tensor:
    """Returns the mean of what is equal in all processes but for rounding, or raises."""
    total = part / processes.number
    extremes = torch.stack([part.diagonal(), -part.diagonal()])
    with processes.contact():
        dist.all_reduce(total, group=processes.group)
        dist.all_reduce(extremes, dist.ReduceOp.MAX, group=processes.group)
    largest, least = extremes[0], -extremes[1]
    if bool((largest - least > 1e-3 * largest).any()):
        raise ValueError(
            "parameters that are no DTensor must have the same gradients in all processes; got "
            "others. Shard them too (fully_shard of the whole model), or average their gradients."
        )
    return total


def _placed(gradient: Tensor | None, parameter: Tensor) -> Tensor | None:
    """Returns the gradient cut as its parameter is."""
    if isinstance(gradient, DTensor) and isinstance(parameter, DTensor):
        return gradient.redistribute(placements=parameter.placements)
    return gradient


def _local(x: Tensor | None) -> Tensor | None:
    return x.to_local() if isinstance(x, DTensor) else x


def _whole(x: Tensor) -> Tensor:
    return x.full_tensor() if isinstance(x, DTensor) else x
