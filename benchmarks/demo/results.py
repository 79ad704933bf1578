"""Runs -> means over seeds, hypervolumes, the accuracy ceiling -> a table and a JSON file."""

from __future__ import annotations

import dataclasses
import json
import math
import platform
import statistics
from collections.abc import Callable, Iterable, Iterator, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import NamedTuple

from benchmarks.demo.align import BETA
from benchmarks.demo.data import OBJECTIVES, PreferencePair
from benchmarks.demo.experiment import C, Run, Settings
from raco_optim.pareto import hypervolume

# Worst errors there are: fixed before any result is known.
REFERENCE = (1.0, 1.0)


class Estimate(NamedTuple):
    """Mean and standard deviation over seeds; the latter is NaN for a single seed."""

    mean: float
    deviation: float

    @classmethod
    def of(cls, values: Iterable[float]) -> Estimate:
        """Estimates from one value per seed."""
        values = list(values)
        spread = statistics.stdev(values) if len(values) > 1 else math.nan
        return cls(statistics.fmean(values), spread)

    def __str__(self) -> str:
        if math.isnan(self.deviation):
            return f"{self.mean:.2f}"
        return f"{self.mean:.2f}±{self.deviation:.2f}"


class Ceiling(NamedTuple):
    """What conflict leaves to any model on the held-out pairs.

    Attributes:
        pairs: Number of pairs.
        labelled: Number of pairs that each objective labels.
        conflicting: Number of pairs on which the two objectives disagree.
        accuracy_sum: The highest sum of the two accuracies.
    """

    pairs: int
    labelled: tuple[int, ...]
    conflicting: int
    accuracy_sum: float


def accuracy_ceiling(pairs: Sequence[PreferencePair]) -> Ceiling:
    """The exact upper bound on the sum of the accuracies of two objectives.

    A model orders a pair one way or the other, so on each of the C pairs in conflict it is wrong
    for one objective. With n_1 and n_2 labelled pairs it loses 1/n_1 or 1/n_2 there, hence

        acc_1 + acc_2 <= 2 - C / max(n_1, n_2),

    reached by siding with the objective that has fewer labels, and right on all other pairs.
    Without ties this is 2 - P(conflict).
    """
    labelled = tuple(sum(pair.signs[i] != 0 for pair in pairs) for i in range(len(OBJECTIVES)))
    conflicting = sum(pair.signs[0] * pair.signs[1] < 0 for pair in pairs)
    return Ceiling(len(pairs), labelled, conflicting, 2 - conflicting / max(labelled))


Key = tuple[str, float | None]


def by_point(runs: Sequence[Run]) -> dict[Key, list[Run]]:
    """Groups the runs of all seeds by method and weight, in the order of the runs."""
    points: dict[Key, list[Run]] = {}
    for run in runs:
        points.setdefault((run.method, run.outcome_weight), []).append(run)
    return points


def hypervolumes(runs: Sequence[Run]) -> dict[str, list[float]]:
    """Area dominated by a method's set of points in held-out errors 1 - accuracy, for each seed.

    The reference point is an error of 1 in both objectives: the unit square has area 1, and the
    base model, right on half of the pairs of either objective, dominates 1/4.
    """
    points: dict[tuple[str, int], list[list[float]]] = {}
    for run in runs:
        errors = [1 - run.evaluation[name].accuracy for name in OBJECTIVES]
        points.setdefault((run.method, run.seed), []).append(errors)
    volumes: dict[str, list[float]] = {}
    for (method, _), errors in points.items():
        volumes.setdefault(method, []).append(hypervolume(errors, REFERENCE).item())
    return volumes


def table(runs: Sequence[Run], ceiling: Ceiling, settings: Settings) -> str:
    """Everything that was measured, as text."""
    return "\n".join(_lines(runs, ceiling, settings))


def _lines(runs: Sequence[Run], ceiling: Ceiling, settings: Settings) -> Iterator[str]:
    seeds = len(settings.seeds)
    yield ""
    yield f"{'':12} {'':4} {'held-out loss':^19} {'held-out margin':^19} {'held-out accuracy':^19}"
    yield (
        f"{'method':12} {'w':4}" + f" {OBJECTIVES[0]:>9} {OBJECTIVES[1]:>9}" * 3
        + f" {'hurting':>8} {'conflict':>8}"
    )
    for (method, weight), group in by_point(runs).items():
        cells = [
            Estimate.of(getattr(run.evaluation[name], metric) for run in group)
            for metric in ("loss", "margin", "accuracy")
            for name in OBJECTIVES
        ]
        hurting = statistics.fmean(run.training.hurting_steps for run in group)
        conflicting = statistics.fmean(run.training.conflicting_steps for run in group)
        label = "-" if weight is None else f"{weight:g}"
        yield (
            f"{method:12} {label:4} "
            + " ".join(f"{cell!s:>9}" for cell in cells)
            + f" {hurting:8.0%} {conflicting:8.0%}"
        )
    yield ""
    yield "w         weight of outcome; short has 1 - w. MGDA takes no weights: one run per seed"
    yield "hurting   steps whose combined gradient, followed downhill, raises an objective's loss"
    yield "conflict  steps on which the gradients of the two objectives have a negative product"
    spread = "mean±standard deviation over" if seeds > 1 else "no spread: only"
    yield f"{spread} {seeds} seed{'s' * (seeds > 1)}, on {ceiling.pairs} held-out pairs"
    yield ""
    yield "hypervolume of the accuracies, reference point (0, 0):"
    for method, volumes in hypervolumes(runs).items():
        points = sum(key[0] == method for key in by_point(runs))
        yield f"  {method:12} {Estimate.of(volumes)}  ({points} point{'s' * (points > 1)})"
    share = ceiling.conflicting / ceiling.pairs
    best = max(
        sum(statistics.fmean(run.evaluation[name].accuracy for run in group) for name in OBJECTIVES)
        for group in by_point(runs).values()
    )
    yield (
        f"{OBJECTIVES[0]} and {OBJECTIVES[1]} disagree on {share:.1%} of the held-out pairs, so no "
        f"model's two accuracies exceed a sum of {ceiling.accuracy_sum:.3f}; the best here: {best:.3f}"
    )


def save(
    path: Path, runs: Sequence[Run], ceiling: Ceiling, settings: Settings, seconds: float
) -> None:
    """Writes all runs, and what is needed to repeat and to judge them, as JSON."""
    packages = ("raco_optim", "torch", "transformers", "tokenizers", "aclsum")
    record = {
        "settings": dataclasses.asdict(settings) | {"beta": BETA, "c": C},
        "versions": {"python": platform.python_version()}
        | {package: version(package) for package in packages[1:]},
        "held_out": ceiling._asdict(),
        "hypervolume": {
            "space": "1 - accuracy",
            "reference": REFERENCE,
            "per_seed": hypervolumes(runs),
        },
        "runs": [dataclasses.asdict(run) for run in runs],
        "seconds": round(seconds, 1),
    }
    path.write_text(json.dumps(record, indent=1) + "\n")
