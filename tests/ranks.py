"""Processes for tests: ranks of torch.distributed (gloo, on this machine) that wait for work.

They are forked from a process that has imported torch, which takes seconds, and nothing else.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import pickle
import tempfile
import traceback
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

SECONDS = 60.0  # that a rank may take for a piece of work, and wait for the others

_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(
    ["pytest", "torch.distributed.fsdp", "torch.distributed.tensor", "raco_optim"]
)


@dataclass
class Failure:
    """What a rank raised."""

    error: BaseException | str
    trace: str


class Ranks:
    """Processes of one group.

    Args:
        number: How many.
        seconds: How long they wait for each other.
    """

    def __init__(self, number: int, seconds: float = SECONDS) -> None:
        self._folder = tempfile.TemporaryDirectory()
        self.processes, self._pipes = [], []
        for rank in range(number):
            here, there = _CONTEXT.Pipe()
            settings = rank, number, os.path.join(self._folder.name, "store"), seconds, there
            process = _CONTEXT.Process(target=_serve, args=settings, daemon=True)
            process.start()
            there.close()
            self.processes.append(process)
            self._pipes.append(here)

    def run(self, work: Callable[..., Any], *args: Any) -> list[Any]:
        """Calls ``work(rank, *args)`` in each of them, and returns what they return."""
        results = self.outcomes(work, *args)
        for rank, result in enumerate(results):
            if isinstance(result, Failure):
                raise AssertionError(f"rank {rank}: {result.trace}")
        return results

    def outcomes(self, work: Callable[..., Any], *args: Any) -> list[Any]:
        """As `run`, with a `Failure` where one raised, and None where one was killed."""
        self.start(work, *args)
        return [self.result(rank) for rank in range(len(self.processes))]

    def start(self, work: Callable[..., Any], *args: Any) -> None:
        """Calls ``work(rank, *args)`` in each of them that is alive, and does not wait."""
        task = pickle.dumps((work, args))
        for pipe in self._pipes:
            with contextlib.suppress(BrokenPipeError):  # that of a process that was killed
                pipe.send_bytes(task)

    def result(self, rank: int, seconds: float = 2 * SECONDS) -> Any:
        """Waits for what one of them returned; see `outcomes`."""
        pipe, process = self._pipes[rank], self.processes[rank]
        ready = wait([pipe, process.sentinel], seconds)
        if pipe in ready:
            with contextlib.suppress(EOFError):
                return pickle.loads(pipe.recv_bytes())
        if not ready:
            process.kill()
            raise AssertionError(f"rank {rank} gave no result within {seconds} seconds.")
        return None

    def close(self) -> None:
        """Ends the processes."""
        for pipe, process in zip(self._pipes, self.processes, strict=True):
            pipe.close()
            process.join(5)
            if process.is_alive():
                process.kill()
        self._folder.cleanup()

    def __enter__(self) -> Ranks:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _serve(rank: int, number: int, store: str, seconds: float, pipe: Connection) -> None:
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{store}",
        rank=rank,
        world_size=number,
        timeout=timedelta(seconds=seconds),
    )
    while True:
        try:
            work, args = pickle.loads(pipe.recv_bytes())
        except EOFError:
            # Not through the interpreter's end: gloo's threads abort there now and then.
            os._exit(0)
        try:
            result = work(rank, *args)
        except Exception as error:
            result = Failure(error, traceback.format_exc())
        try:
            # By value: Connection.send would pass tensors as files that stay open.
            found = pickle.dumps(result)
        except Exception as error:  # it can't be pickled
            shown = result.error if isinstance(result, Failure) else result
            found = pickle.dumps(Failure(f"{type(shown).__name__}: {shown}", f"{error}"))
        pipe.send_bytes(found)


# --- What the tests of several processes share ---------------------------------------------------

WEIGHTS = {"a": 0.5, "b": 0.3, "c": 0.2}


def slices(batch: Sequence[Tensor], rank: int, number: int) -> list[Tensor]:
    """Returns a rank's part of a batch."""
    return [x.chunk(number)[rank] for x in batch]


def losses_of(outputs: dict[str, Tensor], targets: Tensor) -> dict[str, Tensor]:
    """Three losses in conflict, one of each output."""
    scales = {"a": 1.0, "b": 3.0, "c": -2.0}
    return {name: (out - scales[name] * targets).square().mean() for name, out in outputs.items()}


def copies(tensors: Iterable[Tensor]) -> list[Tensor]:
    """Copies of whole tensors, also of those of which a process holds a part."""
    whole = (p.full_tensor() if hasattr(p, "full_tensor") else p for p in tensors)
    return [p.detach().clone() for p in whole]


def relative(found: Iterable[Tensor], expected: Iterable[Tensor]) -> float:
    """The distance between two lists of tensors, relative to the norm of the second."""
    pairs = [(x.detach(), y.detach()) for x, y in zip(found, expected, strict=True)]
    distance = sum(float((x - y).square().sum()) for x, y in pairs)
    return (distance / sum(float(y.square().sum()) for _, y in pairs)) ** 0.5


def equal(a: Iterable[Tensor], b: Iterable[Tensor]) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


class OneBuffer(torch.autograd.Function):
    """``x @ row``, whose gradient is memory that every backward pass fills anew."""

    memory = torch.zeros(5, dtype=torch.float64)

    @staticmethod
    def forward(ctx: Any, x: Tensor, row: Tensor) -> Tensor:
        ctx.save_for_backward(row)
        return x @ row

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        return OneBuffer.memory.copy_(grad * ctx.saved_tensors[0]), None
