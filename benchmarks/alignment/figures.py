"""Summaries -> pictures: the trade-offs that were reached, the radius c, the way there."""

from __future__ import annotations

import itertools
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from benchmarks.alignment.study import OBJECTIVES, TRIALS
from benchmarks.alignment.tables import TITLES
from benchmarks.harness import RESULTS, Parser, make_folder, refusals_of
from benchmarks.style import GREY, INK, STYLE
from raco_optim.cli.grid import read_records

# Okabe and Ito's colours, which differ for any colour vision; markers differ in print without
# colour. The sizes let methods show that end up in the same place.
STYLES: dict[str, dict[str, Any]] = {
    "linear": {"color": "#0072B2", "marker": "o", "markersize": 6},
    "cagrad": {"color": "#E69F00", "marker": "s", "markersize": 9, "markerfacecolor": "white"},
    "raco": {"color": "#009E73", "marker": "D", "markersize": 4.5},
    "mgda": {"color": "#CC79A7", "marker": "^", "markersize": 7},
    "amopo": {"color": "#D55E00", "marker": "v", "markersize": 5},
    "modpo": {"color": "#56B4E9", "marker": "X", "markersize": 5},
    "soup": {"color": "#767676", "marker": "o", "markersize": 4, "linestyle": ":"},
    "single": {"color": "#222222", "marker": "*", "markersize": 9, "linestyle": ""},
}


def trade_off(path: Path, summary: Mapping[str, Any]) -> None:
    """Draws every point's held-out accuracies, one panel for each two objectives, as PNG."""
    names = summary["settings"]["objectives"]
    panels = list(itertools.combinations(range(len(names)), 2))
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(4.8 * len(panels) + 0.6 * (len(panels) == 1), 5.0))
        figure.set_layout_engine("constrained")
        for axes, (x, y) in zip(
            np.atleast_1d(figure.subplots(1, len(panels))), panels, strict=True
        ):
            for method, style in STYLES.items():
                points = _accuracies(summary, method)
                if len(points):
                    # With three objectives and more the weights are in no order to draw a line by.
                    line = style if len(names) == 2 else style | {"linestyle": ""}
                    axes.plot(points[:, x], points[:, y], label=TITLES[method], **line)
            axes.plot(0.5, 0.5, "P", color=INK, markersize=7, label="untrained")
            if len(names) == 2:
                _draw_ceiling(axes, summary["held_out"])
            axes.set_xlabel(f"held-out accuracy, {names[x]}")
            axes.set_ylabel(f"held-out accuracy, {names[y]}")
        figure.suptitle(
            f"{summary['settings']['size']}: mean of {len(summary['seeds'])} seeds, "
            "one point per weights",
            color=INK,
            fontsize=11,
        )
        handles, labels = axes.get_legend_handles_labels()
        columns = 3 if len(panels) == 1 else 5
        figure.legend(handles, labels, loc="outside lower center", ncols=columns, frameon=False)
        figure.savefig(path, dpi=160)


def _accuracies(summary: Mapping[str, Any], method: str) -> np.ndarray:
    names = summary["settings"]["objectives"]
    return np.array(
        [
            [point["objectives"][name]["accuracy"]["value"] for name in names]
            for point in summary["points"]
            if point["method"] == method
        ]
    )


def _draw_ceiling(axes: Axes, held_out: Mapping[str, Any]) -> None:
    total = held_out["accuracy_sum"]
    axes.axline((total / 2, total / 2), slope=-1, color=GREY, lw=1, zorder=0)
    axes.text(
        0.98,
        0.98,
        f"out of reach of any model:\nthe objectives disagree\non {held_out['any_conflict']:.0%} "
        "of the pairs",
        transform=axes.transAxes,
        ha="right",
        va="top",
        color=GREY,
    )


def ablation(path: Path, summary: Mapping[str, Any]) -> None:
    """Draws the losses over c, with and without clipping, as PNG."""
    names = summary["settings"]["objectives"]
    zero = [point for point in summary["ablation"] if point["method"] == "linear"]
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(3.4 * (len(names) + 1), 3.6), layout="constrained")
        for axes, name in zip(
            figure.subplots(1, len(names) + 1), [*names, "weighted"], strict=True
        ):
            for method in ("cagrad", "raco"):
                points = zero + [p for p in summary["ablation"] if p["method"] == method]
                found = [
                    p["weighted"]["loss"] if name == "weighted" else p["objectives"][name]["loss"]
                    for p in points
                ]
                values = [e["value"] for e in found]
                bars = np.abs([[e["value"] - e["low"], e["high"] - e["value"]] for e in found]).T
                c = [p["c"] + 0.008 * (method == "raco") for p in points]
                axes.errorbar(c, values, bars, label=TITLES[method], elinewidth=1, **STYLES[method])
            axes.set_xlabel("radius c (0: weighted DPO)")
            axes.set_title(f"held-out loss, {name}", loc="left", fontsize=10, color=INK)
        handles, labels = axes.get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=2, frameon=False)
        figure.savefig(path, dpi=160)


def curves(path: Path, records: Sequence[Mapping[str, Any]]) -> None:
    """Draws the weighted held-out loss along the training, one panel a weight, as PNG."""
    runs: dict[tuple[float, ...], dict[str, list[Any]]] = {}
    for record in records:
        if record["training"].get("curve"):
            point = record["point"]
            at = runs.setdefault(tuple(point["weights"].values()), {})
            at.setdefault(point["method"], []).append(record["training"]["curve"])
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(2.6 * len(runs), 3.2), layout="constrained")
        panels = np.atleast_1d(figure.subplots(1, len(runs)))
        for axes, (weights, by_method) in zip(panels, runs.items(), strict=True):
            for method, found in by_method.items():
                losses = np.array([[losses for _, losses in run] for run in found]).mean(0)
                steps = [step for step, _ in found[0]]
                color = STYLES[method]["color"]
                axes.plot(steps, losses @ np.array(weights), label=TITLES[method], color=color)
            axes.set_title(" / ".join(f"{w:.2g}" for w in weights), fontsize=10, color=INK)
            axes.set_xlabel("step")
        panels[0].set_ylabel("weighted held-out loss")
        handles, labels = panels[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=4, frameon=False)
        figure.savefig(path, dpi=160)


@refusals_of("alignment.figures")
def main(arguments: Sequence[str] | None = None) -> None:
    """Draws all pictures of all studies in benchmarks/results."""
    parser = Parser(prog="python -m benchmarks.alignment.figures")
    parser.add_argument("--output", type=Path, default=Path("build/alignment"), help="folder")
    folder = parser.parse_args(arguments).output
    make_folder(folder, "--output")
    for size, m in itertools.product(TRIALS, OBJECTIVES):
        kept = RESULTS / f"alignment_{size}_{m}.json"
        if not kept.exists():
            continue
        summary = json.loads(kept.read_text())
        trade_off(folder / f"alignment-{size}-{m}.png", summary)
        if summary["ablation"]:
            ablation(folder / f"alignment-{size}-{m}-radius.png", summary)
        if summary["steps_to_reach_over_cagrad"]:
            records = read_records(kept.with_suffix(".jsonl"))
            curves(folder / f"alignment-{size}-{m}-curves.png", records)


if __name__ == "__main__":
    main()
