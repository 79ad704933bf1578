"""Records of a set -> the measures of the package's docstring, with bootstrap replicates."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy.stats import rankdata

from benchmarks.alignment.analysis import worse_by
from benchmarks.harness import UsageError
from raco_optim.pareto import hypervolume, pareto_front

Array = npt.NDArray[np.float64]
REPLICATES = 1000

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
        seeds: S seeds.
        tasks: m names.
        loss: ``[K, W, S, m]``.
        score: ``[K, W, S, m]``.
        relative: By space (loss, error), ``[K, W, S, m]``.
    """

    def __init__(self, records: Sequence[Mapping[str, Any]], replicates: int = REPLICATES) -> None:
        """Collects the records of complete seeds.

        Args:
            records: Records of one set.
            replicates: Number of draws.

        Raises:
            UsageError: No seed has a record of every method at every weights.
        """
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
        self.records = found
        self.weights = np.array(weights)

        def values(name: str) -> Array:
            return np.array(
                [
                    [
                        [
                            [found[k, w, s]["evaluation"][task][name] for task in self.tasks]
                            for s in self.seeds
                        ]
                        for w in weights
                    ]
                    for k in self.methods
                ]
            )

        self.loss, self.score = values("loss"), values("score")
        constant = [found[self.methods[0], weights[0], s]["extra"]["constant"] for s in self.seeds]
        constant_loss, constant_score = np.array(constant).transpose(1, 0, 2)
        self.relative = {
            "loss": self.loss / constant_loss,
            "error": (1 - self.score) / (1 - constant_score),
        }
        count = len(self.seeds)
        draws = np.random.default_rng(0).multinomial(count, [1 / count] * count, replicates)
        self._draws = np.concatenate([np.ones((1, count)), draws]) / count

    @staticmethod
    def _key(record: Mapping[str, Any]) -> tuple[str, tuple[float, ...], int]:
        point = record["point"]
        return point["method"], tuple(point["weights"].values()), point["seed"]

    def over_seeds(self, values: Array) -> Array:
        """Mean over the drawn seeds: ``[..., S]`` -> ``[..., 1 + R]``."""
        return values @ self._draws.T

    def measures(self) -> dict[str, Array]:
        """Every measure of every method, ``[K, 1 + R]``."""
        return {
            "mean rank": self.over_seeds(self._ranks()),
            **{f"hypervolume, {s}": self.over_seeds(self._volumes(s)) for s in self.relative},
            **{f"distance, {s}": self._distances(s) for s in self.relative},
            "gap": self._gaps(),
            "least weight": self.over_seeds(self._least()),
        }

    def _ranks(self) -> Array:
        return rankdata(self.relative["error"], axis=0).mean((1, 3))

    def _volumes(self, space: str) -> Array:
        bound = [1.0] * len(self.tasks)
        values = self.relative[space]
        return np.array(
            [
                [float(hypervolume(values[k, :, s], bound)) for s in range(len(self.seeds))]
                for k in range(len(self.methods))
            ]
        )

    def _distances(self, space: str) -> Array:
        points = self.over_seeds(np.moveaxis(self.relative[space], 2, 3))  # [K, W, m, 1 + R]
        K, W, m, R = points.shape
        found = np.empty((K, R))
        for r in range(R):
            flat = points[..., r].reshape(K * W, m)
            found[:, r] = worse_by(flat, flat[pareto_front(flat).numpy()]).reshape(K, W).mean(1)
        return found

    def _gaps(self) -> Array:
        weighted = np.einsum("kwsm,wm->kws", self.loss, self.weights)
        means = self.over_seeds(weighted)  # [K, W, 1 + R]
        return (means / means.min(0) - 1).mean(1)

    def equal_gaps(self) -> Array:
        """The gap if the run at equal weights served all weights, ``[K, 1 + R]``.

        Added when the results were known, to see how much following the weights is worth.
        """
        weighted = np.einsum("kwsm,wm->kws", self.loss, self.weights)
        best = self.over_seeds(weighted).min(0)
        [equal] = np.flatnonzero(np.isclose(self.weights.min(1), self.weights.max(1)))
        served = np.einsum("ksm,wm->kws", self.loss[:, equal], self.weights)
        return (self.over_seeds(served) / best - 1).mean(1)

    def _least(self) -> Array:
        smallest = np.isclose(self.weights, self.weights.min(1, keepdims=True))
        unequal = ~np.isclose(self.weights.min(1), self.weights.max(1))
        shares = (smallest / smallest.sum(1, keepdims=True))[unequal]
        return np.einsum("kwsm,wm->kws", self.relative["loss"][:, unequal], shares).mean(1)

    def scores(self) -> Array:
        """Score of every task, mean over weights, ``[K, m, 1 + R]``."""
        return self.over_seeds(np.moveaxis(self.score.mean(1), 1, 2))

    def training(self, name: str) -> Array:
        """Mean over weights and seeds of a number of the training, ``[K]``."""
        weights = [tuple(row) for row in self.weights]
        return np.array(
            [
                np.mean(
                    [self.records[k, w, s]["training"][name] for w in weights for s in self.seeds]
                )
                for k in self.methods
            ]
        )
