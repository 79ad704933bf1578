"""The processes that train one model: what they must agree on, and how an error reaches all."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import Parameter

Facts = dict[str, Any]

_VALUES = "the values of the parameters"
_REMEDIES = {
    _VALUES: (
        "Start from one model: wrap it in DistributedDataParallel before the optimizer is built, "
        "or broadcast it. If these processes do not train one model, pass as `process_group` the "
        "group of those that do (for a process on its own, "
        "torch.distributed.new_subgroups(group_size=1)[0])."
    ),
}


def launched() -> int:
    """Returns how many processes torchrun started, 1 without it."""
    return int(os.environ.get("WORLD_SIZE", 1)) if "LOCAL_RANK" in os.environ else 1


def is_sharded(parameters: Sequence[Tensor]) -> bool:
    """Whether there is a `DTensor` among the parameters (FSDP2, tensor parallelism)."""
    if not (dist.is_available() and dist.is_initialized()):
        return False
    # Not above: it takes half a second, and needs a torch that was built with it.
    from torch.distributed.tensor import DTensor

    return any(isinstance(p, DTensor) for p in parameters)


class Processes:
    """The processes over which gradients are averaged.

    What they agree on goes through the processors' memory, whatever the gradients use, so that it
    does not wait for an accelerator.

    Args:
        group: Their group; None for that of all processes.
    """

    def __init__(self, group: dist.ProcessGroup | None = None) -> None:
        given: object = group
        if given is not None and not isinstance(given, dist.ProcessGroup):
            outside = given == dist.GroupMember.NON_GROUP_MEMBER
            raise TypeError(
                f"`process_group` must be a group of torch.distributed that holds this process; "
                f"got {'one that does not' if outside else repr(given)}. Of a DeviceMesh, pass "
                f"mesh.get_group()."
            )
        self.group = group
        self._small: dist.ProcessGroup | None = None
        self._compared = False

    @property
    def several(self) -> bool:
        """Whether there is more than this process."""
        return dist.is_available() and dist.is_initialized() and self.number > 1

    @property
    def number(self) -> int:
        """Number of processes, R."""
        return dist.get_world_size(self.group)

    @property
    def rank(self) -> int:
        """Number of this process among them."""
        return dist.get_rank(self.group)

    @property
    def first(self) -> bool:
        """Whether this process is the first of them, or has no others."""
        return not self.several or self.rank == 0

    @property
    def ranks(self) -> list[int]:
        """Their ranks among all processes, as the launcher counts them."""
        return dist.get_process_group_ranks(self.group or dist.group.WORLD)

    @contextmanager
    def agreeing(self, facts: Facts | None = None, *, alone: bool = False) -> Iterator[None]:
        """Runs what needs no message, and raises in all processes if it fails in one of them.

        Args:
            facts: What must be the same in all of them; it may be filled on the way.
            alone: Run it without the others.

        Raises:
            ValueError: A fact differs. The message has its values.
            RuntimeError: It failed elsewhere. The message says where and how.
        """
        if alone or not self.several:
            yield
            return
        failure: Exception | None = None
        try:
            yield
        except Exception as error:  # whatever it is, the others are waiting
            failure = error
        texts = {name: repr(fact) for name, fact in (facts or {}).items()}
        digest = hashlib.sha256(repr(sorted(texts.items())).encode()).digest()
        number = int.from_bytes(digest[:7], "big")
        votes = torch.tensor([failure is not None, number, -number], device="cpu")
        try:
            with self.contact():
                dist.all_reduce(votes, dist.ReduceOp.MAX, group=self._small_group())
        except RuntimeError:
            try:
                if failure is not None:
                    raise failure from None  # the cause, rather than what came of it
                raise
            finally:
                del failure
        failed, largest, least = votes.tolist()
        if failed:
            try:
                self.raise_everywhere(failure)
            finally:
                del failure
        if largest != -least:
            self._raise_difference(texts)
        self._compared = self._compared or _VALUES in texts

    def raise_everywhere(self, failure: Exception | None) -> None:
        """Raises the failure of this process, or says what failed elsewhere; all must call it."""
        found = self._gather(None if failure is None else f"{type(failure).__name__}: {failure}")
        if failure is not None:
            try:
                raise failure
            finally:
                del failure  # a cycle with its traceback would keep the graph
        named = [f"rank {r}: {text}" for r, text in found.items() if text is not None]
        more = f" ({len(named) - 1} more failed)" if len(named) > 1 else ""
        raise RuntimeError(
            f"another process failed, and nothing was changed here. {named[0]}{more}"
        )

    def facts(
        self,
        parameters: Sequence[Tensor],
        shared: Sequence[bool] = (),
        mode: str | list[Tensor] = "",
    ) -> Facts:
        """Returns what must be the same of the parameters; until it was once, their values too."""
        if not self.several:
            return {}
        trained = [p for p in parameters if p.requires_grad]
        kinds = {(p.dtype, p.device.type) for p in trained}
        facts: Facts = {
            "the parameters": (
                f"{len(trained)} with {sum(p.numel() for p in trained)} numbers, "
                + " and ".join(sorted(f"{dtype} on {device}" for dtype, device in kinds))
            ),
            "`shared_parameters`": "all" if all(shared) else [j for j, s in enumerate(shared) if s],
            "`gram`": mode if isinstance(mode, str) else _positions(parameters, mode),
        }
        if not self._compared:
            own = [p for p in trained if type(p) in (Tensor, Parameter)]
            facts[_VALUES] = [(p.shape, p.stride(), _checksum(p)) for p in own]
        return facts

    def check_device(self, device: torch.device) -> None:
        """Raises `ValueError` unless the group's backend takes tensors of the device."""
        backends = dist.get_backend_config(self.group)
        if f"{device.type}:" not in backends:
            raise ValueError(
                f"parameters must be where the process group can send them from; got parameters "
                f"on {device} and a group of {backends}. Move the model, or add a backend: "
                f'torch.distributed.init_process_group("cpu:gloo,cuda:nccl").'
            )

    def by_first(self, function: Callable[..., Any], *args: Any) -> Any:  # noqa: ANN401
        """Calls a function, which may draw at random, in all; returns what the first one got."""
        with self.agreeing():
            found = [function(*args)]
        if self.several:
            with self.contact():
                dist.broadcast_object_list(found, self.ranks[0], group=self._small_group())
        return found[0]

    def sum(self, parts: Sequence[Tensor], device: torch.device) -> list[Tensor]:
        """Sums small vectors over the processes, in one message, and returns them on the host."""
        total = torch.cat([part.to(device, torch.float64).reshape(-1) for part in parts])
        with self.contact():
            dist.all_reduce(total, group=self.group)
        return list(torch.split(total.cpu(), [part.numel() for part in parts]))

    def mean(self, values: list[Tensor | None]) -> tuple[list[Tensor | None], str]:
        """Returns what `unpack` does, if there are several processes; else the values."""
        if not self.several:
            return values, ""
        device = next((v.device for v in values if v is not None), torch.device("cpu"))
        return self.unpack(self.sum(self.pack(values), device))

    def pack(self, values: Sequence[Tensor | None]) -> list[Tensor]:
        """Returns what `unpack` needs the sums of: losses, scalars, None for an absent one."""
        some = next((v for v in values if v is not None), torch.zeros((), device="cpu"))
        zero = torch.zeros((), dtype=torch.float64, device=some.device)
        mine = torch.stack([zero if v is None else v.to(zero).reshape(()) for v in values])
        present = torch.tensor([v is not None for v in values], device="cpu")
        # By process, how early in the list the first loss is that is NaN or Inf; 0 for none.
        early = torch.arange(len(values), 0, -1, device=some.device) * ~mine.isfinite()
        bad = torch.zeros(self.number, device=some.device)
        bad[self.rank] = early.amax()
        return [mine / self.number, present, bad]

    def unpack(self, sums: Sequence[Tensor]) -> tuple[list[Tensor | None], str]:
        """Returns the means of the losses, and in words where the first bad one is NaN or Inf.

        An absent loss counts as zero; the mean is None for one that is absent everywhere.
        """
        means, present, bad = sums
        values = [mean if n else None for mean, n in zip(means, present.tolist(), strict=True)]
        first = (bad == bad.amax()) & (bad > 0)
        ranks = [str(r) for r, there in zip(self.ranks, first.tolist(), strict=True) if there]
        return values, f" on rank {' and '.join(ranks)}" if ranks else ""

    @contextmanager
    def contact(self) -> Iterator[None]:
        """Says what it means if a message can't be exchanged."""
        try:
            yield
        except RuntimeError as error:
            raise RuntimeError(
                f"rank {dist.get_rank()} lost contact with the other processes: {error}. One of "
                f"them stopped, or did not come to this point in time (`timeout` of "
                f"torch.distributed.init_process_group). Its own log says why; nothing was written "
                f"to .grad here. Restart from the last checkpoint."
            ) from error

    def _raise_difference(self, facts: Mapping[str, str]) -> None:
        found = self._gather(facts)
        self._compared = False  # by all of them, the next time
        (rank, first), *others = found.items()
        name, r, got = next(
            (name, r, other.get(name))
            for r, other in others
            for name in [*first, *other]
            if first.get(name) != other.get(name)
        )
        values = f"{first.get(name)} on rank {rank}, {got} on rank {r}"
        raise ValueError(
            f"{name} must be the same in all processes; got "
            f"{'others' if name == _VALUES else values}. "
            f"{_REMEDIES.get(name, 'Pass the same to all of them.')}"
        )

    def _gather(self, own: Any) -> dict[int, Any]:  # noqa: ANN401  # anything that can be pickled
        """Returns what each process passed, by its rank among all processes."""
        found: list[Any] = [None] * self.number
        with self.contact():
            dist.all_gather_object(found, (dist.get_rank(), own), group=self._small_group())
        return dict(found)

    def _small_group(self) -> dist.ProcessGroup | None:
        if "cpu:" in dist.get_backend_config(self.group):
            return self.group
        if self._small is None:
            self._small = dist.new_group(self.ranks, backend="gloo", use_local_synchronization=True)
        return self._small

    def __deepcopy__(self, memo: object) -> Processes:
        return Processes(self.group)  # a group can't be copied, nor need be

    def __reduce__(self) -> tuple[type[Processes], tuple[()]]:
        if self.group is not None:
            raise TypeError(
                "an optimizer with a `process_group` can't be pickled, because groups can't. Save "
                "its state_dict() instead."
            )
        return Processes, ()


def _checksum(parameter: Tensor) -> int | None:
    if parameter.is_meta:
        return None
    # Sums of whole numbers do not depend on their order, and so not on the machine.
    flat = torch.view_as_real(parameter) if parameter.is_complex() else parameter
    flat = flat.detach().reshape(-1)
    whole = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[flat.element_size()]
    return int(flat.view(whole).sum(dtype=torch.int64))


def _positions(parameters: Sequence[Tensor], chosen: Sequence[Tensor]) -> list[int]:
    identities = {id(p) for p in chosen}
    return [j for j, p in enumerate(parameters) if id(p) in identities]
