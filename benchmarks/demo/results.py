"""Runs -> means over seeds, hypervolumes, the accuracy ceiling -> a table and a JSON file."""

from __future__ import annotations

import dataclasses
import json
import math
import statistics
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

from benchmarks.demo.align import BETA
from benchmarks.demo.data import OBJECTIVES, PreferencePair
from benchmarks.demo.experiment import C, Run, Settings
from benchmarks.harness import environment
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

    def text(self, digits: int) -> str:
        """The mean and, if known, the deviation."""
        spread = "" if math.isnan(self.deviation) else f"±{self.deviation:.{digits}f}"
        return f"{self.mean:.{digits}f}{spread}"


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


def by_point(runs: Sequence[Run]) -> dict[tuple[str, float | None], list[Run]]:
    """Groups the runs of all seeds by method and weight, in the order of the runs."""
    points: dict[tuple[str, float | None], list[Run]] = {}
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


def table(runs: Sequence[Run], ceiling: Ceiling) -> str:
    """Everything that was measured, as text: means over seeds, with standard deviations."""
    points = by_point(runs)
    seeds = len({run.seed for run in runs})
    pair = " ".join(f"{name:>9}" for name in OBJECTIVES)
    lines = [
        f"{'':17} {'held-out loss':^19} {'held-out margin':^19} {'held-out accuracy':^19}",
        f"{'method':12} {'w':>4} {pair} {pair} {pair} {'hurting':>8} {'conflict':>8}",
    ]
    for (method, weight), group in points.items():
        cells = [
            Estimate.of(getattr(run.evaluation[name], metric) for run in group).text(2)
            for metric in ("loss", "margin", "accuracy")
            for name in OBJECTIVES
        ]
        lines.append(
            f"{method:12} {'-' if weight is None else weight:>4} "
            + " ".join(f"{cell:>9}" for cell in cells)
            + f" {statistics.fmean(run.training.hurting_steps for run in group):8.0%}"
            + f" {statistics.fmean(run.training.conflicting_steps for run in group):8.0%}"
        )
    spread = "mean±standard deviation of" if seeds > 1 else "no spread is known from"
    lines += [
        "",
        f"{spread} {seeds} seed{'s' * (seeds > 1)}; {ceiling.pairs} held-out pairs",
        "w         weight of outcome; short has the rest. MGDA takes no weights: one point",
        "hurting   steps whose combined gradient, before AdamW scales it, raises a loss",
        "conflict  steps on which the objectives' gradients have a negative inner product",
        "",
        "hypervolume of the held-out accuracies, reference point (0, 0):",
    ]
    for method, volumes in hypervolumes(runs).items():
        size = sum(other == method for other, _ in points)
        lines.append(
            f"  {method:12} {Estimate.of(volumes).text(3)}  {size} point{'s' * (size > 1)}"
        )
    best = max(
        statistics.fmean(sum(run.evaluation[name].accuracy for name in OBJECTIVES) for run in group)
        for group in points.values()
    )
    lines += [
        "",
        f"The objectives disagree on {ceiling.conflicting / ceiling.pairs:.1%} of the held-out "
        f"pairs: no model's accuracies have a sum above {ceiling.accuracy_sum:.3f}.",
        f"The highest mean sum above is {best:.3f}; the base model's is 1.",
    ]
    return "\n".join(lines)


def save(
    path: Path, runs: Sequence[Run], ceiling: Ceiling, settings: Settings, seconds: float
) -> None:
    """Writes all runs, and what is needed to repeat and to judge them, as JSON."""
    record = {
        "settings": dataclasses.asdict(settings) | {"beta": BETA, "c": C},
        "environment": environment(packages=("transformers", "tokenizers", "aclsum")),
        "seconds": round(seconds, 1),
        "held_out": ceiling._asdict(),
        "hypervolume": {
            "of": "1 - accuracy",
            "reference": REFERENCE,
            "per_seed": hypervolumes(runs),
        },
        "runs": [dataclasses.asdict(run) for run in runs],
    }
    path.write_text(json.dumps(record, indent=1) + "\n")
