"""`raco-optim align` in several processes (torchrun): the first keeps the run's folder."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from typing import Any, TypeVar

from raco_optim.cli.errors import UsageError, one_line
from raco_optim.distributed.group import launched_world_size

T = TypeVar("T")


def is_first(*, on_this_machine: bool = False) -> bool:
    """Returns whether this is the first process, which speaks and writes for all.

    Args:
        on_this_machine: Whether the first one on this machine is meant.

    Example:
        >>> from raco_optim.cli.processes import is_first
        >>> is_first()
        True
    """
    rank = os.environ.get("LOCAL_RANK" if on_this_machine else "RANK", "0")
    return launched_world_size() == 1 or rank == "0"


def tell(text: str) -> None:
    """Writes a line to stderr, once.

    Args:
        text: The line.
    """
    if is_first():
        sys.stderr.write(f"{text}\n")


def by_first(action: Callable[[], T]) -> T:
    """Lets the first process do something, and returns in all of them what it returned.

    Args:
        action: What to do.

    Raises:
        UsageError: There was an error; the first process raises that, all others its message.

    Example:
        >>> from raco_optim.cli.processes import by_first
        >>> by_first(lambda: 3)
        3
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
