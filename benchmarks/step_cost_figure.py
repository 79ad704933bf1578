"""The picture of `step_cost`: time of a step over the floor against the number of losses."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import NullLocator

from benchmarks.style import GREY, INK, STYLE

IMAGE = Path(__file__).parent.parent / "docs" / "images" / "step-cost.png"
PANELS = ("mlp-64", "mlp-256", "mlp-10M", "mlp-10M-batch-512")
TICKS = (0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 20)
# Okabe and Ito's colours, which differ for any colour vision; markers differ in print without
# colour. Solid lines are exact and ours, dashed ones approximate, dotted ones TorchJD's.
STYLES: dict[str, tuple[str, str, str, str]] = {
    "floor": ("floor: m backward passes", INK, "", "-"),
    "weighted_sum": ("weighted sum: one backward pass", GREY, "", "-"),
    "dense": ('"dense", the default', "#0072B2", "o", "-"),
    "ghost": ('"ghost"', "#D55E00", "D", "-"),
    "gram_every": ("gram_every=4", "#56B4E9", "s", "--"),
    "last_layer": ("Gram matrix of the last layer", "#E69F00", "^", "--"),
    "representation": ('"representation"', "#009E73", "v", "--"),
    "torchjd_autojac": ("TorchJD autojac", "#CC79A7", "P", ":"),
    "torchjd_autogram": ("TorchJD autogram", "#882255", "*", ":"),
}


def draw_figure(path: Path, results: Mapping[str, Any]) -> Figure:
    """Draws the picture of what there is in the results, as PNG."""
    cases = {name: [r for r in results["rows"] if r["case"] == name] for name in PANELS}
    cases = {name: rows for name, rows in cases.items() if rows}
    with matplotlib.rc_context({**STYLE, "lines.markersize": 5}):
        figure = Figure(figsize=(10.4, 4.6), layout="constrained")
        grid = figure.subplots(1, max(1, len(cases)), sharey=True, squeeze=False)[0]
        for axes, rows in zip(grid, cases.values(), strict=False):
            _panel(axes, rows)
        grid[0].set_ylabel("time of a step over the floor")
        grid[0].set_yscale("log")
        low, high = grid[0].get_ylim()
        ticks = [t for t in TICKS if low <= t <= high]
        grid[0].yaxis.set_minor_locator(NullLocator())
        grid[0].set_yticks(ticks, [f"{t:g}" for t in ticks])
        lines = {str(line.get_label()): line for axes in grid for line in axes.lines}
        look = {"ncols": 5, "frameon": False, "handlelength": 3, "fontsize": 8.5}
        figure.legend(lines.values(), lines.keys(), loc="outside lower center", **look)
        figure.savefig(path, dpi=200)
    return figure


def _panel(axes: Axes, rows: Sequence[Mapping[str, Any]]) -> None:
    at = {row["m"]: k for k, row in enumerate(rows)}
    for name, (label, color, marker, line) in STYLES.items():
        found = {row["m"]: row["candidates"].get(name, {}).get("over_floor") for row in rows}
        points = [(at[m], ratio) for m, ratio in found.items() if ratio is not None]
        x = [k for k, _ in points]
        low, median, high = (
            [ratio[name] for _, ratio in points]
            for name in ("lower_quartile", "median", "upper_quartile")
        )
        axes.plot(x, median, line, color=color, marker=marker, label=label)
        axes.vlines(x, low, high, color=color, lw=1)
    axes.set_xticks(range(len(rows)), [f"{m}" for m in at])
    axes.set_xlim(-0.3, max(len(rows), 2) - 0.7)
    axes.set_xlabel("losses m")
    axes.grid(axis="y", color="#e5e5e5", lw=0.7)
    axes.set_axisbelow(True)
    n = rows[0]["parameters"]
    size = f"{n / 1e6:.1f} M" if n >= 1e6 else f"{n / 1e3:.0f} k"
    title = f"{rows[0]['kind']}, n = {size}, batch {rows[0]['batch']}"
    axes.set_title(title, loc="left", color=INK, fontsize=9.5)
