"""The summary -> the pictures of docs/beyond.md."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.figure import Figure

from benchmarks.beyond import study
from benchmarks.beyond.candidates import CANDIDATES, COMPARED_NAMES, TITLES
from benchmarks.beyond.tables import FILE, Summary, task_title
from benchmarks.style import GREY, INK, STYLE

IMAGES = Path(__file__).parents[2] / "docs" / "images"
COLOURS = {
    "linear": "#0072B2",
    "cagrad": "#E69F00",
    "raco": "#009E73",
    "conflict": "#D55E00",
    "cone": "#CC79A7",
    "tail": "#56B4E9",
    "budget": "#000000",
    "persistent": "#997700",
}
MARKERS = "DsPXv^<>"


def write(folder: Path = study.FOLDER, target: Path = IMAGES) -> list[Path]:
    """Draws from the summary of a folder."""
    found = json.loads((folder / FILE).read_text())
    paths = [target / "beyond-deviation.png", target / "beyond-radius.png"]
    deviations(paths[0], found["tasks"])
    prices(paths[1], found["radii"])
    return paths


def deviations(path: Path, tasks: Summary) -> None:
    """A panel a task: deviation of every method minus CAGrad-Clip's."""
    others = [name for name in reversed(COMPARED_NAMES) if name != "raco"]
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(10.4, 6.6), layout="constrained")
        grid = figure.subplots(2, 4, sharey=True)
        for axes, (name, task) in zip(grid.flat, tasks.items(), strict=False):
            for y, method in enumerate(others):
                row = task["methods"].get(method)
                if row is None:
                    continue
                found = row["against"]["raco"]["deviation"]
                color = COLOURS.get(method, GREY)
                axes.plot([found["low"], found["high"]], [y, y], color=color)
                axes.plot(found["value"], y, "o", color=color, markersize=5)
            axes.axvline(0, color=INK, lw=0.8)
            axes.locator_params(axis="x", nbins=4)
            axes.set_yticks(range(len(others)), [TITLES[method] for method in others])
            axes.set_title(f"{task_title(name)}\n{len(task['seeds'])} seeds", fontsize=9)
        for axes in list(grid.flat)[len(tasks) :]:
            axes.set_axis_off()
        figure.suptitle(
            "deviation from the trade-off asked for, minus CAGrad-Clip's (better: left)", color=INK
        )
        figure.savefig(path, dpi=160)


def prices(path: Path, found: Summary) -> None:
    """Weighted loss against hurting steps: CAGrad-Clip as c grows, and the candidates."""
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(10.4, 4.4), layout="constrained")
        grid = figure.subplots(1, len(found))
        for axes, (name, rows) in zip(grid, found.items(), strict=True):
            chain = sorted(
                (row for row in rows if row["method"] in ("linear", "raco")),
                key=lambda row: row["c"],
            )
            x, y = _points(chain)
            color = COLOURS["raco"]
            axes.plot(x, y, "-o", color=color, label="CAGrad-Clip, c as written")
            for row, at in zip(chain, zip(x, y, strict=True), strict=True):
                axes.annotate(f"{row['c']:g}", at, (4, 5), textcoords="offset points", color=color)
            for method in CANDIDATES:
                of_method = [row for row in rows if row["method"] == method]
                color, marker = COLOURS.get(method, GREY), MARKERS[CANDIDATES.index(method)]
                axes.plot(
                    *_points(of_method), marker, color=color, markersize=6, label=TITLES[method]
                )
            axes.set_title(task_title(name))
            axes.set_xlabel("weighted held-out loss above the weighted sum's")
            axes.locator_params(axis="x", nbins=5)
            axes.set_ylabel("steps that hurt a loss, %")
        figure.legend(
            *grid[0].get_legend_handles_labels(), loc="outside right center", frameon=False
        )
        figure.savefig(path, dpi=160)


def _points(rows: list[dict[str, Any]]) -> tuple[list[float], list[float]]:
    return [row["excess"] for row in rows], [100 * row["hurting"] for row in rows]
