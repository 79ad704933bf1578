"""Results -> a picture: time of a step over the floor against the number of losses, case by case.

python -m benchmarks.step_cost_figure benchmarks/results/step_cost.json picture.png
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import NullLocator

from benchmarks.harness import Parser, UsageError, make_folder, refusals_of
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


def draw_figure(path: Path, results: Mapping[str, Any]) -> None:
    """Draws the picture of what there is in the results, as PNG."""
    path.parent.mkdir(parents=True, exist_ok=True)
    picture(results).savefig(path, dpi=200)


def picture(results: Mapping[str, Any]) -> Figure:
    """Returns the picture; `UsageError` if it would leave a candidate out."""
    unknown = sorted({n for row in results["rows"] for n in row["candidates"]} - STYLES.keys())
    if unknown:
        raise UsageError(f"`source` must hold candidates of {', '.join(STYLES)}; got {unknown}.")
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
        lines = {
            str(line.get_label()): line
            for axes in reversed(grid)
            for line in axes.lines
            if len(line.get_xdata())
        }
        labels = [label for label, *_ in STYLES.values() if label in lines]
        if labels:
            figure.legend(
                [lines[label] for label in labels],
                labels,
                loc="outside lower center",
                ncols=5,
                frameon=False,
                handlelength=3,
                fontsize=8.5,
            )
    return figure


def _panel(axes: Axes, rows: Sequence[Mapping[str, Any]]) -> None:
    at = {row["m"]: k for k, row in enumerate(rows)}
    for name, (label, color, marker, line) in STYLES.items():
        found = {row["m"]: row["candidates"].get(name, {}).get("over_floor") for row in rows}
        points = [(at[m], ratio) for m, ratio in found.items() if ratio is not None]
        x, medians = [k for k, _ in points], [r["median"] for _, r in points]
        axes.plot(x, medians, line, color=color, marker=marker, label=label)
        axes.vlines(
            x,
            [r["lower_quartile"] for _, r in points],
            [r["upper_quartile"] for _, r in points],
            color=color,
            lw=1,
        )
    axes.set_xticks(range(len(rows)), [f"{m}" for m in at])
    axes.set_xlim(-0.3, max(len(rows), 2) - 0.7)
    axes.set_xlabel("losses m")
    axes.grid(axis="y", color="#e5e5e5", lw=0.7)
    axes.set_axisbelow(True)
    n = rows[0]["parameters"]
    size = f"{n / 1e6:.1f} M" if n >= 1e6 else f"{n / 1e3:.0f} k"
    title = f"{rows[0]['kind']}, n = {size}, batch {rows[0]['batch']}"
    axes.set_title(title, loc="left", color=INK, fontsize=9.5)


@refusals_of("step_cost_figure")
def main(arguments: Sequence[str] | None = None) -> None:
    """Draws the picture anew."""
    parser = Parser(prog="python -m benchmarks.step_cost_figure")
    parser.add_argument("source", type=Path, help="the JSON of benchmarks.step_cost")
    parser.add_argument("target", type=Path, help="the picture")
    options = parser.parse_args(arguments)
    try:
        results = json.loads(options.source.read_text())
    except (OSError, ValueError) as error:
        raise UsageError(
            f"`source` must be a JSON file; got {options.source} ({error})."
        ) from error
    make_folder(options.target.parent, "the folder of target")
    draw_figure(options.target, results)


if __name__ == "__main__":
    main()
