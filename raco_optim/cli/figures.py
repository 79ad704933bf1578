"""Figures of a grid's results, as PNG bytes."""

from __future__ import annotations

import io
import itertools
import math
import statistics
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from raco_optim.cli.cells import Record, cell_of, group_by_point, objectives_of
from raco_optim.cli.statistics import bootstrap_interval, front, hypervolumes
from raco_optim.plot.canvas import GREY, INK, look, name_point, new_figure, style

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# A larger matrix of panels would be unreadable.
OBJECTIVES = 6
PANELS = {"loss": "Held-out loss", "accuracy": "Held-out accuracy"}


def trade_off_figure(records: Sequence[Record]) -> bytes:
    """Draws held-out losses and accuracies of every two objectives (of `OBJECTIVES` at most).

    Two objectives give two panels side by side; more give a matrix of panels, losses below the
    diagonal and accuracies above it.
    """
    names = objectives_of(records[0])[:OBJECTIVES]
    m = len(names)
    with style():
        figure = new_figure((9.2, 4.6) if m == 2 else (2.6 * m + 1, 2.3 * m + 1))
        if m == 2:
            grid = figure.subplots(1, 2, squeeze=False)
            for axes, metric in zip(grid[0], PANELS, strict=True):
                _draw_trade_offs(axes, records, metric, (names[0], names[1]))
            with_data = grid[0][0]
        else:
            grid = figure.subplots(m, m, squeeze=False)
            for i, j in itertools.product(range(m), repeat=2):
                if i == j:
                    grid[i][j].axis("off")
                    grid[i][j].text(
                        0.5, 0.5, names[i], ha="center", va="center", color=INK, wrap=True
                    )
                else:
                    metric = "loss" if i > j else "accuracy"
                    _draw_trade_offs(grid[i][j], records, metric, (names[j], names[i]))
            with_data = grid[1][0]
        handles, labels = with_data.get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=4, frameon=False)
        return _png(figure)


def hypervolume_figure(records: Sequence[Record]) -> bytes:
    """Draws the hypervolumes of each method: every seed, the mean and its interval."""
    looks = _looks(records)
    with style():
        figure = new_figure((9.2, 1.3 + 0.36 * len(looks)))
        grid = figure.subplots(1, 2, sharey=True)
        for axes, metric in zip(grid, PANELS, strict=True):
            found = hypervolumes(records, metric)
            for y, (method, drawn) in enumerate(looks.items()):
                values = list(found[method].values())
                if not values:  # no seed has all trade-offs
                    continue
                colour = drawn["color"]
                mean, low, high = bootstrap_interval(values)
                axes.plot(values, [y] * len(values), "|", color=colour, alpha=0.6, markersize=9)
                if not math.isnan(low):
                    axes.plot([low, high], [y, y], color=colour, lw=2)
                axes.plot(mean, y, **drawn, markersize=7)
            _set_title(axes, PANELS[metric])
            axes.set_xlabel(f"hypervolume of the {metric} (larger is better)")
            axes.set_yticks(range(len(looks)), list(looks))
        grid[0].set_ylim(len(looks) - 0.5, -0.5)
        return _png(figure)


def _draw_trade_offs(
    axes: Axes, records: Sequence[Record], metric: str, pair: tuple[str, str]
) -> None:
    _set_title(axes, PANELS[metric])
    for method, drawn in _looks(records).items():
        of_method = [record for record in records if cell_of(record).method == method]
        x, y = _columns(of_method, metric, pair)
        axes.scatter(x, y, 9, **drawn, alpha=0.45, lw=0)
        groups = sorted(group_by_point(of_method).items(), key=lambda item: item[0].weights or ())
        means = [
            [statistics.fmean(column) for column in _columns(group, metric, pair)]
            for _, group in groups
        ]
        # Only with two objectives do the weights have an order, shown by a line.
        two = len(objectives_of(records[0])) == 2
        axes.plot(
            *zip(*means, strict=True),
            **drawn,
            markersize=6.5,
            markeredgecolor="white",
            markeredgewidth=0.6,
            linestyle="-" if two and len(means) > 1 else "",
            label=method,
            zorder=3,
        )
        for (cell, _), mean in zip(groups, means, strict=True):
            if cell.weights is not None:
                name_point(axes, mean, " / ".join(f"{weight:.2g}" for _, weight in cell.weights))
    best = [r for r, is_best in zip(records, front(records, metric), strict=True) if is_best]
    label = "not dominated by any run"
    ring: dict[str, Any] = {"facecolors": "none", "edgecolors": INK, "linewidths": 0.8}
    x, y = _columns(best, metric, pair)
    axes.scatter(x, y, 70, **ring, label=label, zorder=4)
    axes.set_xlabel(f"{metric} on {pair[0]}")
    axes.set_ylabel(f"{metric} on {pair[1]}")
    low = metric == "loss"  # is better
    axes.text(
        0.02 if low else 0.98,
        0.02 if low else 0.98,
        "↙ better" if low else "better ↗",
        transform=axes.transAxes,
        ha="left" if low else "right",
        va="bottom" if low else "top",
        color=GREY,
    )


def _looks(records: Sequence[Record]) -> dict[str, dict[str, Any]]:
    methods = dict.fromkeys(cell.method for cell in group_by_point(records))
    return {method: look(i) for i, method in enumerate(methods)}


def _columns(
    records: Sequence[Record], metric: str, pair: tuple[str, str]
) -> tuple[list[float], list[float]]:
    first, second = ([r["evaluation"][name][metric] for r in records] for name in pair)
    return first, second


def _set_title(axes: Axes, title: str) -> None:
    axes.set_title(title, loc="left", color=INK, fontsize=11)


def _png(figure: Figure) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=160)
    return buffer.getvalue()
