"""The study: every method at every weight, for several seeds, on a small and on a real model."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.alignment import small, smollm2
from benchmarks.alignment.sampling import FINAL, Sizes, Splits
from benchmarks.alignment.training import (
    TRAINED,
    Recipe,
    Trial,
    capability,
    evaluate,
    train,
    trainable,
)
from benchmarks.harness import commit
from raco_optim.alignment import rewarded_soup
from raco_optim.cli.grid import Point, read_records, run_grid

FOLDER = Path("build/alignment")
BETA = 0.1
C = 0.4
WEIGHTED = ("linear", "cagrad", "raco")  # what a file that is cut short should hold first
RADII = (0.2, 0.6, 0.9)

TRIALS: dict[str, Callable[..., Trial]] = {
    "small": small.trial,
    "smollm2": smollm2.trial,
    "gemma3": functools.partial(smollm2.trial, model="gemma3"),
}
OBJECTIVES = {2: ("outcome", "short"), 3: ("approach", "outcome", "short")}
FIVE_WEIGHTS = {
    2: ((0.1, 0.9), (0.3, 0.7), (0.5, 0.5), (0.7, 0.3), (0.9, 0.1)),
    3: (
        (0.1, 0.3, 0.6),
        (0.6, 0.2, 0.2),
        (1 / 3, 1 / 3, 1 / 3),
        (0.2, 0.6, 0.2),
        (0.2, 0.2, 0.6),
    ),
}
THREE_WEIGHTS = {
    2: ((0.2, 0.8), (0.5, 0.5), (0.8, 0.2)),
    3: ((0.6, 0.2, 0.2), (0.2, 0.6, 0.2), (0.2, 0.2, 0.6)),
}


@dataclass(frozen=True)
class Plan:
    """Size of the study on one model.

    Attributes:
        sizes: How much data.
        seeds: Seeds.
        weights: By number of objectives, the weights in their order. The ablation over c uses the
            second.
        lr: Learning rate by method, chosen by `tune.py` on validation papers.
        amopo_beta: beta of AMoPO, chosen likewise.
        radii: Values of c beside `C`, at one weight.
        curve_every: Steps between two measurements on the way, for the methods in `WEIGHTED`.
    """

    sizes: Sizes
    seeds: tuple[int, ...]
    weights: Mapping[int, Sequence[tuple[float, ...]]]
    lr: Mapping[str, float]
    amopo_beta: float
    radii: tuple[float, ...] = ()
    curve_every: int | None = None


_SMALL = Plan(
    sizes=Sizes(
        steps=30,
        batch_size=16,
        held_out=300,
        curve=100,
        texts=300,
        questions=200,
        pretraining_steps=100,
    ),
    seeds=(0, 1, 2, 3, 4),
    weights=FIVE_WEIGHTS,
    lr=dict.fromkeys(TRAINED, 1e-3) | {"mgda": 3e-3},
    amopo_beta=0.5,
    radii=RADII,
    curve_every=3,
)
# What one core does in an hour.
_REAL_CPU = Plan(
    sizes=Sizes(steps=24, batch_size=8, held_out=120, curve=0, texts=50, questions=30),
    seeds=(0, 1),
    weights=THREE_WEIGHTS,
    lr=dict.fromkeys(TRAINED, 2e-3),
    amopo_beta=0.5,
)
_REAL_GPU = dataclasses.replace(
    _REAL_CPU,
    sizes=Sizes(steps=120, batch_size=16, held_out=400, curve=150, texts=300, questions=200),
    seeds=(0, 1, 2, 3, 4),
    weights=FIVE_WEIGHTS,
    radii=RADII,
    curve_every=12,
)


def plan_for(size: str) -> Plan:
    """The plan for a size; on a real model the full grid takes a GPU."""
    if size == "small":
        return _SMALL
    return _REAL_GPU if torch.cuda.is_available() else _REAL_CPU


class Study:
    """Runs points of one model and one set of objectives.

    Args:
        size: One of `TRIALS`.
        objectives: Names of the objectives.
        plan: Size of the study.
        splits: Papers to train and to measure on.
        folder: Where the single-objective models are kept, for the soups.
    """

    def __init__(
        self,
        size: str,
        objectives: Sequence[str],
        plan: Plan,
        splits: Splits = FINAL,
        folder: Path = FOLDER,
    ) -> None:
        self.size, self.objectives, self.plan = size, tuple(objectives), plan
        self.splits, self.folder = splits, folder
        self._trial: tuple[int, Trial] | None = None

    @property
    def settings(self) -> dict[str, Any]:
        """What every run has in common, for the records; not which points there are."""
        plan = dataclasses.asdict(self.plan)
        del plan["seeds"], plan["weights"], plan["radii"]
        return {
            "size": self.size,
            "objectives": list(self.objectives),
            "splits": dataclasses.asdict(self.splits),
            "beta": BETA,
            **plan,
        }

    def points(self) -> list[Point]:
        """All points, the most telling first, so that a study that is cut short is of use."""
        seeds = self.plan.seeds
        return [
            point
            for part in (self._surgery, self._baselines)
            for seed in seeds
            for point in part(seed)
        ]

    def _surgery(self, seed: int) -> Iterator[Point]:
        yield Point("initial", self._equal, seed)
        for w in self._weights:
            yield from (Point(method, w, seed, self._radius(method)) for method in WEIGHTED)
        yield Point("mgda", self._equal, seed)

    def _baselines(self, seed: int) -> Iterator[Point]:
        for name in self.objectives:
            yield self._single(name, seed)
        for method in ("soup", "amopo", "modpo"):
            yield from (Point(method, w, seed) for w in self._weights)
        for c in self.plan.radii:
            weights = self._weights[1]
            yield from (Point(method, weights, seed, c) for method in ("cagrad", "raco"))

    @property
    def _weights(self) -> list[dict[str, float]]:
        return [self._named(values) for values in self.plan.weights[len(self.objectives)]]

    @property
    def _equal(self) -> dict[str, float]:
        return dict.fromkeys(self.objectives, 1 / len(self.objectives))

    def _named(self, values: Sequence[float]) -> dict[str, float]:
        return dict(zip(self.objectives, values, strict=True))

    def _single(self, objective: str, seed: int) -> Point:
        return Point("single", {name: float(name == objective) for name in self.objectives}, seed)

    @staticmethod
    def _radius(method: str) -> float | None:
        return C if method in ("cagrad", "raco") else None

    def trial(self, seed: int) -> Trial:
        """The trial of a seed; the last one is kept."""
        if self._trial is None or self._trial[0] != seed:
            self._trial = None  # two would not fit beside each other on a small machine
            trial = TRIALS[self.size](self.objectives, seed, self.plan.sizes, self.splits)
            self._trial = seed, trial
        return self._trial[1]

    def run(self, point: Point) -> dict[str, Any]:
        """Trains and evaluates at a point: what `run_grid` asks for."""
        trial = self.trial(point.seed)
        training: dict[str, Any] = {"steps": 0, "seconds": 0.0}
        training |= {"hurting_steps": None, "conflicting_steps": None}
        if point.method == "initial":
            policy = trial.new_policy()
        elif point.method == "soup":
            policy = trial.new_policy()
            models = {name: self._single_model(name, point.seed) for name in self.objectives}
            policy.load_state_dict(rewarded_soup(models, dict(point.weights)), strict=False)
        else:
            policy, training = train(trial, self._recipe(point))
            if point.method == "single":
                self._keep(point, trainable(policy))
        scores, delta = evaluate(policy, trial, BETA)
        extra = {"capability": capability(policy, trial), "delta": delta, "commit": commit()}
        return {"evaluation": scores, "training": training, "extra": extra}

    def _recipe(self, point: Point) -> Recipe:
        measured = point.method in WEIGHTED and point.c in (None, C)
        return Recipe(
            method=point.method,
            weights=point.weights,
            lr=self.plan.lr[point.method],
            batch_size=self.plan.sizes.batch_size,
            beta=BETA,
            amopo_beta=self.plan.amopo_beta,
            c=point.c,
            curve_every=self.plan.curve_every if measured else None,
        )

    def _kept(self, point: Point) -> Path:
        (name,) = (name for name, weight in point.weights.items() if weight)
        held_out = self.splits.held_out
        return self.folder / f"{self.size}_{len(self.objectives)}_{held_out}_{name}_{point.seed}.pt"

    def _keep(self, point: Point, state: Mapping[str, Tensor]) -> None:
        path = self._kept(point)
        path.parent.mkdir(parents=True, exist_ok=True)
        state = {name: value.detach().cpu() for name, value in state.items()}
        partial = path.with_suffix(".partial")
        torch.save({"settings": repr(self.settings), "state": state}, partial)
        partial.replace(path)  # whole or not at all

    def _single_model(self, objective: str, seed: int) -> dict[str, Tensor]:
        point = self._single(objective, seed)
        path = self._kept(point)
        kept = torch.load(path) if path.exists() else {"settings": None}
        if kept["settings"] != repr(self.settings):  # another study's, or none
            self._keep(point, trainable(train(self.trial(seed), self._recipe(point))[0]))
            kept = torch.load(path)
        return kept["state"]


def file_for(size: str, m: int, folder: Path = FOLDER) -> Path:
    """Where the records of a size and a number of objectives are."""
    return folder / f"alignment_{size}_{m}.jsonl"


def run(size: str, m: int, plan: Plan, folder: Path = FOLDER) -> list[dict[str, Any]]:
    """Runs what is left of a study and returns all its records."""
    study = Study(size, OBJECTIVES[m], plan, folder=folder)
    path = file_for(size, m, folder)
    run_grid(path, study.points(), study.settings, study.run)
    return read_records(path)
