"""The processes that train one model, and the small messages that they exchange."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


def launched_world_size() -> int:
    """Returns how many processes torchrun started, 1 without it."""
    return int(os.environ.get("WORLD_SIZE", 1)) if "LOCAL_RANK" in os.environ else 1


class Group:
    """The processes over which gradients are averaged; `group` is None for all of them.

    What they agree on goes through the processors' memory, whatever the gradients use, so that it
    does not wait for an accelerator.
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
        self.compared = False  # whether the values of the parameters were found to be the same

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
        """Whether this process is the first one, or has no others."""
        return not self.is_distributed or self.rank == 0

    @property
    def ranks(self) -> list[int]:
        """Their ranks among all processes, as the launcher counts them."""
        return dist.get_process_group_ranks(self.group or dist.group.WORLD)

    def check_device(self, device: torch.device) -> None:
        """Raises `ValueError` unless the group's backend takes tensors of the device."""
        backends = dist.get_backend_config(self.group)
        if f"{device.type}:" not in backends:
            raise ValueError(
                f"parameters must be where the process group can send them from; got parameters "
                f"on {device} and a group of {backends}. Move the model, or add a backend: "
                f'torch.distributed.init_process_group("cpu:gloo,cuda:nccl").'
            )

    def broadcast_from_first(self, value: Any) -> Any:  # noqa: ANN401  # can be pickled
        """Returns the value that the first process passed."""
        found = [value]
        with self.contact():
            dist.broadcast_object_list(found, self.ranks[0], group=self.small_group())
        return found[0]

    def gather(self, value: Any) -> dict[int, Any]:  # noqa: ANN401  # can be pickled
        """Returns what each process passed, by its rank among all processes."""
        found: list[Any] = [None] * self.world_size
        with self.contact():
            dist.all_gather_object(found, (dist.get_rank(), value), group=self.small_group())
        return dict(found)

    def maximum(self, numbers: list[int]) -> list[int]:
        """Returns the largest of each number over the processes."""
        votes = torch.tensor(numbers, device="cpu")
        with self.contact():
            dist.all_reduce(votes, dist.ReduceOp.MAX, group=self.small_group())
        return [int(vote) for vote in votes]

    def sum(self, parts: Sequence[Tensor], device: torch.device) -> list[Tensor]:
        """Sums small vectors over the processes, in one message, and returns them on the host."""
        total = torch.cat([part.to(device, torch.float64).reshape(-1) for part in parts])
        with self.contact():
            dist.all_reduce(total, group=self.group)
        return list(torch.split(total.cpu(), [part.numel() for part in parts]))

    def mean(self, values: list[Tensor | None]) -> tuple[list[Tensor | None], str]:
        """Returns the means of losses, as `unpack_losses` does."""
        device = next((v.device for v in values if v is not None), torch.device("cpu"))
        return self.unpack_losses(self.sum(self.pack_losses(values), device))

    def pack_losses(self, values: Sequence[Tensor | None]) -> list[Tensor]:
        """Returns what `unpack_losses` needs the sums of; None stands for an absent loss."""
        some = next((v for v in values if v is not None), torch.zeros((), device="cpu"))
        zero = torch.zeros((), dtype=torch.float64, device=some.device)
        mine = torch.stack([zero if v is None else v.to(zero).reshape(()) for v in values])
        present = torch.tensor([v is not None for v in values], device="cpu")
        # By process, how early in the list the first loss is that is NaN or Inf; 0 for none.
        early = torch.arange(len(values), 0, -1, device=some.device) * ~mine.isfinite()
        bad = torch.zeros(self.world_size, device=some.device)
        bad[self.rank] = early.amax()
        return [mine / self.world_size, present, bad]

    def unpack_losses(self, sums: Sequence[Tensor]) -> tuple[list[Tensor | None], str]:
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
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            raise RuntimeError(
                f"rank {dist.get_rank()} lost contact with the other processes: {error}. One of "
                f"them stopped, or did not come to this point in time (`timeout` of "
                f"torch.distributed.init_process_group). Its own log says why; nothing was written "
                f"to .grad here. Restart from the last checkpoint."
            ) from error

    def small_group(self) -> dist.ProcessGroup | None:
        """Returns a group of the same processes for messages from the host's memory."""
        if "cpu:" in dist.get_backend_config(self.group):
            return self.group
        if self._small is None:
            self._small = dist.new_group(self.ranks, backend="gloo", use_local_synchronization=True)
        return self._small

    def __deepcopy__(self, memo: object) -> Group:
        return Group(self.group)  # a group can't be copied, nor need be

    def __reduce__(self) -> tuple[type[Group], tuple[()]]:
        if self.group is not None:
            raise TypeError(
                "an optimizer with a `process_group` can't be pickled, because groups can't. Save "
                "its state_dict() instead."
            )
        return Group, ()
