"""A study's records -> everything that its tables say, as one JSON-able dictionary."""

from __future__ import annotations

import dataclasses
import functools
import json
import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from benchmarks.alignment import data, sampling
from benchmarks.alignment.analysis import (
    REPLICATES,
    Array,
    Estimate,
    Grid,
    steps_to_reach,
    weights_text,
    worse_by,
)
from benchmarks.alignment.study import C
from raco_optim.pareto import pareto_front

SPACES = ("accuracy", "loss")
METHODS = ("initial", "single", "soup", "modpo", "amopo", "linear", "mgda", "cagrad", "raco")
CAPABILITIES = ("nats_per_token", "choice_accuracy")
TRAINING = ("hurting_steps", "conflicting_steps", "cosine", "vertex_share", "clip_angle", "seconds")


class Summary:
    """Everything that is derived from the records of one study.

    Args:
        records: The records.
        pairs: The held-out pairs that they were measured on.
        replicates: Of the bootstrap.
    """

    def __init__(
        self,
        records: Sequence[Mapping[str, Any]],
        pairs: Sequence[data.Pair],
        replicates: int = REPLICATES,
    ) -> None:
        self.grid = grid_of(records, pairs, replicates)
        self.pairs, self.objectives = pairs, self.grid.objectives
        self.weights = [key.weights for key in self.grid.keys if key.method == "linear"]
        # The ablation's other radii are no part of what a method offers.
        self.main = self.grid.where(lambda key: key.c in (None, C))
        self.metrics = {space: self.grid.metric(space) for space in SPACES}
        self.distance = {space: self.grid.distances(space, self.main) for space in SPACES}
        self.methods = [m for m in METHODS if any(self.grid.keys[i].method == m for i in self.main)]

    @classmethod
    def of(cls, records: Sequence[Mapping[str, Any]]) -> Summary:
        """From the records alone: the held-out pairs are drawn again as the study drew them.

        Of a study that was cut short, points that some seed lacks are left out, so that methods are
        compared on the same seeds.
        """
        records = complete(records)
        return cls(records, held_out_pairs(records))

    def rows(self, method: str) -> list[int]:
        """Positions of a method's points, those of the ablation left out."""
        return [i for i in self.main if self.grid.keys[i].method == method]

    def at_weights(
        self,
        values: Array,
        method: str,
        c: float = C,
        weights: Sequence[tuple[float, ...]] | None = None,
    ) -> Array:
        """Rows of `values`: what users with `weights`, all of the study's, get from a method."""
        rows = [self.grid.row(method, w, c) for w in weights or self.weights]
        missing = np.full(values.shape[1:], np.nan)
        return np.stack([missing if i is None else values[i] for i in rows])

    @functools.cache  # noqa: B019  # lives as long as the process that asks
    def hypervolume(self, space: str, method: str) -> Array:
        """Hypervolume of a method's points, ``[1 + R]``."""
        return self.grid.hypervolume(self.rows(method), space)

    def weighted(
        self,
        space: str,
        method: str,
        c: float = C,
        weights: Sequence[tuple[float, ...]] | None = None,
    ) -> Array:
        """sum_i w_i of the metric, ``[weights, 1 + R]``."""
        values = self.at_weights(self.metrics[space], method, c, weights)
        return np.einsum("wrm,wm->wr", values, np.array(weights or self.weights))

    def minority(
        self,
        space: str,
        method: str,
        c: float = C,
        weights: Sequence[tuple[float, ...]] | None = None,
    ) -> Array:
        """The metric of the objective with the smallest weight, where one is smaller than others.

        With several of the same smallest weight, their mean; NaN if all weights are equal.
        """
        values = self.at_weights(self.metrics[space], method, c, weights)
        found = []
        for w, value in zip(weights or self.weights, values, strict=True):
            least = [i for i, x in enumerate(w) if x <= min(w) + 1e-9]
            if len(least) < len(w):
                found.append(value[:, least].mean(-1))
        return np.stack(found) if found else np.full_like(values[..., 0], np.nan)

    def tax(self, capability: str, method: str) -> Array:
        """Change against the untrained model, mean over weights, by seed ``[S]``."""
        numbers = self.grid.numbers(("extra", "capability", capability))
        return self.at_weights(numbers, method).mean(0) - numbers[self.grid.row("initial", ())]

    def tax_per_gain(self, method: str) -> float:
        """Nats per token that a tenth of weighted accuracy cost.

        Who moves less pays less: this sets what was paid against what was got for it.
        """
        gain = (self.weighted("accuracy", "initial") - self.weighted("accuracy", method)).mean(0)
        tax = Estimate.over_seeds(self.tax("nats_per_token", method)).value
        return 0.1 * tax / float(gain[0]) if gain[0] > 0 else math.nan

    def point(self, i: int) -> dict[str, Any]:
        """Everything about one point."""
        key = self.grid.keys[i]
        named = zip(self.objectives, range(len(self.objectives)), strict=True)
        scores = {}
        for name, k in named:
            margins = self.grid.numbers(("evaluation", name, "margin"))[i]
            scores[name] = {
                "accuracy": asdict(1 - self.metrics["accuracy"][i, :, k]),
                "loss": asdict(self.metrics["loss"][i, :, k]),
                "margin": mean(margins),
            }
        return {
            **key._asdict(),
            "seeds": int(np.isfinite(self.grid.loss[i, :, 0, 0]).sum()),
            "objectives": scores,
            "distance": {space: asdict(self.distance[space][i]) for space in SPACES},
            "training": {x: mean(self.grid.numbers(("training", x))[i]) for x in TRAINING},
            "capability": {
                x: mean(self.grid.numbers(("extra", "capability", x))[i]) for x in CAPABILITIES
            },
        }

    def method(self, name: str) -> dict[str, Any]:
        """A method's points as a whole."""
        rows = self.rows(name)
        found: dict[str, Any] = {
            "points": len(rows),
            "seeds": int(np.isfinite(self.grid.loss[rows, :, 0, 0]).sum(1).min()),
        }
        found["hypervolume"] = {s: asdict(self.hypervolume(s, name)) for s in SPACES}
        found["distance"] = {
            s: asdict(self.at_weights(self.distance[s], name).mean(0)) for s in SPACES
        }
        found["minus_linear"] = self.differences(name, "linear")
        found["tax"] = {
            x: dataclasses.asdict(Estimate.over_seeds(self.tax(x, name))) for x in CAPABILITIES
        }
        found["tax_per_gain"] = self.tax_per_gain(name)
        found["training"] = {
            x: mean(np.array([mean(self.grid.numbers(("training", x))[i]) for i in rows], float))
            for x in TRAINING
        }
        return found

    def differences(
        self,
        method: str,
        base: str,
        c: float = C,
        weights: Sequence[tuple[float, ...]] | None = None,
    ) -> dict[str, Any]:
        """What users with these weights gain and lose by a method instead of another one."""
        return {
            name: {
                space: asdict(
                    (compute(space, method, c, weights) - compute(space, base, c, weights)).mean(0)
                )
                for space in SPACES
            }
            for name, compute in (("weighted", self.weighted), ("minority", self.minority))
        }

    def clipping(self) -> list[dict[str, Any]]:
        """CAGrad-Clip minus CAGrad: at all weights, and by radius at those of the ablation."""
        found = [{"c": C, "weights": None, **self.differences("raco", "cagrad")}]
        only = self._ablation_weights
        if only is not None:
            for c in sorted({key.c for key in self.grid.keys if key.c is not None}):
                found.append(
                    {"c": c, "weights": only, **self.differences("raco", "cagrad", c, [only])}
                )
        return found

    @property
    def _ablation_weights(self) -> tuple[float, ...] | None:
        others = self.grid.where(lambda key: key.c not in (None, C))
        return self.grid.keys[others[0]].weights if others else None

    def ablation(self) -> list[dict[str, Any]]:
        """CAGrad with and without clipping over c, at the weights where other radii were run."""
        weights = self._ablation_weights
        if weights is None:
            return []
        found = []
        for i, key in enumerate(self.grid.keys):
            if key.weights == weights and key.method in ("linear", "cagrad", "raco"):
                losses = self.metrics["loss"][i] @ np.array(weights)
                accuracy = 1 - self.metrics["accuracy"][i] @ np.array(weights)
                found.append(
                    self.point(i)
                    | {"weighted": {"loss": asdict(losses), "accuracy": asdict(accuracy)}}
                    | {"c": 0.0 if key.method == "linear" else key.c}
                )
        return sorted(found, key=lambda point: (point["method"], point["c"]))

    def reach(self) -> dict[str, Any] | None:
        """How fast CAGrad-Clip and the others go where CAGrad goes; None without curves.

        For the distance to the best-known front in losses and for the weighted loss: steps to 90 %
        of CAGrad's progress, over those of CAGrad, by weights; from the mean of the seeds' curves.
        """
        curves: dict[tuple[str, tuple[float, ...]], list[tuple[int, Array]]] = {}
        for i in self.main:
            key = self.grid.keys[i]
            runs = [
                r["training"].get("curve") for (k, _), r in self.grid.records.items() if k == key
            ]
            if runs and all(runs):
                steps = [step for step, _ in runs[0]]
                losses = np.array([[values for _, values in run] for run in runs]).mean(0)
                curves[key.method, key.weights] = list(zip(steps, losses, strict=True))
        if not curves:
            return None
        ends = np.array([curve[-1][1] for curve in curves.values()])
        front = ends[pareto_front(ends).numpy()]
        found: dict[str, Any] = {}
        for space in ("distance", "weighted_loss"):
            ratios: dict[str, dict[str, float]] = {}
            for w in self.weights:
                lines = {}
                for method in ("linear", "cagrad", "raco"):
                    curve = curves[method, w]
                    values = [
                        worse_by(x[None], front)[0] if space == "distance" else x @ np.array(w)
                        for _, x in curve
                    ]
                    lines[method] = [(s, v) for (s, _), v in zip(curve, values, strict=True)]
                steps = steps_to_reach(lines)
                for method in ("linear", "raco"):
                    ratio = steps[method] / steps["cagrad"]
                    ratios.setdefault(method, {})[weights_text(w)] = round(ratio, 3)
            found[space] = {
                method: values | {"median": statistics.median(values.values())}
                for method, values in ratios.items()
            }
        return found

    def as_dict(self) -> dict[str, Any]:
        """All of it, with what is needed to repeat and to judge it."""
        settings = next(iter(self.grid.records.values()))["settings"]
        return {
            "settings": settings,
            "seeds": self.grid.seeds,
            "commits": sorted({r["extra"]["commit"] for r in self.grid.records.values()}),
            "methods": {name: self.method(name) for name in self.methods},
            "points": [self.point(i) for i in self.main],
            "ablation": self.ablation(),
            "clipping": self.clipping(),
            "steps_to_reach_over_cagrad": self.reach(),
        }


def held_out_pairs(records: Sequence[Mapping[str, Any]]) -> list[data.Pair]:
    """The held-out pairs of a study, drawn again as it drew them."""
    settings = records[0]["settings"]
    splits = sampling.Splits(tuple(settings["splits"]["train"]), settings["splits"]["held_out"])
    count = settings["sizes"]["held_out"]
    return sampling.held_out_pairs(settings["objectives"], count, splits)


def grid_of(
    records: Sequence[Mapping[str, Any]], pairs: Sequence[data.Pair], replicates: int
) -> Grid:
    """The records as arrays, with the labels of the pairs that they were measured on."""
    names = records[0]["settings"]["objectives"]
    signs = np.array([[pair.sign(name) or 0 for name in names] for pair in pairs])
    return Grid(records, signs, [pair.paper for pair in pairs], replicates)


def complete(records: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """Records of the points that all seeds have, in their order."""
    points = [json.dumps({**record["point"], "seed": None}) for record in records]
    seeds = len({record["point"]["seed"] for record in records})
    return [r for r, point in zip(records, points, strict=True) if points.count(point) == seeds]


def asdict(values: Array) -> dict[str, float]:
    """An `Estimate` as a dictionary."""
    return dataclasses.asdict(Estimate.of(values))


def mean(values: Array) -> float | None:
    """Mean of what is known, None if nothing is."""
    known = values[np.isfinite(values)]
    return float(known.mean()) if len(known) else None


def plain(value: Any) -> Any:  # noqa: ANN401  # anything that JSON can hold
    """`value` with floats of six digits, and None for what JSON has no number for."""
    if isinstance(value, float):
        return float(f"{value:.6g}") if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(name): plain(entry) for name, entry in value.items()}
    if isinstance(value, list | tuple):
        return [plain(entry) for entry in value]
    return value
