"""Finished runs -> `benchmarks/results/qm9.json`, a table in Markdown and a picture."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.figure import Figure
from scipy.stats import rankdata

from benchmarks.harness import environment, markdown_table
from benchmarks.studies.estimates import Estimate, plain, text
from benchmarks.studies.qm9.data import TARGETS
from benchmarks.studies.qm9.methods import METHODS
from benchmarks.studies.qm9.protocol import SPARSE, SPARSE_LOGARITHMS, Protocol, Runs
from benchmarks.studies.qm9.training import delta_m
from benchmarks.style import GREY, INK, STYLE

# Mean rank and Delta m % as published: Nash-MTL (Navon et al., ICML 2022), Table 1, at the
# literature's full size of 110,000 molecules and 300 epochs. They are not ours.
PUBLISHED = {
    "LS": (6.8, 177.6),
    "MGDA": (5.9, 120.5),
    "CAGrad": (5.7, 112.8),
    "PCGrad": (5.0, 125.7),
    "IMTL-G": (4.7, 77.2),
    "Nash-MTL": (2.5, 62.0),
}


def interval(values: Sequence[float]) -> dict[str, Any]:
    """Returns the mean over seeds with its 95 % interval, None for fewer than three seeds."""
    estimate = Estimate.over_seeds(np.asarray(values, dtype=float))
    return {**plain(estimate), "n": len(values)}


class Summary:
    """The figures of the study from its finished runs; errors in the units of the targets."""

    def __init__(self, runs: Runs, protocol: Protocol, units: Sequence[float]) -> None:
        self.runs, self.protocol, self.units = runs, protocol, np.asarray(units)
        self.errors: dict[tuple[str, str, str, str], dict[int, list[float]]] = {}
        self.records: dict[tuple[str, str, str, str], list[tuple[float, dict[str, Any]]]] = {}
        for (run, tuning), record in runs.records.items():
            if not tuning:
                key = run.model, run.method, run.labels, run.absent
                self.errors.setdefault(key, {})[run.seed] = record["test"]
                self.records.setdefault(key, []).append((run.rate, record))

    def reference(self, model: str) -> list[float]:
        """Test errors of the single-task models, the mean over seeds."""
        return [
            float(np.mean([e[k] for e in self._of(model, f"single:{target}").values()]))
            for k, target in enumerate(TARGETS)
        ]

    def scores(self, method: str, model: str = "mlp", *kind: str) -> dict[int, float]:
        """Delta m by seed."""
        reference = self.reference(model)
        return {s: delta_m(e, reference) for s, e in self._of(model, method, *kind).items()}

    def methods(self, model: str) -> dict[str, dict[str, Any]]:
        """One row per method, the best Delta m first."""
        names = [name for name in METHODS if self._of(model, name)]
        means = {n: np.mean(list(self._of(model, n).values()), axis=0) for n in names}
        ranks = rankdata(np.array([means[n] for n in names]), axis=0).mean(1)
        rows = {}
        for name, rank in zip(names, ranks, strict=True):
            found = self.records[model, name, "all", "none"]
            gradients = [record["gradients"] for _, record in found if record["gradients"]]
            rows[name] = {
                "title": METHODS[name].title,
                "delta_m": interval(list(self.scores(name, model).values())),
                "mean_rank": float(rank),
                "errors": dict(zip(TARGETS, (means[name] * self.units).tolist(), strict=True)),
                "rate": found[0][0],
                "seconds": float(np.median([record["seconds"] for _, record in found])),
                "gradients": {
                    key: float(np.mean([g[key] for g in gradients]))
                    for key in (gradients[0] if gradients else {})
                },
            }
        return dict(sorted(rows.items(), key=lambda row: row[1]["delta_m"]["value"]))

    def gains(self) -> dict[str, dict[str, Any]]:
        """For each rule: its gain over equal weights, scale's share of it, and its gain on logs."""
        equal, log = self.scores("equal"), self.scores("log")
        result = {}
        for name, method in METHODS.items():
            raw, logs = self.scores(name), self.scores(f"{name}-log")
            if method.make is None or method.logarithm or not (raw and logs):
                continue
            result[name] = {
                "title": method.title,
                "over_equal_weights": interval(_paired(equal, raw)),
                "over_sum_of_logarithms": interval(_paired(log, raw)),
                "logarithms_over_sum_of_logarithms": interval(_paired(log, logs)),
            }
        return result

    def sparse(self) -> dict[str, dict[str, Any]]:
        """Delta m with few labels, and what leaving out absent losses gains over zero losses."""
        rows: dict[str, dict[str, Any]] = {}
        for labels in ("source", "random"):
            log = self.scores("log", "mlp", labels, "none")
            for name in (*SPARSE, *SPARSE_LOGARITHMS):
                none = self.scores(name, "mlp", labels, "none")
                zero = self.scores(name, "mlp", labels, "zero")
                if not none:
                    continue
                row = {"title": METHODS[name].title, "left_out": interval(list(none.values()))}
                if zero:
                    row |= {
                        "as_zero": interval(list(zero.values())),
                        "gain": interval(_paired(zero, none)),
                    }
                if name in SPARSE_LOGARITHMS[1:]:
                    row["over_sum_of_logarithms"] = interval(_paired(log, none))
                rows.setdefault(labels, {})[name] = row
        return rows

    def as_json(self) -> dict[str, Any]:
        """The whole summary."""
        return {
            "environment": environment(packages=("torchjd", "pandas")),
            "protocol": self.protocol.settings()
            | {
                "rates": list(self.protocol.rates),
                "seeds": list(self.protocol.seeds),
                "check_seeds": list(self.protocol.check_seeds),
            },
            "single_task_errors": dict(
                zip(TARGETS, (np.array(self.reference("mlp")) * self.units).tolist(), strict=True)
            ),
            "mlp": self.methods("mlp"),
            "gains": self.gains(),
            "sparse": self.sparse(),
            "schnet": self.methods("schnet") if self._of("schnet", "single:cv") else {},
            "published": {
                "source": "Navon et al., Multi-Task Learning as a Bargaining Game, ICML 2022",
                "rows": {k: {"mean_rank": r, "delta_m": d} for k, (r, d) in PUBLISHED.items()},
            },
        }

    def _of(
        self, model: str, method: str, labels: str = "all", absent: str = "none"
    ) -> dict[int, list[float]]:
        return self.errors.get((model, method, labels, absent), {})


def _paired(one: Mapping[int, float], other: Mapping[int, float]) -> list[float]:
    """One minus the other, over the seeds that both have: positive where the other is better."""
    return [one[seed] - other[seed] for seed in sorted(one.keys() & other.keys())]


def table(rows: Mapping[str, Mapping[str, Any]]) -> str:
    """Returns the methods as a table in Markdown."""
    lines = [
        [row["title"], text(row["delta_m"]), f"{row['mean_rank']:.1f}"] for row in rows.values()
    ]
    return markdown_table(["method", "Delta m %", "mean rank"], lines)


def draw(path: Path, rows: Mapping[str, Mapping[str, Any]]) -> None:
    """Draws Delta m by rule, on the losses and on their logarithms."""
    rules = [n for n, m in METHODS.items() if m.make and not m.logarithm and n in rows]
    rules.sort(key=lambda name: -rows[name]["delta_m"]["value"])
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(8, 0.32 * len(rules) + 1.6), layout="constrained")
        axes = figure.subplots()
        for y, name in enumerate(rules):
            for key, colour, face in ((name, "#0072B2", "white"), (f"{name}-log", "#D55E00", None)):
                if key in rows:
                    found = rows[key]["delta_m"]
                    if found["low"] is not None:
                        axes.plot([found["low"], found["high"]], [y, y], color=colour, lw=1.2)
                    axes.plot(found["value"], y, "o", color=colour, markerfacecolor=face or colour)
        for key, label in (("equal", "equal weights"), ("log", "sum of logarithms")):
            if key in rows:
                axes.axvline(rows[key]["delta_m"]["value"], color=GREY, lw=0.9, ls="--")
                axes.annotate(
                    label,
                    (rows[key]["delta_m"]["value"], 1),
                    xycoords=("data", "axes fraction"),
                    xytext=(3, 2),
                    textcoords="offset points",
                    color=GREY,
                )
        axes.plot([], [], "o", color="#0072B2", markerfacecolor="white", label="on the losses")
        axes.plot([], [], "o", color="#D55E00", label="on their logarithms")
        axes.set_yticks(range(len(rules)), [rows[name]["title"] for name in rules])
        axes.set_xlabel("Delta m over single-task models, % (lower is better)", color=INK)
        axes.legend(frameon=False, loc="lower center")
        figure.savefig(path, dpi=160)
