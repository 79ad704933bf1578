"""Processes for tests: ranks of torch.distributed (gloo, on this machine) that wait for work.

Starting one takes seconds, mostly for importing torch, so that all tests of a run share them.
"""

from __future__ import annotations

import os
import signal
import tempfile
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

SECONDS = 60.0  # that a rank may take for a piece of work, and wait for the others


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
        context = mp.get_context("spawn")
        self._folder = tempfile.TemporaryDirectory()
        self.processes, self._pipes = [], []
        for rank in range(number):
            here, there = context.Pipe()
            settings = rank, number, os.path.join(self._folder.name, "store"), seconds, there
            process = context.Process(target=_serve, args=settings, daemon=True)
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
        for pipe in self._pipes:
            pipe.send((work, args))
        return self.results()

    def results(self, seconds: float = 2 * SECONDS) -> list[Any]:
        """Waits for the results of all."""
        return [self._result(rank, seconds) for rank in range(len(self._pipes))]

    def _result(self, rank: int, seconds: float) -> Any:
        pipe, process = self._pipes[rank], self.processes[rank]
        ready = wait([pipe, process.sentinel], seconds)
        if pipe in ready:
            try:
                return pipe.recv()
            except EOFError:
                return None
        if not ready:
            os.kill(process.pid, signal.SIGKILL)
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
            work, args = pipe.recv()
        except EOFError:
            # Not through the interpreter's end: gloo's threads abort there now and then.
            os._exit(0)
        try:
            result = work(rank, *args)
        except Exception as error:
            result = Failure(error, traceback.format_exc())
        try:
            pipe.send(result)
        except Exception as error:  # it can't be pickled
            shown = result.error if isinstance(result, Failure) else result
            pipe.send(Failure(f"{type(shown).__name__}: {shown}", f"{error}"))


def slices(batch: Sequence[torch.Tensor], rank: int, number: int) -> list[torch.Tensor]:
    """Returns a rank's part of a batch."""
    return [x.chunk(number)[rank] for x in batch]
