"""Seconds of a training step of every method over those of CAGrad-Clip's, in turn."""

from __future__ import annotations

from typing import Any

from benchmarks.beyond.candidates import CANDIDATES
from benchmarks.beyond.study import COMPARED
from benchmarks.harness import environment, interleaved, spread
from benchmarks.multitask.data import SETS, Data, Sizes
from benchmarks.multitask.training import Recipe, Run

CASES = {"papers, 34 k parameters": 32, "papers, 3.6 M parameters": 1440}


def times(*, rounds: int = 40, burst: float = 0.05) -> dict[str, Any]:
    """By network and method: quartiles of the ratio of the seconds of a step."""
    data = SETS["papers"](0, Sizes())
    found: dict[str, Any] = {}
    for title, width in CASES.items():
        steps = {name: _run(data, name, width).step for name in ("raco", *CANDIDATES)}
        seconds = interleaved(steps, repeats=rounds, burst=burst)
        found[title] = {
            name: spread([x / base for x, base in zip(seconds[name], seconds["raco"], strict=True)])
            for name in CANDIDATES
        }
    return {"rows": found, "environment": environment(seed=0)}


def _run(data: Data, name: str, width: int) -> Run:
    recipe = Recipe(width=width)
    run = Run(data, COMPARED[name], [0.2, 0.2, 0.6], 0, 1e-3, 0.4, recipe)
    run.step()  # so that the inner metric has its moments
    return run
