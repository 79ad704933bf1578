"""Summaries -> pictures: differences to CAGrad-Clip, and the trade-offs of the digits."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, NullLocator

from benchmarks.multitask.analysis import MEASURES
from benchmarks.multitask.data import SETS
from benchmarks.multitask.methods import METHODS
from benchmarks.multitask.study import FOLDER
from benchmarks.multitask.tables import summaries
from benchmarks.style import GREY, INK, STYLE

IMAGES = Path(__file__).parents[2] / "docs" / "images"
RC = {**STYLE, "lines.linewidth": 1.2}
# Okabe and Ito's colours for the methods that the text is about; the others are grey.
STYLES: dict[str, dict[str, Any]] = {
    "linear": {"color": "#0072B2", "marker": "o", "markersize": 7},
    "cagrad": {"color": "#E69F00", "marker": "s", "markersize": 9, "markerfacecolor": "white"},
    "raco": {"color": "#009E73", "marker": "D", "markersize": 5},
    "mgda": {"color": "#CC79A7", "marker": "^", "markersize": 7},
    "upgrad": {"color": "#D55E00", "marker": "v", "markersize": 6},
    "pcgrad": {"color": "#56B4E9", "marker": "X", "markersize": 6},
}
OTHERS = dict(zip(["nashmtl", "imtlg", "alignedmtl", "fairgrad"], "P*<>", strict=True))
PANELS = ("gap", "mean rank", "hypervolume, loss")


def write(folder: Path = FOLDER) -> list[Path]:
    """Draws into docs/images for the committed results, beside the records for others."""
    found = summaries(folder)
    sets = {name: found[name] for name in SETS if name in found}
    target = IMAGES if folder == FOLDER else folder
    paths = []
    if all("raco" in summary["methods"] for summary in sets.values()) and sets:
        paths.append(target / "multitask-differences.png")
        differences(paths[-1], sets)
    if "digits" in sets:
        paths.append(target / "multitask-digits.png")
        trade_off(paths[-1], sets["digits"])
    return paths


def differences(path: Path, sets: Mapping[str, Mapping[str, Any]]) -> None:
    """A row a set: what every method is worse or better in than CAGrad-Clip."""
    with matplotlib.rc_context(RC):
        figure = Figure(figsize=(9.6, 2.9 * len(sets) + 0.4), layout="constrained")
        grid = np.atleast_2d(figure.subplots(len(sets), len(PANELS), sharey="row"))
        for row, (name, summary) in zip(grid, sets.items(), strict=True):
            methods = [k for k in METHODS if k in summary["methods"] and k != "raco"]
            for axes, measure in zip(row, PANELS, strict=True):
                for y, method in enumerate(reversed(methods)):
                    found = summary["methods"][method]["against"]["raco"][measure]
                    color = STYLES.get(method, {}).get("color", GREY)
                    axes.plot([found["low"], found["high"]], [y, y], color=color)
                    axes.plot(found["value"], y, "o", color=color, markersize=5)
                axes.axvline(0, color=INK, lw=0.8)
                axes.set_yticks(range(len(methods)), [METHODS[k].title for k in reversed(methods)])
                axes.locator_params(axis="x", nbins=5)
                better = "right" if MEASURES[measure] else "left"
                axes.set_title(f"{name}: {measure} (better: {better})", fontsize=9, color=INK)
        seeds = len(next(iter(sets.values()))["seeds"])
        figure.suptitle(
            f"method minus CAGrad-Clip, {seeds} seeds, 95 % bootstrap intervals", color=INK
        )
        figure.savefig(path, dpi=160)


def trade_off(path: Path, summary: Mapping[str, Any]) -> None:
    """Relative test losses of two tasks, a point per weights, mean of the seeds."""
    with matplotlib.rc_context(RC):
        figure = Figure(figsize=(6.6, 5.6), layout="constrained")
        axes = figure.subplots()
        for method, row in summary["methods"].items():
            style = STYLES.get(method) or {
                "color": GREY,
                "marker": OTHERS[method],
                "markersize": 6,
                "alpha": 0.8,
            }
            points = np.array(row["points"]["loss"])
            axes.plot(points[:, 0], points[:, 1], label=row["title"], **style)
        x, y = summary["tasks"]
        axes.set_xlabel(f"relative test loss, {x}")
        axes.set_ylabel(f"relative test loss, {y}")
        for axis, scale in ((axes.xaxis, axes.set_xscale), (axes.yaxis, axes.set_yscale)):
            scale("log")
            axis.set_major_locator(FixedLocator([0.1, 0.12, 0.15, 0.2, 0.3, 0.4, 0.5]))
            axis.set_major_formatter("{x:g}")
            axis.set_minor_locator(NullLocator())
        axes.set_title("two overlaid digits: a point per weights, lower left is better", color=INK)
        axes.legend(frameon=False)
        figure.savefig(path, dpi=160)
