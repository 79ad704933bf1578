"""The runs: sets, language models, many losses; what others have run before is taken over."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.alignment import study as llm
from benchmarks.alignment.sampling import FINAL, TUNING, Splits
from benchmarks.alignment.training import Recipe
from benchmarks.alignment.tune import plan_of
from benchmarks.beyond.candidates import BASELINES, CANDIDATES, RADII, TITLES, candidate
from benchmarks.harness import RESULTS
from benchmarks.multitask.data import SETS
from benchmarks.multitask.methods import METHODS, Method
from benchmarks.multitask.study import FOLDER as SETS_FOLDER
from benchmarks.multitask.study import WEIGHTS, Plan, Study
from raco_optim.cli.grid import Point, point_key, read_records, records_so_far, run_grid

FOLDER = RESULTS / "beyond"
SEEDS = tuple(range(5))  # of the sets
TUNING_SEEDS = (100, 101)  # of the language models
MODEL_SEEDS = {"small": tuple(range(9)), "smollm2": (0, 1, 2)}
SMALLER_RADII = (0.05, 0.1, 0.2)
FRONT_SEEDS = (0, 1, 2, 3, 4)
TUNING_WEIGHTS = ((0.1, 0.9), (0.5, 0.5), (0.9, 0.1))

_AS_METHODS = {
    name: Method(
        TITLES[name],
        lambda inner, w, shared, c, name=name: candidate(name, inner, w, c, shared),
        parameter="c",
        values=RADII,
    )
    for name in CANDIDATES
}
COMPARED: dict[str, Method] = {**{name: METHODS[name] for name in BASELINES}, **_AS_METHODS}

# The two with the least deviation on the small model (mean of two and three objectives, seeds 0 to
# 4), and the candidate that is judged on what had not been seen.
FINALISTS = ("budget", "conflict", "persistent")
METHODS_OF = {"small": tuple(COMPARED), "smollm2": (*BASELINES, *FINALISTS)}


class SetStudy(Study):
    """The candidates on one of the multi-task sets; the tuning of the others is taken over."""

    def __init__(
        self,
        name: str,
        folder: Path = FOLDER,
        seeds: Sequence[int] = SEEDS,
        methods: Sequence[str] = tuple(COMPARED),
    ) -> None:
        tuned = tuple(name for name in CANDIDATES if name in methods)
        super().__init__(name, Plan(seeds=tuple(seeds), methods=tuned), folder, COMPARED)
        self._methods = tuple(methods)
        self._before = Study(name, Plan(methods=BASELINES))

    def tune(self) -> dict[str, dict[str, float | None]]:
        """Learning rate and radius of every method."""
        return self._before.tune() | super().tune()

    def run(self) -> list[dict[str, Any]]:
        """Runs what is left and returns the records of all methods."""
        records_so_far(self.path, self.settings)  # before tuning takes its time
        chosen = self.tune()
        known = _known(self.name)
        done = {(r["point"]["method"], r["point"]["seed"]) for r in known}
        points = [
            Point(method, weights, seed, chosen[method]["parameter"])
            for seed in self.plan.seeds
            for weights in self._named(WEIGHTS)
            for method in self._methods
            if (method, seed) not in done
        ]
        run_grid(self.path, points, self.settings, lambda point: self.run_point(point, chosen))
        return known + read_records(self.path)


class ModelStudy(llm.Study):
    """Methods on preferences, with a language model.

    Args:
        size: ``"small"`` or ``"smollm2"``.
        m: Number of objectives.
        methods: Names in `COMPARED`.
        radii: c by method, of those that have one; several are run one after the other.
        plan: Size of the study.
        splits: The papers.
    """

    def __init__(
        self,
        size: str,
        m: int,
        methods: Sequence[str],
        radii: Mapping[str, Sequence[float]],
        plan: llm.Plan,
        splits: Splits = FINAL,
    ) -> None:
        super().__init__(size, llm.OBJECTIVES[m], plan, splits)
        self._methods, self._radii = tuple(methods), dict(radii)

    def points(self) -> list[Point]:
        """All points, seeds changing slowest."""
        return [
            Point(method, weights, seed, c)
            for seed in self.plan.seeds
            for weights in self._weights
            for method in self._methods
            for c in self._radii.get(method, (None,))
        ]

    def _recipe(self, point: Point) -> Recipe:
        as_raco = super()._recipe(dataclasses.replace(point, method="raco"))
        return dataclasses.replace(as_raco, method=point.method, curve_every=self.plan.curve_every)


def tune_models(folder: Path = FOLDER) -> dict[str, tuple[float]]:
    """c of every method, chosen on validation papers with the small model and two objectives."""
    radii = {name: RADII for name in COMPARED if name != "linear"}
    plan = dataclasses.replace(
        plan_of("small", 1e-3, 0.5), seeds=TUNING_SEEDS, weights={2: TUNING_WEIGHTS}
    )
    study = ModelStudy("small", 2, tuple(radii), radii, plan, TUNING)
    path = folder / "small_2_tuning.jsonl"
    records = run_grid(path, study.points(), study.settings, study.run)
    sums: dict[tuple[str, float], float] = {}
    for record in records:
        point = record["point"]
        key = point["method"], point["c"]
        losses = {name: scores["loss"] for name, scores in record["evaluation"].items()}
        sums[key] = sums.get(key, 0.0) + sum(w * losses[k] for k, w in point["weights"].items())
    return {name: (min(RADII, key=lambda c: sums[name, c]),) for name in radii}


def run_models(
    size: str,
    m: int,
    folder: Path = FOLDER,
    seeds: Sequence[int] | None = None,
    methods: Sequence[str] | None = None,
) -> list[dict[str, Any]]:
    """Runs what is left of a size and a number of objectives; returns all methods' records."""
    radii = tune_models(folder)
    seeds = MODEL_SEEDS[size] if seeds is None else tuple(seeds)
    plan = dataclasses.replace(llm.plan_for(size), seeds=seeds)
    study = ModelStudy(size, m, methods or METHODS_OF[size], radii, plan)
    wanted = {point_key(vars(point)) for point in study.points()}
    before = read_records(llm.file_for(size, m, RESULTS))
    known = [record for record in before if point_key(record["point"]) in wanted]
    done = {point_key(record["point"]) for record in known}
    left = [point for point in study.points() if point_key(vars(point)) not in done]
    path = folder / f"{size}_{m}.jsonl"
    return known + run_grid(path, left, study.settings, study.run)


def run_radii(folder: Path = FOLDER, seeds: Sequence[int] = FRONT_SEEDS) -> None:
    """CAGrad-Clip with smaller radii, small model: is a candidate more than a smaller c?"""
    for m in (2, 3):
        plan = dataclasses.replace(llm.plan_for("small"), seeds=tuple(seeds), curve_every=None)
        model = ModelStudy("small", m, ("raco",), {"raco": SMALLER_RADII}, plan)
        path = folder / f"small_{m}_radii.jsonl"
        run_grid(path, model.points(), model.settings, model.run)


def set_records(name: str, folder: Path = FOLDER) -> list[dict[str, Any]]:
    """All records of a set, those of the baselines from the study before."""
    return _known(name) + read_records(folder / f"{name}.jsonl")


def model_records(size: str, m: int, folder: Path = FOLDER) -> list[dict[str, Any]]:
    """All records of a language model and a number of objectives, at the chosen radii."""
    radii = tune_models(folder)
    records = [
        *read_records(llm.file_for(size, m, RESULTS)),
        *read_records(folder / f"{size}_{m}.jsonl"),
    ]
    return [
        record
        for record in records
        if (point := record["point"])["method"] in COMPARED
        and point["c"] in radii.get(point["method"], (None,))
    ]


def chosen(folder: Path = FOLDER) -> dict[str, dict[str, dict[str, float | None]]]:
    """Learning rate and c of every method, by task."""
    found = {
        name: {
            method: {"lr": setting["lr"], "c": setting["parameter"]}
            for method, setting in SetStudy(name, folder).tune().items()
        }
        for name in SETS
    }
    radii = tune_models(folder)
    for size, title in (("small", "small"), ("smollm2", "SmolLM2")):
        lr = llm.plan_for(size).lr["raco"]
        found[title] = {
            name: {"lr": lr, "c": radii[name][0] if name in radii else None} for name in COMPARED
        }
    return found


def _known(name: str) -> list[dict[str, Any]]:
    records = read_records(SETS_FOLDER / f"{name}.jsonl")
    return [record for record in records if record["point"]["method"] in BASELINES]


def run_fronts(folder: Path = FOLDER, seeds: Sequence[int] = FRONT_SEEDS) -> None:
    """The weighted sum alone at many weights of two losses: the curve that weights can reach."""
    weights = [(round(w, 2), round(1 - w, 2)) for w in np.linspace(0.05, 0.95, 19)]
    digits = SetStudy("digits", folder)
    names = [task.name for task in digits.data(0).tasks]
    chosen = digits.tune()
    points = [Point("linear", dict(zip(names, w, strict=True)), s) for s in seeds for w in weights]
    path = folder / "digits_front.jsonl"
    run_grid(path, points, digits.settings, lambda point: digits.run_point(point, chosen))
    between = [(0.2, 0.8), (0.4, 0.6), (0.6, 0.4), (0.8, 0.2)]  # those of the study
    plan = dataclasses.replace(llm.plan_for("small"), seeds=tuple(seeds), weights={2: between})
    model = ModelStudy("small", 2, ("linear",), {}, dataclasses.replace(plan, curve_every=None))
    run_grid(folder / "small_2_front.jsonl", model.points(), model.settings, model.run)
