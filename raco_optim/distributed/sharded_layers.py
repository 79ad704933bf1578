r"""One backward pass for all losses of a model under FSDP2, which gathers the model for it once.

Each process adds up its part of a parameter's m gradients when the pass meets the layers. One
reduce-scatter sums the parts over the R processes; each process keeps its shards s:

.. math:: g_{i,s} = \frac{1}{R} \sum_{r=1}^{R} \sum_n u_{in}^{(r)} D_{n,s}^{(r)}
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any
from zlib import crc32

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard

from raco_optim.distributed.group import Group
from raco_optim.distributed.sharded import ShardedMode
from raco_optim.gradients.combine import grad_dtype, stashed_gradients
from raco_optim.gradients.per_example import LayerGradients, PerExampleMode
from raco_optim.gradients.per_example.layers import Part, Sensitivities
from raco_optim.gradients.per_example.one_pass import Plan, Totals, count
from raco_optim.gradients.per_example.watch import ANCHOR

_OTHERS = "the losses reach tensors that FSDP2 does not shard over all processes"
_DIFFER = "the processes do not run the same layers"


class ShardedPerExampleMode(PerExampleMode, ShardedMode):
    """Runs one backward pass for all losses where that is exact, else one for each."""

    def __init__(self, model: nn.Module, parameters: Sequence[Tensor], group: Group) -> None:
        ShardedMode.__init__(self, self.name)
        self._layers = _ShardedLayerGradients(model, parameters, group)


class _ShardedLayerGradients(LayerGradients):
    """Means over the processes, which decide together what is run."""

    def __init__(self, model: nn.Module, parameters: Sequence[Tensor], group: Group) -> None:
        self._group = group
        super().__init__(model, parameters)

    def _leaves(self) -> list[Tensor | None]:
        gathered = {
            id(p.sharded_param): getattr(p, "_unsharded_param", None)
            for state in _states(self._model)
            for group in _groups(state)
            for p in group.fsdp_params
        }
        leaves = [gathered.get(id(p)) if self._reduces(p) else None for p in self._parameters]
        for p, leaf in zip(self._parameters, leaves, strict=True):
            if leaf is not None:  # as a reference model, without the adapters, has left it
                leaf.requires_grad_(p.requires_grad)
        return leaves

    def _reduces(self, p: Tensor) -> bool:
        if not isinstance(p, DTensor) or p.device.type != p.device_mesh.device_type:
            return False
        plain = all(type(placement) in (Shard, Replicate) for placement in p.placements)
        return plain and p.device_mesh.size() == self._group.world_size

    def _plan(self, scalars: Tensor, name: str) -> Plan:
        with _ungathered(_states(self._model)):  # from the scalars to the head: needs no weights
            return super()._plan(scalars, name)

    def _agreed(self, plan: Plan, losses: Sequence[Tensor | None]) -> tuple[list[bool], str]:
        present, why = super()._agreed(plan, losses)
        if not why and plan.uses.of.keys() - plan.places.keys() - {id(ANCHOR)}:
            why = _OTHERS
        if not why and plan.others:
            why = self._described(plan)
        covered = [plan.places[id(p)] for p in plan.covered]
        digest = crc32(repr((why, covered, len(plan.marks), self._turn)).encode())
        largest, least, *votes = self._group.maximum([digest, -digest, *present])
        return [bool(vote) for vote in votes], why or ("" if largest == -least else _DIFFER)

    def _totals(self, u: Tensor, plan: Plan, *, compared: bool = False) -> Totals:
        return _Shards(u, plan, self._parameters, self._group, compared=compared)

    def _hooked(self, plan: Plan) -> bool:
        return False  # FSDP2 has hooks of its own; their number is a part of the key

    def _gradient(self, total: Tensor, p: Any) -> Tensor:  # noqa: ANN401  # a DTensor
        return DTensor.from_local(
            total, p.device_mesh, p.placements, run_check=False, shape=p.shape, stride=p.stride()
        )

    def _autograds(self, plan: Plan, v: Tensor) -> Sequence[Tensor | None]:
        with stashed_gradients(self._parameters) as take:
            torch.autograd.backward(plan.scalars, v, retain_graph=True)
            found = take()
        return [found[plan.places[id(p)]] for p in plan.covered]

    def _anywhere(self, *flags: bool) -> Sequence[bool]:
        return [vote > 0 for vote in self._group.maximum([*flags])]


class _Shards(Totals):
    """Shards of the means, each reduced when the last layer has added its part."""

    def __init__(
        self, u: Tensor, plan: Plan, parameters: Sequence[Tensor], group: Group, *, compared: bool
    ) -> None:
        super().__init__(Sensitivities(u / group.world_size), plan.covered, compared=compared)
        self._group, self._left = group, count(plan.marks)
        self._cut: dict[int, Any] = {key: parameters[j] for key, j in plan.places.items()}

    def dtype(self, p: Tensor) -> torch.dtype:
        """That of the sharded parameter, which may be wider than that of the layer."""
        return grad_dtype(self._cut[id(p)])

    def add(self, p: Tensor, part: Part) -> None:
        """See `Totals`."""
        super().add(p, part)
        self._left[id(p)] -= 1
        if self._left[id(p)]:
            return
        cut, whole = self._cut[id(p)], self.of.pop(id(p))
        partial = [Partial()] * cut.device_mesh.ndim
        placements = [Shard(x.dim + 1) if isinstance(x, Shard) else x for x in cut.placements]
        with self._group.contact():
            parts = DTensor.from_local(whole, cut.device_mesh, partial, run_check=False)
            self.of[id(p)] = parts.redistribute(placements=placements).to_local()

    def compare(self, true: Sequence[Any]) -> tuple[Tensor, Tensor, Tensor]:
        """See `Totals`; of the whole parameters."""
        shards = [g if g is None else g.to_local() for g in true]
        errors, norms, rounding = (x.double() for x in super().compare(shards))
        sums = torch.stack([errors.square(), norms.square(), rounding / self._group.world_size])
        with self._group.contact():
            dist.all_reduce(sums, group=self._group.group)
        return sums[0].sqrt(), sums[1].sqrt(), sums[2]


def _states(model: nn.Module) -> list[Any]:
    """Returns FSDP2's states of a model."""
    modules: list[Any] = [x for x in model.modules() if hasattr(x, "_get_fsdp_state")]
    return list(dict.fromkeys(x._get_fsdp_state() for x in modules))


def _groups(state: Any) -> list[Any]:  # noqa: ANN401
    """Returns the groups of parameters that are gathered together; older torch has at most one."""
    groups: list[Any] = getattr(state, "_fsdp_param_groups", None) or [state._fsdp_param_group]
    return [group for group in groups if group is not None]


@contextmanager
def _ungathered(states: Sequence[Any]) -> Iterator[None]:
    """Backward passes gather and free nothing, and leave FSDP2's order of layers as it is."""
    groups = [group for state in states for group in _groups(state)]
    names = "unshard_in_backward", "reshard_after_backward"
    kept = [(x, {name: getattr(x, name) for name in names}) for x in groups]
    kept += [(x._state_ctx, {"is_last_backward": x._state_ctx.is_last_backward}) for x in states]
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
