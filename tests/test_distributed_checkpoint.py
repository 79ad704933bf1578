"""Checkpoints of several processes, by the recipe of docs/distributed.md: runs go on the same."""

from __future__ import annotations

import math
import multiprocessing
import os
import random
import re
import signal
import sys
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from raco_optim import CAGradClip
from tests.problems_nn import bits
from tests.ranks import WEIGHTS, Ranks, copies, relative, slices

PAGE = Path(__file__).parent.parent / "docs" / "distributed.md"
STEPS = 13


def recipe() -> dict[str, Any]:
    """The functions of the page."""
    found: dict[str, Any] = {}
    for block in re.findall(r"^```python\n(.*?)^```$", PAGE.read_text(), re.MULTILINE | re.DOTALL):
        if "\ndef save" in block:
            exec(block, found)
    return found


class Run:
    """A training run whose weights, c and learning rate change; one of its updates is left out."""

    def __init__(self, rank: int, number: int, kind: str, root: Path) -> None:
        torch.manual_seed(0)
        self.model = nn.Sequential(nn.Linear(6, 17), nn.Tanh(), nn.Linear(17, 3))
        if kind == "shards":
            fully_shard(self.model, mesh=init_device_mesh("cpu", (number,)))
        adamw = torch.optim.AdamW(self.model.parameters(), lr=1e-2)
        every = 3 if kind == "whole" else 1
        self.opt = CAGradClip(adamw, WEIGHTS, c=0.4, nonfinite="skip", gram_every=every)
        self.scheduler = torch.optim.lr_scheduler.ExponentialLR(self.opt, 0.9)
        self.forward = DistributedDataParallel(self.model) if kind == "whole" else self.model
        self.rank, self.number = rank, number
        name = "whole" if kind == "whole" else "shards"  # those of a single process are the same
        page = recipe()
        self.place = root / "checkpoint.pt" if kind == "whole" else root
        self._save, self._load = page[f"save_{name}"], page[f"load_{name}"]

    def load(self) -> int:
        return self._load(self.place, self.model, self.opt, self.scheduler)

    def save(self, step: int) -> None:
        self._save(self.place, step, self.model, self.opt, self.scheduler)

    def train(self, first: int, last: int) -> None:
        for step in range(first, last):
            generator = torch.Generator().manual_seed(step)
            batch = torch.randn(8, 6, generator=generator), torch.randn(8, 3, generator=generator)
            x, y = slices(batch, self.rank, self.number)
            losses = dict(zip(WEIGHTS, (self.forward(x) - y).square().mean(0), strict=True))
            if step == 2 and self.rank == 0:
                losses["b"] = losses["b"] * torch.nan
            self.opt.zero_grad()
            self.opt.backward(losses)
            self.opt.step()
            self.scheduler.step()
            self.opt.weights = {"a": 0.5 - 0.02 * step, "b": 0.3, "c": 0.2 + 0.02 * step}
            self.opt.c = 0.4 + 0.02 * step

    def result(self) -> tuple[list[Tensor], dict[str, Any]]:
        return copies(self.model.parameters()), self.opt.state_dict()["raco_optim"]


def trained(rank: int, number: int, kind: str, root: Path, last: int, save: bool = False):
    """Goes on from the newest checkpoint, if there is one."""
    run = Run(rank, number, kind, root)
    first = run.load()
    run.train(first, last)
    if save:
        run.save(last)
    return *run.result(), first


@pytest.fixture(scope="module", params=["whole", "shards"])
def uninterrupted(request, two_ranks: Ranks, tmp_path_factory) -> tuple[str, object]:
    """The kind of a run, and the bits of its end."""
    root = tmp_path_factory.mktemp("none") / "none"
    return request.param, bits(two_ranks.run(trained, 2, request.param, root, STEPS))


def bits_of_the_end(results: list) -> tuple[set[int], object]:
    """In which step the processes began, and the bits of a run that began with the first."""
    return {first for *_, first in results}, bits([(*found, 0) for *found, _ in results])


def test_resumed_run_is_the_same_to_the_last_bit(
    two_ranks: Ranks, tmp_path: Path, uninterrupted: tuple[str, object]
) -> None:
    kind, expected = uninterrupted
    # With gram_every=3, the Gram matrix of the step before the checkpoint serves the one after it.
    two_ranks.run(trained, 2, kind, tmp_path, 11, True)
    resumed = two_ranks.run(trained, 2, kind, tmp_path, STEPS)
    assert bits_of_the_end(resumed) == ({11}, expected)
    assert all(own["skipped"] == 1 for _, own, _ in resumed)


@pytest.fixture
def process_group() -> Iterator[None]:
    """A group of this process alone."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def test_run_resumes_in_another_number_of_processes(
    two_ranks: Ranks, four_ranks: Ranks, tmp_path: Path, process_group: None
) -> None:
    expected, *_ = trained(0, 1, "single", tmp_path / "none", STEPS)
    two_ranks.run(trained, 2, "shards", tmp_path / "two", 9, True)
    four_ranks.run(trained, 4, "shards", tmp_path / "four", 9, True)
    resumed = [
        *four_ranks.run(trained, 4, "shards", tmp_path / "two", STEPS),
        *two_ranks.run(trained, 2, "shards", tmp_path / "four", STEPS),
        trained(0, 1, "single", tmp_path / "two", STEPS),  # without fully_shard
    ]
    for parameters, own, first in resumed:
        assert first == 9
        assert own["skipped"] == 1
        assert relative(parameters, expected) < 1e-4


def killed(rank: int, kind: str, root: Path, store: Path, victim: int, moment: float) -> None:
    """Saves two checkpoints, and kills all ranks when the victim has done a part of the third."""
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    patience = timedelta(seconds=30)
    dist.init_process_group(
        "gloo", init_method=f"file://{store}", rank=rank, world_size=2, timeout=patience
    )
    processes = [0, 0]
    dist.all_gather_object(processes, os.getpid())
    run = Run(rank, 2, kind, root)
    first = run.load()
    calls, fatal = 0, math.inf

    def watch(*_: object) -> None:
        nonlocal calls
        calls += 1
        if calls >= fatal:
            os.kill(processes[1 - rank], signal.SIGKILL)
            os.kill(processes[rank], signal.SIGKILL)

    for step in range(first, first + 3):
        run.train(step, step + 1)
        fatal = moment * calls if step == first + 2 else math.inf  # the first save has more calls
        calls = 0
        if rank == victim:
            sys.setprofile(watch)  # it is told of every call of a function, and of its return
        run.save(step + 1)
        sys.setprofile(None)
    fatal = 0
    watch()


def test_killed_while_saving_goes_on_from_the_checkpoint_before(
    two_ranks: Ranks, tmp_path: Path, uninterrupted: tuple[str, object]
) -> None:
    kind, expected = uninterrupted
    root = tmp_path / "checkpoints"
    root.mkdir()
    context = multiprocessing.get_context("forkserver")
    first = 0
    for trial in range(3):
        victim = 0 if kind == "whole" else trial % 2
        settings = kind, root, tmp_path / f"store-{trial}", victim, random.random()
        processes = [
            context.Process(target=killed, args=(rank, *settings), daemon=True) for rank in range(2)
        ]
        for process in processes:
            process.start()
        for process in processes:
            process.join(60)
        assert [process.exitcode for process in processes] == [-signal.SIGKILL] * 2
        began, end = bits_of_the_end(two_ranks.run(trained, 2, kind, root, STEPS))
        assert began <= {first + 2, first + 3}
        (first,) = began
        assert end == expected
