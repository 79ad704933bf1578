"""The processes that train one model: what they must agree on, and how an error reaches all."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import Parameter

Facts = dict[str, Any]

_VALUES = "values of the parameters"
_REMEDIES = {
    _VALUES: (
        "Start from one model: wrap it in DistributedDataParallel before the optimizer is built, "
        "or broadcast it. If these processes do not train one model, pass as `process_group` the "
        "group of those that do (for a process on its own, "
        "torch.distributed.new_subgroups(group_size=1)[0])."
    ),
}


class Processes:
    """The processes over which gradients are averaged.

    Small messages go through the processors' memory ("gloo"), whatever the gradients use, so that
    none of them waits for an accelerator.

    Args:
        group: Their group; None for that of all processes.
    """

    def __init__(self, group: dist.ProcessGroup | None = None) -> None:
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
        """Number of this process."""
        return dist.get_rank(self.group)

    @contextmanager
    def agreeing(self, facts: Facts | None = None) -> Iterator[None]:
        """Runs what needs no message, and raises in all processes if it fails in one of them.

        Args:
            facts: What must be the same in all of them; it may be filled on the way.

        Raises:
            ValueError: A fact differs. The message has its values.
            RuntimeError: It failed elsewhere. The message says where and how.
        """
        if not self.several:
            yield
            return
        failure: Exception | None = None
        try:
            yield
        except Exception as error:  # whatever it is, the others are waiting
            failure = error
        facts = {name: repr(fact) for name, fact in (facts or {}).items()}
        digest = hashlib.sha256(repr(facts).encode()).digest()
        number = int.from_bytes(digest[:7], "big")
        votes = torch.tensor([failure is not None, number, -number], device="cpu")
        with self.contact():
            dist.all_reduce(votes, dist.ReduceOp.MAX, group=self._small_group())
        failed, largest, least = votes.tolist()
        if failed:
            self.raise_everywhere(failure)
        if largest != -least:
            self._raise_difference(facts)

    def raise_everywhere(self, failure: Exception | None) -> None:
        """Raises the failure of this process, or says what failed elsewhere; all must call it."""
        own = None if failure is None else f"{type(failure).__name__}: {failure}"
        found = self._gather(own)
        if failure is not None:
            raise failure
        named = "; ".join(f"rank {r}: {text}" for r, text in enumerate(found) if text is not None)
        raise RuntimeError(
            f"`backward` failed in another process and changed nothing here. {named}"
        )

    def facts(self, parameters: Sequence[Tensor]) -> Facts:
        """Returns what must be the same of the parameters; the first time, their values too."""
        if not self.several:
            return {}
        trained = [p for p in parameters if p.requires_grad]
        facts: Facts = {"the number of parameters": (len(trained), sum(p.numel() for p in trained))}
        if not self._compared:
            self._compared = True
            facts[_VALUES] = [_checksum(p) for p in trained if type(p) in (Tensor, Parameter)]
        return facts

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

    def here(self, fact: bool | Tensor) -> Tensor:
        """Returns what, summed, says in which processes a fact holds."""
        where = torch.arange(self.number, device="cpu") == self.rank
        return where.to(fact.device) & fact if isinstance(fact, Tensor) else where & fact

    def pack(self, values: Sequence[Tensor | None]) -> list[Tensor]:
        """Returns what `unpack` needs the sums of: losses, scalars, None for an absent one."""
        some = next((v for v in values if v is not None), torch.zeros((), device="cpu"))
        zero = torch.zeros((), dtype=torch.float64, device=some.device)
        mine = torch.stack([zero if v is None else v.to(zero).reshape(()) for v in values])
        present = torch.tensor([v is not None for v in values], device="cpu")
        return [mine / self.number, present, self.here(~mine.isfinite().all())]

    def unpack(self, sums: Sequence[Tensor]) -> tuple[list[Tensor | None], str]:
        """Returns the means of the losses, and where one is NaN or Inf.

        An absent loss counts as zero; the mean is None for one that is absent everywhere.
        """
        means, present, bad = sums
        values = [mean if n else None for mean, n in zip(means, present.tolist(), strict=True)]
        return values, _ranks(bad)

    @contextmanager
    def contact(self) -> Iterator[None]:
        """Says what it means if a message can't be exchanged."""
        try:
            yield
        except RuntimeError as error:
            raise RuntimeError(
                f"rank {self.rank} lost contact with the other processes: {error}. One of them "
                f"stopped, or did not come to this point in time (`timeout` of "
                f"torch.distributed.init_process_group). Its own log says why; nothing was written "
                f"to .grad here. Restart from the last checkpoint."
            ) from error

    def _raise_difference(self, facts: Mapping[str, str]) -> None:
        found = self._gather(facts)
        name = next(key for key in facts if len({other.get(key) for other in found}) > 1)
        if name == _VALUES:
            self._compared = False
            got = "others"
        else:
            got = ", ".join(f"{other.get(name)} on rank {r}" for r, other in enumerate(found))
        remedy = _REMEDIES.get(name, "Pass the same to all of them.")
        raise ValueError(f"{name} must be the same in all processes; got {got}. {remedy}")

    def _gather(self, own: Any) -> list[Any]:  # noqa: ANN401  # anything that can be pickled
        found: list[Any] = [None] * self.number
        with self.contact():
            dist.all_gather_object(found, own, group=self._small_group())
        return found

    def _small_group(self) -> dist.ProcessGroup | None:
        if "gloo" in dist.get_backend_config(self.group):
            return self.group
        if self._small is None:
            ranks = dist.get_process_group_ranks(self.group)
            self._small = dist.new_group(ranks, backend="gloo", use_local_synchronization=True)
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


def _checksum(parameter: Tensor) -> int:
    # Sums of whole numbers do not depend on their order, and so not on the machine.
    flat = parameter.detach().reshape(-1)
    size = flat.element_size()
    whole = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[size]
    return int(flat.contiguous().view(whole).sum(dtype=torch.int64))


def _ranks(where: Tensor) -> str:
    ranks = ", ".join(str(rank) for rank, there in enumerate(where.tolist()) if there)
    return f" on rank {ranks}" if ranks else ""
