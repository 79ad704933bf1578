"""Why no candidate sets c by predicted against actual decrease, as a trust-region method would.

The decrease of the weighted loss that a step brought is known from a second forward pass on the
same batch, which costs time, or from the next batch's loss, which is another batch's. Here both:
what the pass costs, and how the difference between batches compares with the decrease.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from benchmarks.beyond.study import COMPARED
from benchmarks.harness import environment, interleaved, spread
from benchmarks.multitask.data import SETS, Data, Sizes
from benchmarks.multitask.training import Recipe, Run, losses

LR, C, STEPS = 3e-3, 0.4, 300


def measure(seeds: Sequence[int] = (0, 1, 2, 3, 4)) -> dict[str, Any]:
    """By set: standard deviation between batches over mean decrease a step, and the pass's cost.

    CAGrad-Clip with equal weights. ``noise``: one value a seed, over steps of the run. ``cost``:
    seconds of a step with a second forward pass over those of one without.
    """
    found: dict[str, Any] = {}
    for name, draw in SETS.items():
        noise = []
        for seed in seeds:
            run = _run(draw(seed, Sizes()), seed)
            decreases, differences = [], []
            before = _weighted(run, first := _rows(run))
            for _ in range(STEPS):
                _step(run, first)
                after = _weighted(run, first)
                following = _rows(run)
                other = _weighted(run, following)
                decreases.append(before - after)
                differences.append(other - after)
                before, first = other, following
            noise.append(float(np.std(differences) / np.mean(decreases)))
        run = _run(draw(0, Sizes()), 0)

        def plain(run: Run = run) -> None:
            _step(run, _rows(run))

        def with_second_pass(run: Run = run) -> None:
            rows = _rows(run)
            _step(run, rows)
            _weighted(run, rows)

        seconds = interleaved({"plain": plain, "second": with_second_pass}, repeats=40, burst=0.05)
        ratios = [a / b for a, b in zip(seconds["second"], seconds["plain"], strict=True)]
        found[name] = {"noise": noise, "cost": spread(ratios)}
    return {"rows": found, "environment": environment(seed=0)}


def _run(data: Data, seed: int) -> Run:
    m = len(data.tasks)
    return Run(data, COMPARED["raco"], [1 / m] * m, seed, LR, C, Recipe())


def _rows(run: Run) -> torch.Tensor:
    return torch.randint(len(run.data.train.inputs), (run.recipe.batch_size,))


def _losses(run: Run, rows: torch.Tensor) -> list[torch.Tensor]:
    train = run.data.train
    return losses(run.model(train.inputs[rows]), run.data.tasks, [t[rows] for t in train.targets])


def _step(run: Run, rows: torch.Tensor) -> None:
    run.optimizer.zero_grad()
    run.optimizer.backward(_losses(run, rows))
    run.optimizer.step()


@torch.no_grad()
def _weighted(run: Run, rows: torch.Tensor) -> float:
    return sum(w * float(x) for w, x in zip(run.weights, _losses(run, rows), strict=True))
