"""Records of a task -> the measures of `benchmarks.beyond`, differences and verdicts."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from benchmarks.alignment.analysis import Array, steps_to_reach
from benchmarks.alignment.summary import grid_of, held_out_pairs
from benchmarks.beyond.candidates import CANDIDATES
from benchmarks.harness import UsageError
from benchmarks.multitask.analysis import Results
from benchmarks.multitask.training import Recipe

Records = Sequence[Mapping[str, Any]]

LEVEL = 1 - 0.05 / len(CANDIDATES)
REPLICATES = {"set": 5000, "model": 2000}
BETTER_IF_HIGH = ("hypervolume",)
MEASURES = ("distance", "deviation", "hypervolume", "least weight", "hurting")
AGAINST = ("raco", "linear")
LESS = 0.9  # of CAGrad-Clip's distance: "at least 10 % lower"


def of_set(records: Records) -> dict[str, Any]:
    """Everything that the page says of one of the multi-task sets."""
    results = Results(records, REPLICATES["set"])
    found = results.measures()
    names = {
        "distance": "distance, loss",
        "deviation": "gap",
        "hypervolume": "hypervolume, loss",
        "least weight": "least weight",
    }
    measures = {
        method: {name: found[of][k] for name, of in names.items()}
        for k, method in enumerate(results.methods)
    }

    def logs(method: str) -> Array:
        rows = []
        for w in (tuple(row) for row in results.weights):
            curves = [
                {
                    name: _weighted(w, results.records[name, w, seed]["training"])
                    for name in ("raco", method)
                }
                for seed in results.seeds
            ]
            rows.append([_log_ratio(curve, method) for curve in curves])
        return results.over_seeds(np.mean(rows, axis=0))

    return _summary(results.methods, measures, logs, results.seeds)


def of_model(records: Records) -> dict[str, Any]:
    """Everything that the page says of a language model with some objectives.

    The records are of one c a method. One without curves has no steps.
    """
    records = of_complete_seeds(records)
    grid = grid_of(records, held_out_pairs(records), REPLICATES["model"])
    weights = list(dict.fromkeys(key.weights for key in grid.keys))
    methods = list(dict.fromkeys(key.method for key in grid.keys))
    rows = {
        name: [grid.where(lambda key, at=(name, w): key[:2] == at)[0] for w in weights]
        for name in methods
    }
    loss, distance = grid.metric("loss"), grid.distances("loss", range(len(grid.keys)))
    W = np.array(weights)
    weighted = {name: np.einsum("wrm,wm->wr", loss[rows[name]], W) for name in methods}
    least = np.min(list(weighted.values()), axis=0)
    smallest = np.isclose(W, W.min(1, keepdims=True))
    unequal = ~np.isclose(W.min(1), W.max(1))
    shares = (smallest / smallest.sum(1, keepdims=True))[unequal]
    hurting = grid.numbers(("training", "hurting_steps"))
    shape = (*hurting.shape, loss.shape[1])
    hurting_drawn = grid.over_seeds(np.broadcast_to(hurting[..., None], shape))
    measures = {
        name: {
            "distance": distance[rows[name]].mean(0),
            "deviation": (weighted[name] / least - 1).mean(0),
            "hypervolume": grid.hypervolume(rows[name], "loss"),
            "least weight": np.einsum("wrm,wm->wr", loss[rows[name]][unequal], shares).mean(0),
            "hurting": hurting_drawn[rows[name]].mean(0),
        }
        for name in methods
    }

    def logs(method: str) -> Array:
        found = []
        for seed in grid.seeds:
            ratios = []
            for row, base, w in zip(rows[method], rows["raco"], weights, strict=True):
                curves = {
                    name: _curve_of_model(w, grid.records[grid.keys[at], seed]["training"])
                    for name, at in (("raco", base), (method, row))
                }
                if all(curves.values()):
                    ratios.append(_log_ratio(curves, method))
            found.append(np.mean(ratios) if ratios else np.nan)
        values = np.array(found)
        return grid.over_seeds(np.broadcast_to(values[:, None], (len(values), loss.shape[1])))

    return _summary(methods, measures, logs, grid.seeds)


def _summary(
    methods: Sequence[str],
    measures: Mapping[str, Mapping[str, Array]],
    logs: Callable[[str], Array],
    seeds: Sequence[int],
) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for method in methods:
        row: dict[str, Any] = {
            "measures": {name: interval(x, 0.95) for name, x in measures[method].items()},
            "against": {
                other: {
                    name: {
                        **interval(x - measures[other][name], LEVEL),
                        "share": _share(x[0], measures[other][name][0]),
                    }
                    for name, x in measures[method].items()
                }
                for other in AGAINST
                if other != method
            },
        }
        if method != "raco":
            steps = interval(logs(method), LEVEL)
            if np.isfinite(steps["value"]):
                row["steps"] = {name: float(np.exp(x)) for name, x in steps.items()}
            row["reaches"] = reaches(row["against"]["raco"], measures["raco"])
        found[method] = row
    return {"seeds": list(seeds), "methods": found}


def reaches(
    against: Mapping[str, Mapping[str, float]], base: Mapping[str, Array]
) -> dict[str, bool]:
    """Whether a method reaches the target on a task, by what, and whether it is told worse.

    Args:
        against: Differences to CAGrad-Clip with intervals.
        base: CAGrad-Clip's measures.
    """
    lower = {name: against[name]["high"] < 0 for name in ("distance", "deviation")}
    by_distance = (
        lower["distance"] and against["distance"]["value"] <= (LESS - 1) * base["distance"][0]
    )
    by_deviation = lower["deviation"] and against["hypervolume"]["high"] >= 0
    worse = any(against[name]["low"] > 0 for name in ("distance", "deviation"))
    return {
        "by distance": bool(by_distance),
        "by deviation": bool(by_deviation),
        "told worse": bool(worse),
    }


def of_complete_seeds(records: Records) -> list[Mapping[str, Any]]:
    """The records of those seeds that have a run of every method at every weights.

    Raises:
        UsageError: There is none.
    """
    found: dict[int, set[str]] = {}
    for record in records:
        point = record["point"]
        key = repr((point["method"], dict(point["weights"])))
        found.setdefault(point["seed"], set()).add(key)
    every = set().union(*found.values())
    seeds = {seed for seed, points in found.items() if points == every}
    if not seeds:
        raise UsageError("No seed has a run of every method at every weights. Run the rest first.")
    return [record for record in records if record["point"]["seed"] in seeds]


def interval(values: Array, level: float) -> dict[str, float]:
    """A number and the interval of its replicates: ``[1 + R]``, the number first."""
    known = values[1:][np.isfinite(values[1:])]
    if not len(known):
        return {"value": float(values[0]), "low": float("nan"), "high": float("nan")}
    low, high = np.quantile(known, [(1 - level) / 2, (1 + level) / 2])
    return {"value": float(values[0]), "low": float(low), "high": float(high)}


def _share(value: float, base: float) -> float | None:
    return float(value / base - 1) if base else None


def _weighted(w: Sequence[float], training: Mapping[str, Any]) -> list[tuple[int, float]]:
    return [(Recipe.every * i, float(np.dot(w, row))) for i, row in enumerate(training["curve"])]


def _curve_of_model(w: Sequence[float], training: Mapping[str, Any]) -> list[tuple[int, float]]:
    return [(step, float(np.dot(w, losses))) for step, losses in training["curve"]]


def _log_ratio(curves: Mapping[str, list[tuple[int, float]]], method: str) -> float:
    """log of the steps to nine tenths of CAGrad-Clip's progress, over CAGrad-Clip's.

    Progress is that to the best point of its curve. A run that never gets there counts with the
    last step of the longer of the two.
    """
    values = [value for _, value in curves["raco"]]
    cut = {**curves, "raco": curves["raco"][: int(np.argmin(values)) + 1]}
    steps = steps_to_reach({**cut, "target": cut["raco"]}, base="target")
    last = max(curve[-1][0] for curve in curves.values())
    return float(np.log(min(steps[method], last) / steps["target"]))
