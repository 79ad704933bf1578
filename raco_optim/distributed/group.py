"""The processes that train one model, and the small messages between them."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


def launched_world_size() -> int:
    """Returns the number of processes that torchrun started; 1 without torchrun."""
    return int(os.environ.get("WORLD_SIZE", 1)) if "LOCAL_RANK" in os.environ else 1


class Group:
    """The processes that average gradients, all if None; small messages use CPU memory."""

    def __init__(self, group: dist.ProcessGroup | None = None) -> None:
        given: object = group
        if given is not None and not isinstance(given, dist.ProcessGroup):
            outside = given == dist.GroupMember.NON_GROUP_MEMBER
            raise TypeError(
                f"`process_group` must be a group of torch.distributed that contains this process; "
                f"got {'one that does not' if outside else repr(given)}. For a DeviceMesh, pass "
                f"mesh.get_group()."
            )
        self.group = group
        self._small: dist.ProcessGroup | None = None
        self.compared = False  # whether the parameters were found to be equal

    @property
    def is_distributed(self) -> bool:
        """Whether there are other processes."""
        return dist.is_available() and dist.is_initialized() and self.world_size > 1

    @property
    def world_size(self) -> int:
        """Number of processes, R."""
        return dist.get_world_size(self.group)

    @property
    def rank(self) -> int:
        """Rank of this process in the group."""
        return dist.get_rank(self.group)

    @property
    def is_main(self) -> bool:
        """Whether this is the first process, or the only one."""
        return not self.is_distributed or self.rank == 0

    @property
    def ranks(self) -> list[int]:
        """Global ranks of the processes."""
        return dist.get_process_group_ranks(self.group or dist.group.WORLD)

    def check_device(self, device: torch.device) -> None:
        """Raises `ValueError` unless the group's backend supports tensors of the device."""
        backends = dist.get_backend_config(self.group)
        if f"{device.type}:" not in backends:
            raise ValueError(
                f"parameters must be on a device that the process group supports; got parameters "
                f"on {device} and a group of {backends}. Move the model, or add a backend: "
                f'torch.distributed.init_process_group("cpu:gloo,cuda:nccl").'
            )

    def broadcast_from_first(self, value: Any) -> Any:  # noqa: ANN401  # can be pickled
        """Returns the value of the first process."""
        found = [value]
        with self.contact():
            dist.broadcast_object_list(found, self.ranks[0], group=self.small_group())
        return found[0]

    def gather(self, value: Any) -> dict[int, Any]:  # noqa: ANN401  # can be pickled
        """Returns the value of each process by its global rank."""
        found: list[Any] = [None] * self.world_size
        with self.contact():
            dist.all_gather_object(found, (dist.get_rank(), value), group=self.small_group())
        return dict(found)

    def maximum(self, numbers: list[int]) -> list[int]:
        """Returns the maximum of each number over the processes."""
        votes = torch.tensor(numbers, device="cpu")
        with self.contact():
            dist.all_reduce(votes, dist.ReduceOp.MAX, group=self.small_group())
        return [int(vote) for vote in votes]

    def sum(self, parts: Sequence[Tensor], device: torch.device) -> list[Tensor]:
        """Sums small vectors over the processes in one message; returns them on the CPU."""
        total = torch.cat([part.to(device, torch.float64).reshape(-1) for part in parts])
        with self.contact():
            dist.all_reduce(total, group=self.group)
        return list(torch.split(total.cpu(), [part.numel() for part in parts]))

    def mean(self, values: list[Tensor | None]) -> tuple[list[Tensor | None], str]:
        """Returns the mean losses over the processes; see `unpack_losses`."""
        device = next((v.device for v in values if v is not None), torch.device("cpu"))
        return self.unpack_losses(self.sum(self.pack_losses(values), device))

    def pack_losses(self, values: Sequence[Tensor | None]) -> list[Tensor]:
        """Returns the summands for `unpack_losses`; None is an absent loss."""
        some = next((v for v in values if v is not None), torch.zeros((), device="cpu"))
        zero = torch.zeros((), dtype=torch.float64, device=some.device)
        mine = torch.stack([zero if v is None else v.to(zero).reshape(()) for v in values])
        present = torch.tensor([v is not None for v in values], device="cpu")
        # Per process, how early in the list the first non-finite loss is; 0 for none.
        early = torch.arange(len(values), 0, -1, device=some.device) * ~mine.isfinite()
        bad = torch.zeros(self.world_size, device=some.device)
        bad[self.rank] = early.amax()
        return [mine / self.world_size, present, bad]

    def unpack_losses(self, sums: Sequence[Tensor]) -> tuple[list[Tensor | None], str]:
        """Returns the mean losses, and words for the ranks with the first non-finite loss.

        An absent loss counts as zero; the mean is None if it is absent everywhere.
        """
        means, present, bad = sums
        values = [mean if n else None for mean, n in zip(means, present.tolist(), strict=True)]
        first = (bad == bad.amax()) & (bad > 0)
        ranks = [str(r) for r, there in zip(self.ranks, first.tolist(), strict=True) if there]
        return values, f" on rank {' and '.join(ranks)}" if ranks else ""

    @contextmanager
    def contact(self) -> Iterator[None]:
        """Explains an error in the exchange of a message."""
        try:
            yield
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            raise RuntimeError(
                f"rank {dist.get_rank()} lost contact with the other processes: {error}. One of "
                f"them stopped, or did not reach this point in time (`timeout` of "
                f"torch.distributed.init_process_group). See its log; nothing was written to .grad "
                f"here. Restart from the last checkpoint."
            ) from error

    def small_group(self) -> dist.ProcessGroup | None:
        """Returns a group of the same processes for messages in CPU memory."""
        if "cpu:" in dist.get_backend_config(self.group):
            return self.group
        if self._small is None:
            self._small = dist.new_group(self.ranks, backend="gloo", use_local_synchronization=True)
        return self._small

    def __deepcopy__(self, memo: object) -> Group:
        return Group(self.group)  # process groups can't be copied

    def __reduce__(self) -> tuple[type[Group], tuple[()]]:
        if self.group is not None:
            raise TypeError(
                "an optimizer with a `process_group` can't be pickled. Save its state_dict() "
                "instead."
            )
        return Group, ()
