r"""Gradients of parameters of which a process holds a part (`DTensor`: FSDP2, tensor parallelism).

What shards the model averages its gradients too, in its own hooks, which `torch.autograd.grad`
would pass by: each loss has a ``backward()`` here. A process then holds its shards of the m
gradients, multiplies them with each other, and combines them without any message:

.. math:: H_{ij} = \sum_s \langle g_{i,s}, g_{j,s} \rangle

where s runs over the shards, each of which counts once, however many processes hold it.

The losses may share one forward pass: under `fully_shard` (on a mesh of one dimension, HSDP, with
tensor parallelism, with mixed precision, resharded after the forward pass or not), tensor and
sequence parallelism, ``loss_parallel`` (`backward` inside of it, as ever), and activation
checkpoints. Each needs a forward pass of its own, as a callable, where a checkpoint can be computed
again only once (``torch.distributed._composable.checkpoint``, selective checkpoints), and in a
compiled model that donates its buffers.

FSDP2 gathers the parameters for every backward pass and sends each gradient once:
(m + 1) n (R - 1) / R numbers to gather, m n (R - 1) / R to reduce. ``reshard_after_forward=False``
saves one gathering in both cases; ``model.set_reshard_after_backward(False)`` saves m - 1 of them
and holds the whole model meanwhile, but then every FSDP module must be told to ``reshard()`` before
the next forward pass, which would else see the parameters of before the step.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

from raco_optim import materialized
from raco_optim.combine import stashed_gradients
from raco_optim.gradients import Found, Loss, check_loss, failed_pass
from raco_optim.materialized import Gradients
from raco_optim.processes import Processes

_BROKEN = (
    "A model under fully_shard does not recover from a backward pass that failed: start again from "
    "the last checkpoint."
)


@dataclass
class ShardedGradients(Gradients):
    """This process's shards of the gradients; losses and products are those of all processes."""

    products: Tensor = field(kw_only=True)
    others: Tensor = field(kw_only=True)

    def gram(self, shared: Sequence[bool]) -> Tensor:  # known since the messages were exchanged
        """Returns the Gram matrix of the shared part, ``[m, m]``, float64."""
        return self.products

    def finite(self, shared: Sequence[bool]) -> Tensor:
        """Returns what is finite where the other part is, one number per loss, ``[m]``."""
        return self.others


def iterate_gradients(
    losses: Sequence[Loss | None],
    parameters: Sequence[Tensor],
    names: Sequence[str],
    processes: Processes,
) -> Iterator[Found]:
    """Yields value and gradient of one loss after the other, each from a ``backward()``.

    A callable that fails in one of the processes fails in all, if its forward pass is complete.
    Other tensors that the losses depend on gather the sum of the gradients in their ``.grad``.
    `check_losses` is the caller's part.
    """
    last = max((i for i, loss in enumerate(losses) if isinstance(loss, Tensor)), default=-1)
    with stashed_gradients(parameters) as take:
        for i, (name, loss) in enumerate(zip(names, losses, strict=True)):
            if loss is None:
                yield None, [None] * len(parameters)
                continue
            retain = isinstance(loss, Tensor) and i < last
            if not isinstance(loss, Tensor):
                with processes.agreeing(), torch.enable_grad():
                    loss = loss()
                    check_loss(name, loss, parameters)
            try:
                torch.autograd.backward(loss, retain_graph=retain)
            except Exception as error:
                raise RuntimeError(f"{failed_pass(name, error)} {_BROKEN}") from error
            value = _whole(loss.detach()).clone()
            row = take()
            if all(g is None for g in row):
                raise ValueError(
                    f"loss {name!r} must depend on a parameter of the optimizer; none has a "
                    f"gradient of it. Build the optimizer after fully_shard or parallelize_module, "
                    f"and leave FSDP2's set_requires_gradient_sync at True."
                )
            yield value, [_placed(g, p) for g, p in zip(row, parameters, strict=True)]
            del loss, row


def collect(
    names: tuple[str, ...],
    found: Iterable[Found],
    parameters: Sequence[Tensor],
    shared: Sequence[bool],
    processes: Processes,
) -> ShardedGradients:
    """Gathers the gradients, and sums over the processes, in one message, what they add up to.

    Args:
        names: Names of the losses.
        found: Value and gradient of one loss after the other.
        parameters: The parameters.
        shared: Which of them enter the Gram matrix.
        processes: The processes over which the losses are averaged.

    Raises:
        ValueError: Processes that hold the same part of a parameter have other gradients of it, or
            `processes` lacks some that hold a part.
    """
    layouts = _layouts(parameters, processes)
    gathered = materialized.collect(names, found)
    shards = Gradients(names, gathered.values, [[_local(g) for g in row] for row in gathered.rows])
    device, m, number = parameters[0].device, len(names), processes.number
    gram = torch.zeros(m, m, dtype=torch.float64, device=device)
    norms: dict[_Layout, Tensor] = {}
    for layout, positions in layouts.items():
        here = [j in positions for j in range(len(parameters))]
        part = shards.gram([h and s for h, s in zip(here, shared, strict=True)]).to(device)
        gram += part * (layout.parts / number)
        if len(layout.ranks) < number:
            norms[layout] = shards.finite([not h for h in here]).to(device)
    if norms:
        _check_equal(norms, names, processes)
    message = [gram, shards.finite(shared), *processes.pack(gathered.values)]
    gram, others, *losses = processes.sum(message, device)
    values, where = processes.unpack(losses)
    return ShardedGradients(
        names, values, gathered.rows, where=where, products=gram.reshape(m, m), others=others
    )


@dataclass(frozen=True)
class _Layout:
    """How a parameter is cut into parts, and the processes that hold all of them together."""

    parts: int
    ranks: tuple[int, ...]


def _layouts(parameters: Sequence[Tensor], processes: Processes) -> dict[_Layout, set[int]]:
    """Returns the positions of the parameters of each layout."""
    members, own = processes.ranks, dist.get_rank(processes.group)
    found: dict[_Layout, set[int]] = {}
    for j, p in enumerate(parameters):
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


def _check_equal(norms: dict[_Layout, Tensor], names: Sequence[str], processes: Processes) -> None:
    """Raises where processes that hold the same parts have gradients of other norms."""
    rows = torch.stack(
        [norm.new_zeros(processes.number, len(names) + 1) for norm in norms.values()]
    )
    for row, (layout, norm) in zip(rows, norms.items(), strict=True):
        # What all of a layout's processes put into the row of the first of them adds up there.
        share = torch.cat([norm * layout.parts, norm.new_ones(1)])
        row[min(layout.ranks)] = share / len(layout.ranks)
    with processes.contact():
        dist.all_reduce(rows, group=processes.group)
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


def _local(x: Tensor | None) -> Tensor | None:
    return x.to_local() if isinstance(x, DTensor) else x


def _whole(x: Tensor) -> Tensor:
    return x.full_tensor() if isinstance(x, DTensor) else x
