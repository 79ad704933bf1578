"""The study: settings from a tuning at equal effort, then every method at every weight."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.harness import commit
from benchmarks.studies.multitask.data import SETS, Data, Sizes, constant_losses, constant_scores
from benchmarks.studies.multitask.methods import METHODS
from benchmarks.studies.multitask.training import Recipe, Run, evaluate
from raco_optim.cli.grid import Point, read_records, records_so_far, run_grid

FOLDER = Path("build/multitask")
TUNING_SEED = 100


def _one_heavy(m: int, most: float) -> list[tuple[float, ...]]:
    least = round((1 - most) / (m - 1), 6)
    return [tuple(most if i == j else least for i in range(m)) for j in range(m)]


WEIGHTS: dict[int, list[tuple[float, ...]]] = {
    2: [(0.1, 0.9), (0.3, 0.7), (0.5, 0.5), (0.7, 0.3), (0.9, 0.1)],
    3: [(1 / 3, 1 / 3, 1 / 3), *_one_heavy(3, 0.6), *_one_heavy(3, 0.8)],
    4: [(0.25,) * 4, *_one_heavy(4, 0.7), (0.4, 0.4, 0.1, 0.1), (0.1, 0.1, 0.4, 0.4)],
}
TUNING_WEIGHTS = {
    2: [(0.5, 0.5), (0.2, 0.8)],
    3: [(1 / 3, 1 / 3, 1 / 3), (0.2, 0.2, 0.6)],
    4: [(0.25,) * 4, (0.15, 0.15, 0.15, 0.55)],
}
# Trials of a method without a parameter of its own, and of one with it, for each of two values.
LEARNING_RATES = (1e-3, 1.6e-3, 2.6e-3, 4.3e-3, 7e-3, 1.1e-2, 1.8e-2, 3e-2)
FEWER_LEARNING_RATES = (1e-3, 3e-3, 1e-2, 3e-2)


@dataclass(frozen=True)
class Plan:
    """Size of the study.

    Attributes:
        seeds: Seeds of the study; tuning has its own.
        methods: Names in `METHODS`.
        recipe: How long and how wide a run is.
        sizes: How much data.
    """

    seeds: tuple[int, ...] = (0, 1, 2, 3, 4)
    methods: tuple[str, ...] = tuple(METHODS)
    recipe: Recipe = field(default_factory=Recipe)
    sizes: Sizes = field(default_factory=Sizes)


class Study:
    """Tunes and runs the methods on one set.

    Args:
        name: One of `SETS`.
        plan: Size of the study.
        folder: Where the records are.
    """

    def __init__(self, name: str, plan: Plan, folder: Path = FOLDER) -> None:
        self.name, self.plan = name, plan
        self.path, self.tuning_path = folder / f"{name}.jsonl", folder / f"{name}_tuning.jsonl"
        self._data: tuple[int, Data] | None = None
        self._commit = commit()

    @property
    def settings(self) -> dict[str, Any]:
        """What all runs have in common."""
        return {
            "set": self.name,
            "recipe": dataclasses.asdict(self.plan.recipe),
            "sizes": dataclasses.asdict(self.plan.sizes),
            "tuning_seed": TUNING_SEED,
        }

    def data(self, seed: int) -> Data:
        """The set as a seed splits it; the last one is kept."""
        if self._data is None or self._data[0] != seed:
            self._data = seed, SETS[self.name](seed, self.plan.sizes)
        return self._data[1]

    def run(self) -> list[dict[str, Any]]:
        """Runs what is left and returns all records of the set."""
        records_so_far(self.path, self.settings)  # refused before the tuning takes its time
        chosen = self.tune()
        points = [
            Point(method, weights, seed, chosen[method]["parameter"])
            for seed in self.plan.seeds
            for weights in self._named(WEIGHTS)
            for method in self.plan.methods
        ]
        run_grid(self.path, points, self.settings, lambda point: self.run_point(point, chosen))
        return read_records(self.path)

    def tune(self) -> dict[str, dict[str, float | None]]:
        """Learning rate and own parameter of every method."""
        points = [
            Point(method, weights, TUNING_SEED, value)
            for weights in self._named(TUNING_WEIGHTS)
            for method in self.plan.methods
            for value in METHODS[method].values or (None,)
        ]
        records = run_grid(self.tuning_path, points, self.settings, self._trial)
        return {method: best_trial(records, method) for method in self.plan.methods}

    def _named(self, weights: Mapping[int, Sequence[tuple[float, ...]]]) -> list[dict[str, float]]:
        names = [task.name for task in self.data(self.plan.seeds[0]).tasks]
        return [dict(zip(names, values, strict=True)) for values in weights[len(names)]]

    def _trial(self, point: Point) -> dict[str, Any]:
        """All learning rates at a point; the test set is not looked at."""
        rates = FEWER_LEARNING_RATES if METHODS[point.method].values else LEARNING_RATES
        found = {str(lr): self._trained(point, lr)[1] for lr in rates}
        for training in found.values():
            del training["curve"]
        return {"evaluation": {}, "training": found, "extra": {"commit": self._commit}}

    def run_point(self, point: Point, chosen: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
        """Trains with the settings that tuning chose, and tests."""
        lr = chosen[point.method]["lr"]
        run, training = self._trained(point, lr)
        data = self.data(point.seed)
        constant = [constant_losses(data), constant_scores(data)]
        return {
            "evaluation": evaluate(run.model, data.tasks, data.test),
            "training": {"lr": lr, **training},
            "extra": {"constant": constant, "commit": self._commit},
        }

    def _trained(self, point: Point, lr: float) -> tuple[Run, dict[str, Any]]:
        weights = list(point.weights.values())
        data, method = self.data(point.seed), METHODS[point.method]
        run = Run(data, method, weights, point.seed, lr, point.c, self.plan.recipe)
        return run, run.train()


def best_trial(records: Sequence[Mapping[str, Any]], method: str) -> dict[str, float | None]:
    """The setting with the lowest sum over weights of the weighted validation loss."""
    sums: dict[tuple[float, float | None], float] = {}
    for record in records:
        if record["point"]["method"] == method:
            for lr, training in record["training"].items():
                key = float(lr), record["point"]["c"]
                sums[key] = sums.get(key, 0.0) + training["validation"]
    lr, parameter = min(sums, key=sums.__getitem__)
    return {"lr": lr, "parameter": parameter}
