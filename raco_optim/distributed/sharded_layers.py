r"""One backward pass for all losses of a model under FSDP2, which is gathered once for it.

Each process forms its part of a layer's m gradients when the pass meets the layer. They are summed
over the processes by one reduce-scatter per parameter, and each process keeps its shards:

.. math:: g_{i,s} = \frac{1}{R} \sum_{r=1}^{R} \sum_n u_{in}^{(r)} D_{n,s}^{(r)}
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any
from zlib import crc32

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard

from raco_optim.distributed.group import Group
from raco_optim.distributed.sharded import ShardedMode
from raco_optim.gradients.combine import grad_dtype, stashed_gradients
from raco_optim.gradients.per_example import LayerGradients, PerExampleMode, Sensitivities
from raco_optim.gradients.per_example.layers import Part
from raco_optim.gradients.per_example.one_pass import Plan, Totals, count
from raco_optim.gradients.per_example.watch import ANCHOR

_NOT_FSDP = "not all parameters are sharded by FSDP2 over all processes"
_OTHERS = "the losses depend on tensors that the optimizer does not hold"
_DIFFER = "the processes do not run the same layers"


class ShardedPerExampleMode(PerExampleMode, ShardedMode):
    """Runs one backward pass for all losses where that is exact, else one for each."""

    def __init__(self, model: nn.Module, parameters: Sequence[Tensor], group: Group) -> None:
        ShardedMode.__init__(self, self.name)
        self._layers = ShardedLayerGradients(model, parameters, group)


class ShardedLayerGradients(LayerGradients):
    """As `LayerGradients`; the gradients are means over the processes, which decide together."""

    def __init__(self, model: nn.Module, parameters: Sequence[Tensor], group: Group) -> None:
        self._group, self._parameters = group, list(parameters)
        self._model = model
        whole = [p for p in self._leaves() if p is not None]  # what is gathered already
        super().__init__(model, [*parameters, *whole])
        self._parameters, self._names = list(parameters), self._names[: len(parameters)]

    def _leaves(self) -> list[Tensor | None]:
        found = {
            id(p.sharded_param): getattr(p, "_unsharded_param", None)
            for state in _states(self._model)
            for group in state._fsdp_param_groups
            for p in group.fsdp_params
        }
        return [found.get(id(p)) for p in self._parameters]

    def _plan(self, scalars: Tensor, name: str) -> Plan:
        with _ungathered(self._model):  # the passes from the scalars to the head need no weights
            return super()._plan(scalars, name)

    def _agreed(self, plan: Plan, losses: Sequence[Tensor | None]) -> tuple[list[bool], str]:
        present, why = super()._agreed(plan, losses)
        if not why:
            why = self._described(plan) if plan.others else self._layout()
        if not why and plan.uses.of.keys() - plan.places.keys() - {id(ANCHOR)}:
            why = _OTHERS
        key = self._key(plan)
        facts = why, [plan.places[id(p)] for p in plan.covered], len(plan.marks), self._turn
        facts += key in self._known, self._known.get(key), len(self._known)
        digest = crc32(repr(facts).encode())
        largest, least, *votes = self._group.maximum([digest, -digest, *present])
        return [vote > 0 for vote in votes], why if largest == -least else why or _DIFFER

    def _layout(self) -> str:
        """Says what can't be reduced here; "" if everything can."""
        for p in self._parameters:
            if not p.requires_grad:
                continue
            is_cut = isinstance(p, DTensor) and p.device_mesh.size() == self._group.world_size
            if not is_cut or not all(type(q) in (Shard, Replicate) for q in p.placements):
                return _NOT_FSDP
        return ""

    def _totals(self, u: Tensor, plan: Plan, *, compared: bool = False) -> Totals:
        return _Shards(u, plan, self._parameters, self._group, compared=compared)

    def _gradient(self, total: Tensor, parameter: Any) -> Tensor:  # noqa: ANN401  # a DTensor
        return DTensor.from_local(
            total,
            parameter.device_mesh,
            parameter.placements,
            run_check=False,
            shape=parameter.shape,
            stride=parameter.stride(),
        )

    def _autograds(self, plan: Plan, v: Tensor) -> Sequence[Tensor | None]:
        """By FSDP2's own reduction, which holds no layer but one as a whole."""
        with stashed_gradients(self._parameters) as take:
            torch.autograd.backward(plan.scalars, v, retain_graph=True)
            found = take()
        return [found[plan.places[id(p)]] for p in plan.covered]

    def _anywhere(self, *, failed: bool) -> bool:
        return self._group.maximum([failed]) == [1]


class _Shards(Totals):
    """This process's shards of the means, each reduced when the last layer has added to it."""

    def __init__(
        self, u: Tensor, plan: Plan, parameters: Sequence[Tensor], group: Group, *, compared: bool
    ) -> None:
        super().__init__(Sensitivities(u / group.world_size), plan.covered, compared=compared)
        self._group, self._left = group, count(plan.marks)
        self._cut: dict[int, Any] = {key: parameters[j] for key, j in plan.places.items()}

    def dtype(self, p: Tensor) -> torch.dtype:
        return grad_dtype(self._cut[id(p)])

    def add(self, p: Tensor, part: Part) -> None:
        super().add(p, part)
        self._left[id(p)] -= 1
        if not self._left[id(p)]:
            cut = self._cut[id(p)]
            mesh, whole = cut.device_mesh, self.of.pop(id(p))
            placements = [Shard(q.dim + 1) if isinstance(q, Shard) else q for q in cut.placements]
            with self._group.contact():
                parts = DTensor.from_local(whole, mesh, [Partial()] * mesh.ndim, run_check=False)
                self.of[id(p)] = parts.redistribute(placements=placements).to_local().to(cut.device)

    def compare(self, true: Sequence[Any]) -> tuple[Tensor, Tensor, Tensor]:
        shards = [g if g is None else g.to_local() for g in true]
        errors, norms, rounding = (x.double() for x in super().compare(shards))
        sums = torch.stack([errors.square(), norms.square(), rounding / self._group.world_size])
        with self._group.contact():
            dist.all_reduce(sums, group=self._group.group)
        return sums[0].sqrt(), sums[1].sqrt(), sums[2]


def _states(model: nn.Module) -> list[Any]:
    """Returns FSDP2's states, each with groups of parameters that are gathered together."""
    modules = [x for x in model.modules() if isinstance(x, FSDPModule)]
    return list(dict.fromkeys(x._get_fsdp_state() for x in modules))


@contextmanager
def _ungathered(model: nn.Module) -> Iterator[None]:
    """Backward passes gather and free no parameters, and leave FSDP2's order of layers as it is."""
    states = _states(model)
    groups = [group for state in states for group in state._fsdp_param_groups]
    kept = [(x._state_ctx, {"is_last_backward": x._state_ctx.is_last_backward}) for x in states]
    names = "unshard_in_backward", "reshard_after_backward"
    kept += [(x, {name: getattr(x, name) for name in names}) for x in groups]
    orders = [list(x._post_forward_indices) for x in groups]
    try:
        for owner, values in kept:
            vars(owner).update(dict.fromkeys(values, False))
        yield
    finally:
        for owner, values in kept:
            vars(owner).update(values)
        for group, order in zip(groups, orders, strict=True):
            group._post_forward_indices[:] = order
