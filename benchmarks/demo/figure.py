"""Runs -> a picture of the trade-off and of what it costs in steps that hurt an objective."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from pathlib import Path

import matplotlib
import matplotlib.pyplot as plt
from matplotlib.axes import Axes

from benchmarks.demo.data import OBJECTIVES
from benchmarks.demo.experiment import Run
from benchmarks.demo.results import Ceiling, Estimate, by_point

# Colours of Okabe and Ito, told apart with any colour vision, and a marker each for grey printers.
STYLE = {
    "Weighted DPO": ("#0072B2", "o"),
    "CAGrad": ("#E69F00", "s"),
    "CAGrad-Clip": ("#009E73", "D"),
    "MGDA": ("#CC79A7", "^"),
}
INK, FAINT = "#222222", "#8a8a8a"


def draw(path: Path, runs: Sequence[Run], ceiling: Ceiling) -> None:
    """Draws the held-out accuracies with their ceiling, and the share of hurting steps."""
    matplotlib.use("Agg")
    with plt.rc_context(
        {
            "font.size": 9.5,
            "axes.spines.top": False,
            "axes.spines.right": False,
            "axes.edgecolor": FAINT,
            "axes.labelcolor": INK,
            "axes.titlesize": 10.5,
            "axes.titlelocation": "left",
            "xtick.color": INK,
            "ytick.color": INK,
        }
    ):
        figure, (left, right) = plt.subplots(
            1, 2, figsize=(9.6, 4.6), width_ratios=(1.35, 1), layout="constrained"
        )
        _draw_tradeoff(left, runs, ceiling)
        _draw_hurting_steps(right, runs)
        handles, labels = left.get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=len(labels), frameon=False)
        figure.savefig(path, dpi=200)
        plt.close(figure)


def _draw_tradeoff(axes: Axes, runs: Sequence[Run], ceiling: Ceiling) -> None:
    points = by_point(runs)
    for method, (color, marker) in STYLE.items():
        groups = {key: group for key, group in points.items() if key[0] == method}
        means = []
        for group in groups.values():
            accuracies = [[run.evaluation[name].accuracy for name in OBJECTIVES] for run in group]
            axes.plot(*zip(*accuracies, strict=True), marker, color=color, ms=3, alpha=0.35, mew=0)
            means.append([statistics.fmean(column) for column in zip(*accuracies, strict=True)])
        axes.plot(
            *zip(*means, strict=True),
            marker=marker, color=color, label=method, ms=7, lw=1.6, mec="white", mew=0.8, zorder=3,
        )
        for (_, weight), (x, y) in zip(groups, means, strict=True):
            if weight is not None:
                axes.annotate(f"{weight:g}", (x, y), (5, 5), textcoords="offset points", color=color, fontsize=8)
    axes.plot(0.5, 0.5, "P", color=INK, ms=7, mec="white", mew=0.8)
    axes.annotate("base model", (0.5, 0.5), (7, -3), textcoords="offset points", color=INK)
    top = ceiling.accuracy_sum
    axes.axline((top - 1, 1), (1, top - 1), color=INK, lw=1, ls=(0, (5, 3)), zorder=1)
    axes.set_aspect("equal")
    axes.set_xlabel(f"held-out accuracy: {OBJECTIVES[0]}")
    axes.set_ylabel(f"held-out accuracy: {OBJECTIVES[1]}")
    axes.set_title("Trade-off between two preferences")


def _draw_hurting_steps(axes: Axes, runs: Sequence[Run]) -> None:
    points = by_point(runs)
    for method, (color, marker) in STYLE.items():
        shares = {
            weight: Estimate.of(100 * run.training.hurting_steps for run in group)
            for (name, weight), group in points.items()
            if name == method
        }
        if None in shares:
            axes.axhline(shares[None].mean, color=color, lw=1.6, ls=":")
            continue
        axes.errorbar(
            list(shares),
            [share.mean for share in shares.values()],
            [share.deviation for share in shares.values()],
            marker=marker, color=color, ms=7, lw=1.6, mec="white", mew=0.8, elinewidth=1,
        )
    axes.set_xlabel("weight of outcome")
    axes.set_ylabel("steps that hurt an objective [%]")
    axes.set_title("What the optimizer did")
