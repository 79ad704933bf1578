"""The study: every method at every weight, for several seeds, on a small and on a real model."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from benchmarks.harness import commit
from benchmarks.studies.alignment.training import (
    BETA,
    TRAINED,
    Recipe,
    log_ratios,
    nats_per_token,
    train,
    trainable,
)
from benchmarks.studies.alignment.trials import TRIALS, Sizes, Trial
from raco_optim.alignment import rewarded_soup
from raco_optim.cli.grid import Point, read_records, run_grid

FOLDER = Path("build/alignment")
C = 0.4
WEIGHTED = ("linear", "cagrad", "raco")  # a file that is cut short should hold these first
OBJECTIVES = {2: ("outcome", "short"), 3: ("approach", "outcome", "short")}
FIVE_WEIGHTS = {
    2: ((0.1, 0.9), (0.3, 0.7), (0.5, 0.5), (0.7, 0.3), (0.9, 0.1)),
    3: ((0.1, 0.3, 0.6), (0.6, 0.2, 0.2), (1 / 3,) * 3, (0.2, 0.6, 0.2), (0.2, 0.2, 0.6)),
}
THREE_WEIGHTS = {
    2: ((0.2, 0.8), (0.5, 0.5), (0.8, 0.2)),
    3: ((0.6, 0.2, 0.2), (0.2, 0.6, 0.2), (0.2, 0.2, 0.6)),
}


@dataclass(frozen=True)
class Plan:
    """Size of the study on one model.

    The learning rates, and beta of AMoPO, have the largest hypervolume of the accuracies on
    validation papers, one seed of its own, among 0.0003, 0.001 and 0.003 (small) or 0.0005 and
    0.002 (SmolLM2), and 0.1, 0.5 and 1.5.

    """

    sizes: Sizes
    seeds: tuple[int, ...]
    weights: Mapping[int, Sequence[tuple[float, ...]]]  # by number of objectives
    lr: Mapping[str, float]  # by method
    amopo_beta: float = 0.5
    radii: tuple[float, ...] = ()  # values of c beside `C`, at the second weights


_SMALL = Plan(
    sizes=Sizes(steps=30, batch_size=16, held_out=300, texts=300, pretraining_steps=100),
    seeds=(0, 1, 2, 3, 4),
    weights=FIVE_WEIGHTS,
    lr=dict.fromkeys(TRAINED, 1e-3) | {"mgda": 3e-3},
    radii=(0.2, 0.6, 0.9),
)
# What one core does in an hour.
_REAL_CPU = Plan(
    sizes=Sizes(steps=24, batch_size=8, held_out=120, texts=50),
    seeds=(0, 1),
    weights=THREE_WEIGHTS,
    lr=dict.fromkeys(TRAINED, 2e-3),
)
_REAL_GPU = dataclasses.replace(
    _SMALL, sizes=Sizes(steps=120, batch_size=16, held_out=400, texts=300), lr=_REAL_CPU.lr
)


def plan_for(size: str) -> Plan:
    """The plan for a size; on a real model the full grid takes a GPU."""
    if size == "small":
        return _SMALL
    return _REAL_GPU if torch.cuda.is_available() else _REAL_CPU


class Study:
    """Runs points of one model, of `TRIALS`, and one set of objectives."""

    def __init__(self, size: str, objectives: Sequence[str], plan: Plan) -> None:
        self.size, self.objectives, self.plan = size, tuple(objectives), plan
        self._trial: tuple[int, Trial] | None = None
        self._singles: dict[str, dict[str, Tensor]] = {}

    @property
    def settings(self) -> dict[str, Any]:
        """What every run has in common, for the records; not which points there are."""
        plan = dataclasses.asdict(self.plan)
        del plan["seeds"], plan["weights"], plan["radii"]
        return {"size": self.size, "objectives": list(self.objectives), "beta": BETA, **plan}

    def points(self) -> list[Point]:
        """All points, the most telling first, so that a study that is cut short is of use."""
        return [
            point
            for part in (self._surgery, self._baselines)
            for seed in self.plan.seeds
            for point in part(seed)
        ]

    def _surgery(self, seed: int) -> Iterator[Point]:
        equal = dict.fromkeys(self.objectives, 1 / len(self.objectives))
        yield Point("initial", equal, seed)
        for w in self._weights:
            for method in WEIGHTED:
                yield Point(method, w, seed, None if method == "linear" else C)
        yield Point("mgda", equal, seed)

    def _baselines(self, seed: int) -> Iterator[Point]:
        for name in self.objectives:
            yield self._single(name, seed)
        for method in ("soup", "amopo", "modpo"):
            yield from (Point(method, w, seed) for w in self._weights)
        for c in self.plan.radii:
            yield from (Point(method, self._weights[1], seed, c) for method in ("cagrad", "raco"))

    @property
    def _weights(self) -> list[dict[str, float]]:
        known = self.plan.weights[len(self.objectives)]
        return [dict(zip(self.objectives, values, strict=True)) for values in known]

    def _single(self, objective: str, seed: int) -> Point:
        return Point("single", {name: float(name == objective) for name in self.objectives}, seed)

    def trial(self, seed: int) -> Trial:
        """The trial of a seed; the last one is kept."""
        if self._trial is None or self._trial[0] != seed:
            self._trial = None  # two would not fit beside each other on a small machine
            self._singles.clear()
            self._trial = seed, TRIALS[self.size](self.objectives, seed, self.plan.sizes)
        return self._trial[1]

    def run(self, point: Point) -> dict[str, Any]:
        """Trains and evaluates at a point: what `run_grid` asks for."""
        trial, training = self.trial(point.seed), {}
        if point.method in ("initial", "soup"):
            policy = trial.new_policy()
            if point.method == "soup":
                models = {name: self._single_model(name, point.seed) for name in self.objectives}
                policy.load_state_dict(rewarded_soup(models, dict(point.weights)), strict=False)
        else:
            policy, training = train(trial, self._recipe(point))
            if point.method == "single":
                self._keep(policy, point)
        extra = {
            "delta": log_ratios(policy, trial),
            "nats_per_token": nats_per_token(policy, trial),
        }
        return {"evaluation": {}, "training": training, "extra": extra | {"commit": commit()}}

    def _recipe(self, point: Point) -> Recipe:
        lr, batch_size = self.plan.lr[point.method], self.plan.sizes.batch_size
        beta = self.plan.amopo_beta
        return Recipe(point.method, point.weights, lr, batch_size, beta, point.c)

    def _single_model(self, objective: str, seed: int) -> dict[str, Tensor]:
        """What the model of one objective has learned, for the soups; trained once a seed."""
        if objective not in self._singles:
            point = self._single(objective, seed)
            self._keep(train(self.trial(seed), self._recipe(point))[0], point)
        return self._singles[objective]

    def _keep(self, policy: PreTrainedModel, point: Point) -> None:
        (objective,) = (name for name, weight in point.weights.items() if weight)
        self._singles[objective] = {k: p.detach() for k, p in trainable(policy).items()}


def run(size: str, m: int, plan: Plan, folder: Path = FOLDER) -> list[dict[str, Any]]:
    """Runs what is left of a study and returns all its records."""
    study = Study(size, OBJECTIVES[m], plan)
    path = folder / f"{size}_{m}.jsonl"
    run_grid(path, study.points(), study.settings, study.run)
    return read_records(path)
