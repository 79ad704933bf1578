"""`raco-optim align` in several processes (torchrun): the first one writes and prints."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from typing import Any, TypeVar

from raco_optim.cli.errors import UsageError, one_line
from raco_optim.distributed.group import launched_world_size

T = TypeVar("T")


def is_first(*, on_this_machine: bool = False) -> bool:
    """Returns whether this is the first process, of all or on this machine."""
    rank = os.environ.get("LOCAL_RANK" if on_this_machine else "RANK", "0")
    return launched_world_size() == 1 or rank == "0"


def tell(text: str) -> None:
    """Writes a line to stderr in the first process."""
    if is_first():
        sys.stderr.write(f"{text}\n")


def by_first(action: Callable[[], T]) -> T:
    """Runs an action in the first process, and returns its result in all of them.

    If it fails, the first process raises the error, and all others a `UsageError` with its message.
    """
    if launched_world_size() == 1:
        return action()
    import torch.distributed as dist

    message: list[Any] = [None, None]
    if is_first():
        try:
            message[0] = action()
        except BaseException as error:
            dist.broadcast_object_list([None, one_line(error)])
            raise
    dist.broadcast_object_list(message)
    found, refusal = message
    if refusal is not None:
        raise UsageError(refusal)
    return found  # type: ignore[no-any-return]
