"""Records of a set -> the measures of the package's docstring with intervals, and a table."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from scipy.stats import rankdata

from benchmarks.harness import UsageError, markdown_table
from benchmarks.studies.estimates import (
    REPLICATES,
    Array,
    Estimate,
    front_distances,
    least_weight,
    multinomial,
    plain,
    text,
)
from benchmarks.studies.multitask.methods import METHODS
from raco_optim.pareto import hypervolume

AGAINST = ("raco", "linear")
# Whether more is better; the rest of the measures are the better the lower.
MEASURES = {
    "mean rank": False,
    "hypervolume, loss": True,
    "hypervolume, error": True,
    "distance, loss": False,
    "distance, error": False,
    "gap": False,
    "least weight": False,
}


class Results:
    """Test losses and scores of a set, and what is derived from them.

    K methods, W weights, S seeds, m tasks, R replicates; the first replicate is the data itself.

    Attributes:
        methods: Names, in the order of the records.
        weights: ``[W, m]``.
        seeds: S seeds, those that have a record of every method at every weights.
        tasks: m names.
        loss: ``[K, W, S, m]``.
        score: ``[K, W, S, m]``.
        relative: By space (loss, error), ``[K, W, S, m]``.
    """

    def __init__(self, records: Sequence[Mapping[str, Any]], replicates: int = REPLICATES) -> None:
        """Collects the records of one set; `UsageError` if no seed is complete."""
        self.tasks = tuple(records[0]["point"]["weights"])
        self.methods = tuple(dict.fromkeys(r["point"]["method"] for r in records))
        found = {self._key(record): record for record in records}
        weights = list(dict.fromkeys(key[1] for key in found))
        self.seeds = tuple(
            seed
            for seed in dict.fromkeys(key[2] for key in found)
            if all((k, w, seed) in found for k in self.methods for w in weights)
        )
        if not self.seeds:
            raise UsageError(
                f"{records[0]['settings']['set']} has no seed with all of {len(self.methods)} "
                f"methods at all of {len(weights)} weights. Run the rest first."
            )
        self.weights = np.array(weights)
        self.records = [
            [[found[k, w, s] for s in self.seeds] for w in weights] for k in self.methods
        ]
        self.loss, self.score = self._tested("loss"), self._tested("score")
        constant = [record["extra"]["constant"] for record in self.records[0][0]]
        self.constant_loss, self.constant_score = np.array(constant).transpose(1, 0, 2)
        self.relative = {
            "loss": self.loss / self.constant_loss,
            "error": (1 - self.score) / (1 - self.constant_score),
        }
        count = len(self.seeds)
        self._draws = multinomial(np.random.default_rng(0), count, replicates) / count

    @staticmethod
    def _key(record: Mapping[str, Any]) -> tuple[str, tuple[float, ...], int]:
        point = record["point"]
        return point["method"], tuple(point["weights"].values()), point["seed"]

    def _each(self, value: Any) -> Array:  # noqa: ANN401  # a function of a record
        return np.array([[[value(r) for r in row] for row in rows] for rows in self.records])

    def _tested(self, name: str) -> Array:
        return self._each(lambda r: [r["evaluation"][task][name] for task in self.tasks])

    def training(self, name: str) -> Array:
        """Mean over weights and seeds of a number of the training, ``[K]``."""
        return self._each(lambda r: r["training"][name]).mean((1, 2))

    def over_seeds(self, values: Array) -> Array:
        """Mean over the drawn seeds: ``[..., S]`` -> ``[..., 1 + R]``."""
        return values @ self._draws.T

    def measures(self) -> dict[str, Array]:
        """Every measure of every method, ``[K, 1 + R]``."""
        ranks = rankdata(self.relative["error"], axis=0).mean((1, 3))
        least = least_weight(self.weights)
        unequal = np.isfinite(least).all(1)
        relative = self.relative["loss"][:, unequal]
        lowest = np.einsum("kwsm,wm->kws", relative, least[unequal]).mean(1)
        return {
            "mean rank": self.over_seeds(ranks),
            **{f"hypervolume, {s}": self.over_seeds(self._volumes(s)) for s in self.relative},
            **{f"distance, {s}": self._distances(s) for s in self.relative},
            "gap": self._gaps(self.loss),
            "least weight": self.over_seeds(lowest),
        }

    def _volumes(self, space: str) -> Array:
        bound = [1.0] * len(self.tasks)
        volumes = [
            [float(hypervolume(of_method[:, s], bound)) for s in range(len(self.seeds))]
            for of_method in self.relative[space]
        ]
        return np.array(volumes)

    def _distances(self, space: str) -> Array:
        points = self.over_seeds(np.moveaxis(self.relative[space], 2, 3))  # [K, W, m, 1 + R]
        K, W, m, R = points.shape
        flat = points.reshape(K * W, m, R)
        found = [front_distances(flat[..., r], flat[..., r]) for r in range(R)]
        return np.stack(found, axis=1).reshape(K, W, R).mean(1)

    def _gaps(self, losses: Array) -> Array:
        """How far `losses` are from the least weighted loss of all methods, ``[K, 1 + R]``."""
        best = self.over_seeds(np.einsum("kwsm,wm->kws", self.loss, self.weights)).min(0)
        means = self.over_seeds(np.einsum("kwsm,wm->kws", losses, self.weights))  # [K, W, 1 + R]
        return (means / best - 1).mean(1)

    def equal_gaps(self) -> Array:
        """The gap if the run at equal weights served all weights, ``[K, 1 + R]``.

        Added when the results were known, to see how much following the weights is worth.
        """
        [equal] = np.flatnonzero(np.isclose(self.weights.min(1), self.weights.max(1)))
        return self._gaps(np.broadcast_to(self.loss[:, [equal]], self.loss.shape))


def summarise(records: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Everything that is told of a set, of its complete seeds."""
    results = Results(records)
    measures = results.measures()
    equal = results.equal_gaps()
    logged = {name: results.training(name) for name in ("conflicting_steps", "steps")}

    def of_method(k: int, method: str) -> dict[str, Any]:
        first = results.records[k][0][0]
        others = [x for x in AGAINST if x in results.methods and x != method]
        return {
            "title": METHODS[method].title,
            "chosen": {"lr": first["training"]["lr"], "parameter": first["point"]["c"]},
            **{name: values[k] for name, values in logged.items()},
            "points": {space: x[k].mean(1) for space, x in results.relative.items()},
            **{name: Estimate.of(values[k]) for name, values in measures.items()},
            "gap of the equal run": Estimate.of(equal[k]),
            "gain of the weights": Estimate.of(equal[k] - measures["gap"][k]),
            "against": {
                other: {
                    name: Estimate.of(values[k] - values[results.methods.index(other)])
                    for name, values in measures.items()
                }
                for other in others
            },
        }

    return plain(
        {
            "settings": records[0]["settings"],
            "tasks": results.tasks,
            "weights": results.weights,
            "seeds": results.seeds,
            "constant_scores": results.constant_score.mean(0),
            "methods": {name: of_method(k, name) for k, name in enumerate(results.methods)},
            "winners": {name: _winners(results, name, x) for name, x in measures.items()},
        }
    )


def _winners(results: Results, name: str, values: Array) -> dict[str, Any]:
    """The best method, and the others of which the data cannot tell it."""
    signed = -values if MEASURES[name] else values
    best = int(signed[:, 0].argmin())
    tied = [
        method
        for k, method in enumerate(results.methods)
        if k != best and Estimate.of(signed[k] - signed[best]).low <= 0
    ]
    return {"best": results.methods[best], "not told apart": tied}


def table(summary: Mapping[str, Any]) -> str:
    """A row a method: its measures, the best ones with a star, and two minus CAGrad-Clip's."""
    shown = ("mean rank", "gap", "hypervolume, loss", "distance, loss", "least weight")
    rows = []
    for method, row in summary["methods"].items():
        stars = {x: " *" * (summary["winners"][x]["best"] == method) for x in shown}
        against = row["against"].get("raco")
        rows.append(
            [
                row["title"],
                *(text(row[name]) + stars[name] for name in shown),
                *(text(against[x], sign=True) if against else "-" for x in shown[:2]),
                f"{row['conflicting_steps']:.0%}",
            ]
        )
    head = ["method", *shown, *(f"{x} minus CAGrad-Clip's" for x in shown[:2]), "in conflict"]
    return markdown_table(head, rows)
