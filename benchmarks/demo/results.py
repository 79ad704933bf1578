"""Runs -> means over seeds, hypervolumes, the accuracy ceiling -> a table and a JSON object."""

from __future__ import annotations

import dataclasses
import math
import statistics
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

from benchmarks.demo.align import BETA
from benchmarks.demo.data import OBJECTIVES, PreferencePair
from benchmarks.demo.experiment import C, Run, Settings
from benchmarks.harness import environment, markdown_table
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
    """Numbers of held-out pairs, and the bound that their conflict puts on any model."""

    pairs: int
    labelled: tuple[int, ...]  # by each objective
    conflicting: int  # on which the two objectives disagree
    accuracy_sum: float  # the highest sum of the two accuracies


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
    measures = [(x, name) for x in ("loss", "margin", "accuracy") for name in OBJECTIVES]
    rows, sums = [], []
    for (method, weight), group in points.items():
        cells = [
            Estimate.of(getattr(run.evaluation[name], measure) for run in group).text(2)
            for measure, name in measures
        ]
        shares = [
            statistics.fmean(getattr(run.training, name) for run in group)
            for name in ("hurting_steps", "conflicting_steps")
        ]
        shown = "-" if weight is None else str(weight)
        rows.append([method, shown, *cells, *(f"{share:.0%}" for share in shares)])
        sums.append(statistics.fmean(sum(x.accuracy for x in r.evaluation.values()) for r in group))
    head = ["method", "w", *(f"{x}, {name}" for x, name in measures), "hurting", "conflict"]
    spread = "mean±standard deviation of" if seeds > 1 else "no spread is known from"
    volumes = [
        f"  {method:12} {Estimate.of(found).text(3)}"
        for method, found in hypervolumes(runs).items()
    ]
    return "\n".join(
        [
            markdown_table(head, rows),
            "",
            f"{spread} {seeds} seed{'s' * (seeds > 1)}; {ceiling.pairs} held-out pairs",
            "w         weight of outcome; short has the rest. MGDA takes no weights: one point",
            "hurting   steps whose combined gradient, before AdamW scales it, raises a loss",
            "conflict  steps on which the objectives' gradients have a negative inner product",
            "",
            "hypervolume of the held-out accuracies, reference point (0, 0):",
            *volumes,
            "",
            f"The objectives disagree on {ceiling.conflicting / ceiling.pairs:.1%} of the held-out "
            f"pairs: no model's accuracies have a sum above {ceiling.accuracy_sum:.3f}.",
            f"The highest mean sum above is {max(sums):.3f}; the base model's is 1.",
        ]
    )


def as_dict(
    runs: Sequence[Run], ceiling: Ceiling, settings: Settings, seconds: float
) -> dict[str, Any]:
    """All runs, and what is needed to repeat and to judge them."""
    volumes = {"of": "1 - accuracy", "reference": REFERENCE, "per_seed": hypervolumes(runs)}
    return {
        "settings": dataclasses.asdict(settings) | {"beta": BETA, "c": C},
        "environment": environment(packages=("transformers", "tokenizers", "aclsum")),
        "seconds": round(seconds, 1),
        "held_out": ceiling._asdict(),
        "hypervolume": volumes,
        "runs": [dataclasses.asdict(run) for run in runs],
    }
