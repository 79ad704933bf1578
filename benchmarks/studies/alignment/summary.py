"""Records of a study -> measures with intervals, what became of the claims, a table, a picture.

Every measure has a 95 % interval from a bootstrap of two levels: seeds are drawn with replacement,
and so are the held-out papers (the pairs of one paper are not independent). All methods share the
draws, so that differences are paired. The intervals say how much the numbers would move with other
seeds and papers, given this model, data set and settings; with two seeds the first part is known
badly. Nats per token are known as one number a run, and have a t interval over seeds.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib
import numpy as np
from matplotlib.figure import Figure

from benchmarks import style
from benchmarks.harness import markdown_table
from benchmarks.studies.alignment.pairs import Pair, held_out_pairs
from benchmarks.studies.alignment.study import C
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
from benchmarks.style import GREY, INK, STYLE
from raco_optim.pareto import hypervolume

# By space the worst corner, fixed before any result was known. Errors are at most 1; the reference
# model's loss is log 2, and a model that loses twice that on an objective contributes nothing.
WORST = {"accuracy": 1.0, "loss": 2 * math.log(2)}
WITHOUT_WEIGHTS = ("mgda", "initial")  # one run a seed serves all weights
BASES = ("linear", "single")  # with which all methods are compared
CLAIM = ("whose", "claim", "difference", "verdict")
TITLES = {
    "initial": "untrained",
    "single": "single-objective DPO",
    "soup": "rewarded soup",
    "modpo": "MODPO",
    "amopo": "AMoPO",
    "linear": "weighted DPO",
    "mgda": "MGDA",
    "cagrad": "CAGrad",
    "raco": "CAGrad-Clip (RACO)",
}
STYLES = {
    **style.METHODS,
    "amopo": {"color": "#D55E00", "marker": "v", "markersize": 5},
    "modpo": {"color": "#56B4E9", "marker": "X", "markersize": 5},
    "soup": {"color": GREY, "marker": "o", "markersize": 4, "linestyle": ":"},
    "single": {"color": INK, "marker": "*", "markersize": 9, "linestyle": ""},
}
# Whose claim, its numbers there, a method and the one it is said to beat, by which measure. "The
# summary" is a third party's text about the paper; its scores are those of other language models,
# so that only their order can be tested.
CLAIMS = (
    ("paper, Figures 2 to 4", "better fronts", "raco", "linear", "hypervolume accuracy"),
    ("summary", "distance 0.18 against 0.41", "raco", "linear", "distance accuracy"),
    ("summary", "distance 0.18 against 0.32", "raco", "modpo", "distance accuracy"),
    ("summary", "distance 0.18 against 0.28", "raco", "amopo", "distance accuracy"),
    ("summary", "distance 0.18 against 0.36", "raco", "mgda", "distance accuracy"),
    ("summary", "distance 0.18 against 0.27", "raco", "cagrad", "distance accuracy"),
    ("summary", "distance 0.27 against 0.41", "cagrad", "linear", "distance accuracy"),
    ("summary", "7.6 and 7.9 against 6.8 and 7.2", "raco", "linear", "accuracies"),
    ("summary", "7.6 and 7.9 against 7.3 and 7.6", "raco", "amopo", "accuracies"),
    ("summary", "7.6 and 7.9 against 7.4 and 7.5", "raco", "cagrad", "accuracies"),
    ("summary", "tax 3.5 % against 8.3 %", "linear", "single", "nats per token"),
    ("summary", "tax 1.4 % against 8.3 %", "raco", "single", "nats per token"),
    ("summary", "tax 1.4 % against 3.5 %", "raco", "linear", "nats per token"),
    ("summary", "tax 1.4 % against 2.6 %", "raco", "amopo", "nats per token"),
)


class Key(NamedTuple):
    """A point of the grid but for its seed."""

    method: str
    weights: tuple[float, ...]
    c: float | None


class Results:
    """Records of one study as arrays, and what is derived from them.

    K keys, S seeds, 1 + R draws of papers (the first: every paper once), m objectives. Points that
    some seed lacks are left out, so that methods are compared on the same seeds. The held-out pairs
    are drawn again if they are not given.
    """

    def __init__(
        self,
        records: Sequence[Mapping[str, Any]],
        pairs: Sequence[Pair] | None = None,
        replicates: int = REPLICATES,
    ) -> None:
        found = {(_key(r), r["point"]["seed"]): r for r in records}
        self.seeds = sorted({seed for _, seed in found})
        keys = dict.fromkeys(key for key, _ in found)
        self.keys = [key for key in keys if all((key, seed) in found for seed in self.seeds)]
        self.records = [[found[key, seed] for seed in self.seeds] for key in self.keys]
        self.settings: Mapping[str, Any] = records[0]["settings"]
        self.objectives = tuple(self.settings["objectives"])
        self.methods = [m for m in TITLES if any(key.method == m for key in self.keys)]
        self.weights = [key.weights for key in self.keys if key.method == "linear"]
        # The ablation's other radii are no part of what a method offers.
        self.main = [i for i, key in enumerate(self.keys) if key.c in (None, C)]

        if pairs is None:
            pairs = held_out_pairs(self.objectives, self.settings["sizes"]["held_out"])
        generator = np.random.default_rng(0)
        names, paper = np.unique([pair.paper for pair in pairs], return_inverse=True)
        counts = multinomial(generator, len(names), replicates)[:, paper]  # [1 + R, n]
        self._seed_draws = multinomial(generator, len(self.seeds), replicates)  # [1 + R, S]
        signs = np.array([[pair.sign(name) for name in self.objectives] for pair in pairs])
        labelled = counts @ (signs != 0)
        shape = (len(self.keys), len(self.seeds), 1 + replicates, len(self.objectives))
        # Costs, less is better: 1 - accuracy, and the DPO loss.
        self.costs = {"accuracy": np.empty(shape), "loss": np.empty(shape)}
        for i, row in enumerate(self.records):
            for s, record in enumerate(row):
                delta = np.asarray(record["extra"]["delta"])[:, None]
                margin = self.settings["beta"] * signs * delta
                wrong = np.where(signs != 0, (1 - np.sign(margin)) / 2, 0)
                loss = np.where(signs != 0, np.logaddexp(0, -margin), 0)
                with np.errstate(invalid="ignore"):  # a draw may miss all pairs of an objective
                    self.costs["accuracy"][i, s] = counts @ wrong / labelled
                    self.costs["loss"][i, s] = counts @ loss / labelled
        self.means = {space: self._over_seeds(x) for space, x in self.costs.items()}
        self.distances = {space: self._distances(x) for space, x in self.means.items()}
        self.nats = np.array([[r["extra"]["nats_per_token"] for r in x] for x in self.records])

    def _over_seeds(self, values: Array) -> Array:
        """Means over the drawn seeds: ``[K, S, 1 + R, ...]`` -> ``[K, 1 + R, ...]``."""
        return np.einsum("ksr...,rs->kr...", values, self._seed_draws) / len(self.seeds)

    def _distances(self, means: Array) -> Array:
        found = np.full(means.shape[:2], np.nan)
        for r in range(means.shape[1]):
            if np.isfinite(means[self.main, r]).all():
                found[:, r] = front_distances(means[:, r], means[self.main, r])
        return found

    def row(self, method: str, weights: tuple[float, ...], c: float = C) -> int:
        """Position of the run that a user with these weights gets from a method.

        It is the run with these weights; of a method that takes none, its only run; and of the
        single-objective models the one for the objective with the largest weight.
        """
        if method == "single":
            weights = tuple(float(i == np.argmax(weights)) for i in range(len(weights)))
        [found] = [
            i
            for i, key in enumerate(self.keys)
            if key.method == method
            and key.c in (c, None)
            and (key.weights == weights or method in WITHOUT_WEIGHTS)
        ]
        return found

    def measures(
        self, method: str, c: float = C, weights: Sequence[tuple[float, ...]] | None = None
    ) -> dict[str, Array]:
        """What users with `weights`, all of the study's, get on average, ``[1 + R]`` each.

        ``weighted`` is sum_i w_i of the accuracies or losses, ``least`` that of the objective with
        the smallest weight (where one has it), ``distance`` to the front of all methods' points.
        """
        W = np.array(weights or self.weights)
        rows = [self.row(method, w, c) for w in weights or self.weights]
        least = least_weight(W)
        unequal = np.isfinite(least).all(1)
        found = {}
        for space, means in self.means.items():
            values = 1 - means[rows] if space == "accuracy" else means[rows]  # [W, 1 + R, m]
            found[f"weighted {space}"] = np.einsum("wrm,wm->wr", values, W).mean(0)
            if unequal.any():
                lowest = np.einsum("wrm,wm->wr", values[unequal], least[unequal])
                found[f"least {space}"] = lowest.mean(0)
            if weights is None:
                found[f"distance {space}"] = self.distances[space][rows].mean(0)
                found[f"hypervolume {space}"] = self._volume(space, method)
            if space == "accuracy":
                for k, name in enumerate(self.objectives):
                    found[f"accuracy of {name}"] = values[..., k].mean(0)
        return found

    def _volume(self, space: str, method: str) -> Array:
        """Hypervolume of a method's points, mean over seeds."""
        points = self.costs[space][[i for i in self.main if self.keys[i].method == method]]
        bound = [WORST[space]] * len(self.objectives)
        found = np.full((1, *points.shape[1:3]), np.nan)
        for s, r in itertools.product(*map(range, points.shape[1:3])):
            if np.isfinite(points[:, s, r]).all():
                found[0, s, r] = hypervolume(points[:, s, r], bound)
        return self._over_seeds(found)[0]

    def tax(self, method: str) -> Array:
        """Change of the nats per token by training, mean over weights, by seed."""
        rows = [self.row(method, w) for w in self.weights]
        return self.nats[rows].mean(0) - self.nats[self.row("initial", ())]

    def logged(self, i: int, name: str) -> float | None:
        """Mean over seeds of a number of the training."""
        values = [record["training"].get(name) for record in self.records[i]]
        known = [x for x in values if x is not None]
        return float(np.mean(known)) if known else None

    def as_dict(self) -> dict[str, Any]:
        """Everything, with all that is needed to repeat and to judge it."""
        measures = {name: self.measures(name) for name in self.methods}
        minus = {
            (one, other): {
                **{name: Estimate.of(x - measures[other][name]) for name, x in values.items()},
                "nats per token": Estimate.over_seeds(self.tax(one) - self.tax(other)),
            }
            for one, values in measures.items()
            for other in self.methods
            if one != other and "initial" not in (one, other) and (one == "raco" or other in BASES)
        }
        return plain(
            {
                "environment": self.records[0][0]["environment"],
                "commits": sorted({r["extra"]["commit"] for row in self.records for r in row}),
                "settings": self.settings,
                "c": C,
                "seeds": self.seeds,
                "methods": {
                    name: {
                        **{measure: Estimate.of(x) for measure, x in measures[name].items()},
                        "nats per token, change": Estimate.over_seeds(self.tax(name)),
                        "minus": {other: x for (one, other), x in minus.items() if one == name},
                    }
                    for name in self.methods
                },
                "points": [self._point(i) for i in self.main],
                "radii": self._radii(),
                "claims": claims(minus, self.objectives),
            }
        )

    def _point(self, i: int) -> dict[str, Any]:
        logged = ("hurting_steps", "conflicting_steps", "vertex_share")
        accuracies = zip(self.objectives, 1 - self.means["accuracy"][i, 0], strict=True)
        return {
            "method": self.keys[i].method,
            "weights": self.keys[i].weights,
            "accuracy": dict(accuracies),
            **{name: self.logged(i, name) for name in logged},
        }

    def _radii(self) -> list[dict[str, Any]]:
        """CAGrad with and without clipping over c, at the weights where other radii were run."""
        others = [key.weights for key in self.keys if key.c not in (None, C)]
        found = []
        for c in sorted({key.c for key in self.keys if key.c is not None}) if others else ():
            of = {name: self.measures(name, c, others[:1]) for name in ("linear", "cagrad", "raco")}
            row: dict[str, Any] = {"c": c, "weights": others[0]}
            for one, other in (("raco", "cagrad"), ("raco", "linear"), ("cagrad", "linear")):
                row[f"{one} minus {other}"] = {
                    name: Estimate.of(x - of[other][name]) for name, x in of[one].items()
                }
            found.append(row)
        return found


def _key(record: Mapping[str, Any]) -> Key:
    point = record["point"]
    return Key(point["method"], tuple(point["weights"].values()), point["c"])


def claims(
    minus: Mapping[tuple[str, str], Mapping[str, Estimate]], objectives: Sequence[str]
) -> list[dict[str, Any]]:
    """What became of each claim: reproduced where all intervals lie on its side of 0."""
    found = []
    for source, numbers, method, other, measure in CLAIMS:
        if (method, other) not in minus:
            continue
        names = [f"accuracy of {x}" for x in objectives] if measure == "accuracies" else [measure]
        differences = [minus[method, other][name] for name in names]
        better = 1 if "accurac" in measure and "distance" not in measure else -1
        sides = {difference.side() * better for difference in differences}
        if not all(math.isfinite(x.low) for x in differences):
            verdict = "too few seeds"
        elif sides == {1}:
            verdict = "reproduced"
        elif sides == {0}:
            verdict = "not reproduced: no difference that the data can tell"
        elif {1, -1} <= sides:
            verdict = "not reproduced: one objective gains what the other loses"
        else:
            verdict = "not reproduced: the opposite" if -1 in sides else "only in some objectives"
        claim = f"{TITLES[method]} beats {TITLES[other]} by {measure}: {numbers}"
        measured = dict(zip(names, differences, strict=True))
        row = {"source": source, "claim": claim, "measured": measured, "verdict": verdict}
        found.append(row)
    return found


def table(summary: Mapping[str, Any]) -> str:
    """The methods, then the claims."""
    own = ("hypervolume accuracy", "distance accuracy")
    differences = ("weighted accuracy", "least accuracy", "hypervolume accuracy")
    rows = []
    for name, found in summary["methods"].items():
        minus = found["minus"].get("linear", {})
        shown = [text(minus[x], sign=True) if x in minus else "-" for x in differences]
        rows.append([TITLES[name], *(text(found[x]) for x in own), *shown])
    judged = []
    for claim in summary["claims"]:
        measured = ", ".join(text(x, sign=True) for x in claim["measured"].values())
        judged.append([claim["source"], claim["claim"], measured, claim["verdict"]])
    settings = summary["settings"]
    title = f"## {settings['size']}, {len(settings['objectives'])} objectives"
    head = ["method", *own, *(f"{x} minus weighted DPO's" for x in differences)]
    tables = markdown_table(head, rows), markdown_table(CLAIM, judged, text=4)
    return "\n\n".join([f"{title}, {len(summary['seeds'])} seeds", *tables])


def draw(path: Path, summary: Mapping[str, Any]) -> None:
    """Draws every point's held-out accuracies of the first two objectives."""
    x, y = summary["settings"]["objectives"][:2]
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(5.4, 5.0), layout="constrained")
        axes = figure.subplots()
        for method, look in STYLES.items():
            found = [p["accuracy"] for p in summary["points"] if p["method"] == method]
            axes.plot([p[x] for p in found], [p[y] for p in found], label=TITLES[method], **look)
        axes.plot(0.5, 0.5, "P", color=INK, markersize=7, label="untrained")
        axes.set(xlabel=f"held-out accuracy, {x}", ylabel=f"held-out accuracy, {y}")
        axes.set_title(f"mean of {len(summary['seeds'])} seeds, one point per weights", color=INK)
        figure.legend(loc="outside lower center", ncols=3, frameon=False)
        figure.savefig(path, dpi=160)
