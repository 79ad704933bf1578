"""Seconds of a training step of every method over those of one backward pass."""

from __future__ import annotations

import json
import statistics
import sys
from collections.abc import Callable
from pathlib import Path

import torch

from benchmarks.harness import environment, interleaved, spread, write_whole
from benchmarks.multitask.data import SETS, Data, Sizes
from benchmarks.multitask.methods import METHODS, Method
from benchmarks.multitask.study import FOLDER
from benchmarks.multitask.training import Recipe, Run

FILE = "timing.json"


def write(folder: Path = FOLDER, *, rounds: int = 30, burst: float = 0.05) -> Path:
    """Times all methods on all sets, equal weights; writes `<folder>/timing.json`."""
    found = {name: times(name, rounds=rounds, burst=burst) for name in SETS}
    path = folder / FILE
    found["environment"] = environment(seed=0, packages=["torchjd"])
    write_whole(path, json.dumps(found, indent=1) + "\n")
    return path


def times(name: str, *, rounds: int, burst: float) -> dict[str, dict[str, float]]:
    """By method: quartiles of the ratio to one backward pass, and the median in seconds."""
    data = SETS[name](0, Sizes())
    steps: dict[str, Callable[[], None]] = {
        "one backward pass": _plain(_run(data, METHODS["linear"]))
    }
    for method in METHODS:
        steps[method] = _run(data, METHODS[method]).step
    seconds = interleaved(steps, repeats=rounds, burst=burst)
    base = seconds["one backward pass"]
    return {
        method: {
            **spread([mine / plain for mine, plain in zip(values, base, strict=True)]),
            "seconds": statistics.median(values),
        }
        for method, values in seconds.items()
    }


def _run(data: Data, method: Method) -> Run:
    m = len(data.tasks)
    parameter = (method.values or (None,))[0]
    return Run(data, method, [1 / m] * m, 0, 1e-3, parameter, Recipe())


def _plain(run: Run) -> Callable[[], None]:
    inner = torch.optim.Adam(run.model.parameters(), lr=1e-3)

    def step() -> None:
        loss = sum(w * loss for w, loss in zip(run.weights, run.batch(), strict=True))
        inner.zero_grad()
        loss.backward()
        inner.step()

    return step


if __name__ == "__main__":
    torch.set_num_threads(1)
    print(write(*map(Path, sys.argv[1:2])))
