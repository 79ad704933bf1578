"""Runs -> a picture: the trade-off that was reached, and the steps that hurt an objective."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Sequence
from pathlib import Path

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from benchmarks.demo.data import OBJECTIVES
from benchmarks.demo.experiment import Run
from benchmarks.demo.results import Ceiling, Estimate, by_point
from benchmarks.style import GREY, INK, METHODS, STYLE

TITLES = {"linear": "Weighted DPO", "cagrad": "CAGrad", "raco": "CAGrad-Clip", "mgda": "MGDA"}
STYLES = {title: METHODS[name] for name, title in TITLES.items()}
SHADE = "#efefef"


def draw(path: Path, runs: Sequence[Run], ceiling: Ceiling) -> None:
    """Draws the held-out accuracies below their ceiling, and the share of hurting steps, as PNG."""
    with matplotlib.rc_context({**STYLE, "lines.linewidth": 1.6}):
        figure = Figure(figsize=(9.2, 5.0), layout="constrained")
        left, right = figure.subplots(1, 2, width_ratios=(1.2, 1))
        _draw_accuracies(left, runs, ceiling)
        _draw_hurting_steps(right, runs)
        handles, labels = left.get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=len(labels), frameon=False)
        figure.savefig(path, dpi=200)


def _draw_accuracies(axes: Axes, runs: Sequence[Run], ceiling: Ceiling) -> None:
    seeds = len({run.seed for run in runs})
    spread = f"large: mean of {seeds} seeds, small: each seed" if seeds > 1 else "one seed"
    _set_title(axes, "Held-out preference accuracy", spread)
    at_weight: dict[float, list[list[float]]] = {}
    for method, style in STYLES.items():
        means = []
        for weight, group in _by_weight(runs, method).items():
            points = [[run.evaluation[name].accuracy for name in OBJECTIVES] for run in group]
            axes.scatter(*_columns(points), 7, style["color"], alpha=0.4, lw=0)
            means.append([statistics.fmean(column) for column in _columns(points)])
            if weight is not None:
                at_weight.setdefault(weight, []).append(means[-1])
        axes.plot(*_columns(means), label=method, zorder=3, **style)

    axes.plot(0.5, 0.5, "P", color=INK, markersize=7)
    look = {"textcoords": "offset points", "va": "top", "color": INK}
    axes.annotate("base model", (0.5, 0.5), (0, -8), ha="center", **look)
    for weight, means in at_weight.items():
        center = [statistics.fmean(column) for column in _columns(means)]
        axes.annotate(f"w = {weight:g}", center, (-10, -12), ha="right", **look)

    accuracies = [run.evaluation[name].accuracy for run in runs for name in OBJECTIVES]
    low, high = min(0.5, *accuracies) - 0.09, max(0.5, *accuracies) + 0.07
    total, conflict = ceiling.accuracy_sum, ceiling.conflicting / ceiling.pairs
    axes.fill([total - high, high, high], [high, total - high, high], color=SHADE, zorder=0)
    axes.plot([total - high, high], [high, total - high], color=GREY, lw=1, zorder=1)
    text = f"out of reach of any model:\nthe objectives disagree\non {conflict:.0%} of the pairs"
    axes.text(0.98, 0.98, text, transform=axes.transAxes, ha="right", va="top", color=GREY)
    axes.set(xlim=(low, high), ylim=(low, high), aspect="equal")
    axes.set_xlabel("accuracy on “states the outcome”")
    axes.set_ylabel("accuracy on “is shorter”")


def _draw_hurting_steps(axes: Axes, runs: Sequence[Run]) -> None:
    seeds = len({run.seed for run in runs})
    spread = f"mean and s.d. of {seeds} seeds" if seeds > 1 else "one seed"
    _set_title(axes, "Steps that work against an objective", f"{spread}; MGDA takes no weights")
    for method, style in STYLES.items():
        shares = {
            weight: Estimate.of(100 * run.training.hurting_steps for run in group)
            for weight, group in _by_weight(runs, method).items()
        }
        means = [share.mean for share in shares.values()]
        if None in shares:
            axes.axhline(*means, color=style["color"], ls=":", zorder=1)
        else:
            deviations = [share.deviation for share in shares.values()]
            axes.errorbar(list(shares), means, deviations, elinewidth=1, **style)
    axes.set_xticks(sorted({run.outcome_weight for run in runs} - {None}))
    axes.set_ylim(bottom=-2)
    axes.set_xlabel("weight w of “states the outcome”")
    axes.set_ylabel("training steps [%]")


def _set_title(axes: Axes, title: str, subtitle: str) -> None:
    axes.set_title(title, loc="left", pad=20, color=INK, fontsize=11)
    axes.text(0, 1.025, subtitle, transform=axes.transAxes, color=GREY, fontsize=9)


def _by_weight(runs: Sequence[Run], method: str) -> dict[float | None, list[Run]]:
    return {weight: group for (name, weight), group in by_point(runs).items() if name == method}


def _columns(points: Sequence[Sequence[float]]) -> Iterator[tuple[float, ...]]:
    return zip(*points, strict=True)
