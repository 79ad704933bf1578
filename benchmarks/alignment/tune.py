"""Chooses the learning rate of each method on validation papers, before any test paper is seen.

The same budget for every method: each learning rate of a fixed grid, at the same weights and seeds
(which the study does not use). AMoPO, whose beta has another unit than that of DPO, gets each beta
of a grid in addition. Single-objective DPO is weighted DPO with all weight on one objective and
takes its rate. What counts is the hypervolume of the accuracies of a method's points, the front
that it offers, mean over seeds: it does not ask which of the points a user would take.
"""

from __future__ import annotations

import argparse
import dataclasses
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.alignment.sampling import TUNING
from benchmarks.alignment.study import FOLDER, OBJECTIVES, Plan, Study, plan_for
from benchmarks.alignment.training import TRAINED
from benchmarks.harness import environment, write_results
from raco_optim.cli.grid import run_grid
from raco_optim.pareto import hypervolume

LRS = {"small": (3e-4, 1e-3, 3e-3), "smollm2": (5e-4, 2e-3)}
BETAS = {"small": (0.1, 0.5, 1.5), "smollm2": (0.5, 1.5)}
SEEDS = {"small": (100,), "smollm2": (100,)}
TUNED = tuple(method for method in TRAINED if method != "single")
WEIGHTS = {"small": ((0.1, 0.9), (0.5, 0.5), (0.9, 0.1)), "smollm2": ((0.5, 0.5),)}


def plan_of(size: str, lr: float, beta: float) -> Plan:
    """The study's plan with one learning rate for all, at the weights and seeds of the tuning."""
    plan = plan_for(size)
    sizes = dataclasses.replace(plan.sizes, texts=16, questions=4)
    return dataclasses.replace(
        plan,
        sizes=sizes,
        seeds=SEEDS[size],
        weights={2: WEIGHTS[size]},
        lr=dict.fromkeys(TRAINED, lr),
        amopo_beta=beta,
        radii=(),
        curve_every=None,
    )


def score(records: Sequence[dict[str, Any]]) -> float:
    """Hypervolume of the accuracies of one seed's points, mean over seeds."""
    seeds: dict[int, list[list[float]]] = {}
    for record in records:
        errors = [1 - scores["accuracy"] for scores in record["evaluation"].values()]
        seeds.setdefault(record["point"]["seed"], []).append(errors)
    return statistics.fmean(hypervolume(e, [1.0] * len(e[0])).item() for e in seeds.values())


def tune(size: str, folder: Path = FOLDER) -> dict[str, Any]:
    """Runs the grid (what is left of it) and chooses.

    Returns:
        ``scores``: method -> "lr" or "lr, beta" -> score; ``chosen``: method -> the best of them.
    """
    records: dict[str, dict[str, list[Any]]] = {method: {} for method in TUNED}
    for lr in LRS[size]:
        for beta in BETAS[size]:
            study = Study(size, OBJECTIVES[2], plan_of(size, lr, beta), TUNING, folder)
            first = beta == BETAS[size][0]  # beta concerns AMoPO alone
            points = [
                point
                for point in study.points()
                if point.method == "amopo" or (first and point.method in TUNED)
            ]
            path = folder / f"tuning_{size}_{lr:g}_{beta:g}.jsonl"
            for point, record in zip(
                points, run_grid(path, points, study.settings, study.run), strict=True
            ):
                key = f"{lr:g}, {beta:g}" if point.method == "amopo" else f"{lr:g}"
                records[point.method].setdefault(key, []).append(record)
    scores = {m: {key: score(rs) for key, rs in found.items()} for m, found in records.items()}
    return {
        "of": "hypervolume of held-out accuracies on validation papers, reference (0, 0)",
        "weights": WEIGHTS[size],
        "seeds": SEEDS[size],
        "scores": scores,
        "chosen": {method: max(found, key=found.__getitem__) for method, found in scores.items()},
    }


def main(arguments: Sequence[str] | None = None) -> None:
    """Tunes one size, prints the scores and writes them to benchmarks/results."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.alignment.tune")
    parser.add_argument("--size", choices=LRS, default="small")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    found = tune(options.size)
    print(found)
    found["environment"] = environment(packages=("transformers", "peft", "aclsum"))
    print(write_results(f"alignment_tuning_{options.size}", found))


if __name__ == "__main__":
    main()
