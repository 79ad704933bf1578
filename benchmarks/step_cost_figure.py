"""Results -> a picture: cost against the number of losses, cost against the size of the model.

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
from matplotlib.ticker import NullLocator, ScalarFormatter

from benchmarks.harness import Parser, UsageError, make_folder, refusals_of
from benchmarks.style import GREY, INK, STYLE

CASE = "mlp-10M"  # of the left panel
M = 8  # of the right panel
# Okabe and Ito's colours, which differ for any colour vision; markers differ in print without
# colour. Solid lines are exact and ours, dashed ones approximate, dotted ones TorchJD's.
# Names in results of earlier runs, the committed ones among them.
EARLIER = {"materialized": "dense", "solve_every": "gram_every"}
STYLES: dict[str, dict[str, Any]] = {
    "floor": {
        "label": "floor: m backward passes",
        "color": INK,
        "marker": "",
        "linestyle": "-",
        "linewidth": 1,
    },
    "weighted_sum": {
        "label": "weighted sum",
        "color": GREY,
        "marker": "",
        "linestyle": "-",
        "linewidth": 1,
    },
    "dense": {"label": "dense (default)", "color": "#0072B2", "marker": "o"},
    "ghost": {"label": "ghost", "color": "#D55E00", "marker": "D"},
    "gram_every": {
        "label": "Gram matrix every 4 steps",
        "color": "#56B4E9",
        "marker": "s",
        "linestyle": "--",
    },
    "last_layer": {
        "label": "Gram of the last layer",
        "color": "#E69F00",
        "marker": "^",
        "linestyle": "--",
    },
    "representation": {
        "label": "Gram of the representation",
        "color": "#009E73",
        "marker": "v",
        "linestyle": "--",
    },
    "torchjd_autojac": {
        "label": "TorchJD autojac",
        "color": "#CC79A7",
        "marker": "x",
        "linestyle": ":",
    },
    "torchjd_autojac_gram": {
        "label": "TorchJD autojac, Gram per parameter",
        "color": "#CC79A7",
        "marker": "P",
        "linestyle": ":",
    },
    "torchjd_autogram": {
        "label": "TorchJD autogram",
        "color": "#882255",
        "marker": "*",
        "linestyle": ":",
    },
}


def draw(path: Path, results: Mapping[str, Any]) -> None:
    """Draws the picture of what there is in the results, as PNG."""
    figure = picture(results)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=200)


def picture(results: Mapping[str, Any]) -> Figure:
    """Returns the picture; `UsageError` if it would leave a candidate out."""
    rows = [
        {**row, "candidates": {EARLIER.get(k, k): v for k, v in row["candidates"].items()}}
        for row in results["rows"]
    ]
    unknown = sorted({name for row in rows for name in row["candidates"]} - STYLES.keys())
    if unknown:
        raise UsageError(f"`source` must hold candidates of {', '.join(STYLES)}; got {unknown}.")
    with matplotlib.rc_context({**STYLE, "lines.markersize": 5.5}):
        figure = Figure(figsize=(10.4, 5.4), layout="constrained")
        left, right = figure.subplots(1, 2, width_ratios=(1, 1.25))
        _against_losses(left, [row for row in rows if row["case"] == CASE])
        _against_size(right, [row for row in rows if row["m"] == M], results["titles"])
        handles = {
            label: handle
            for axes in (right, left)  # the left one has the lines
            for handle, label in zip(*axes.get_legend_handles_labels(), strict=True)
        }
        labels = [str(s["label"]) for s in STYLES.values() if s["label"] in handles]
        if labels:
            figure.legend(
                [handles[label] for label in labels],
                labels,
                loc="outside lower center",
                ncols=4,
                frameon=False,
                handlelength=3,
            )
    return figure


def _against_losses(axes: Axes, rows: Sequence[Mapping[str, Any]]) -> None:
    for name, style in STYLES.items():
        points = [
            (row["m"], row["candidates"][name]["over_weighted_sum"])
            for row in rows
            if "over_weighted_sum" in row["candidates"].get(name, {})
        ]
        if points:
            _bars(axes, [float(m) for m, _ in points], [ratio for _, ratio in points], style)
    ticks = [row["m"] for row in rows]
    axes.set_xscale("log")
    _logarithmic(axes, (1, 2, 5, 10, 20, 50, 100, 200))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_xticks(ticks, [str(m) for m in ticks])
    axes.set_xlabel("number of losses m")
    axes.set_ylabel("time of a step [steps of the weighted sum]")
    if rows:
        title = f"MLP, n = {_millions(rows[0]['parameters'])}, batch {rows[0]['batch']}"
        axes.set_title(title, loc="left", color=INK, fontsize=10.5)


def _against_size(axes: Axes, rows: Sequence[Mapping[str, Any]], titles: Mapping[str, str]) -> None:
    rows = sorted(rows, key=lambda row: (row["parameters"], row["batch"]))
    shown = [
        name for name in STYLES if any("over_floor" in r["candidates"].get(name, {}) for r in rows)
    ]
    for k, name in enumerate(shown):
        style = STYLES[name]
        if name == "floor":
            axes.axhline(1, color=style["color"], lw=1, label=style["label"], zorder=0)
            continue
        points = [
            (i, row["candidates"][name]["over_floor"])
            for i, row in enumerate(rows)
            if "over_floor" in row["candidates"].get(name, {})
        ]
        # Beside each other, so that none covers another.
        at = [i + 0.6 * (k / max(1, len(shown) - 1) - 0.5) for i, _ in points]
        marked = style | {"linestyle": "", "marker": style["marker"] or "_"}
        _bars(axes, at, [ratio for _, ratio in points], marked)
    for i in range(1, len(rows)):
        axes.axvline(i - 0.5, color="#dddddd", lw=0.8, zorder=0)
    _logarithmic(axes, (0.05, 0.1, 0.2, 0.3, 0.5, 0.7, 1, 1.5, 2, 3, 5))
    axes.set_xlim(-0.5, max(len(rows), 1) - 0.5)
    labels = [
        f"{_millions(row['parameters'])}\n{titles[row['case']]}\n"
        f"{row['batch']}{' x ' + str(row['tokens']) if row['tokens'] > 1 else ''}"
        for row in rows
    ]
    axes.set_xticks(range(len(rows)), labels, fontsize=8.5)
    axes.tick_params(axis="x", length=0)
    axes.set_xlabel("parameters n, trunk, batch (x tokens)")
    axes.set_ylabel("time of a step [steps of the floor]")
    axes.set_title(f"m = {M} losses", loc="left", color=INK, fontsize=10.5)


def _bars(
    axes: Axes, x: list[float], ratios: Sequence[Mapping[str, float]], style: Mapping[str, Any]
) -> None:
    medians = [ratio["median"] for ratio in ratios]
    below = [ratio["median"] - ratio["lower_quartile"] for ratio in ratios]
    above = [ratio["upper_quartile"] - ratio["median"] for ratio in ratios]
    axes.errorbar(x, medians, [below, above], elinewidth=1, **style)


def _logarithmic(axes: Axes, values: Sequence[float]) -> None:
    axes.set_yscale("log")
    low, high = axes.get_ylim()
    ticks = [t for t in values if low <= t <= high]
    axes.yaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter(ScalarFormatter())
    axes.set_yticks(ticks, [f"{t:g}" for t in ticks])
    axes.grid(axis="y", color="#e5e5e5", lw=0.7)
    axes.set_axisbelow(True)


def _millions(n: int) -> str:
    return f"{n / 1e6:.{0 if n > 5e7 else 1}f} M"


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
    draw(options.target, results)


if __name__ == "__main__":
    main()
