"""Records of a grid -> pictures, as PNG bytes."""

from __future__ import annotations

import io
import itertools
import math
import statistics
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from raco_optim.cli.cells import Record, cell_of, group_by_point, objectives_of
from raco_optim.cli.statistics import bootstrap_interval, front, hypervolumes
from raco_optim.plot.canvas import GREY, INK, look, new_figure, style

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Pairs of objectives that are drawn: those of six objectives. A taller picture is not read.
PAIRS = 15
PANELS = {"loss": "Held-out loss", "accuracy": "Held-out accuracy"}


def trade_off_figure(records: Sequence[Record]) -> bytes:
    """Draws held-out losses and accuracies, a row for each pair of objectives (of `PAIRS` at most).

    Args:
        records: Records with finite values and two objectives or more.

    Returns:
        A PNG file.

    Example:
        >>> from raco_optim.cli.figures import trade_off_figure
        >>> point = {"method": "linear", "weights": {"a": 0.5, "b": 0.5}, "seed": 0, "c": None}
        >>> scores = {"loss": 0.5, "margin": 0.1, "accuracy": 0.75, "labelled": 4}
        >>> records = [{"point": point, "evaluation": {"a": scores, "b": scores}}]
        >>> trade_off_figure(records)[1:4]
        b'PNG'
    """
    pairs = list(itertools.combinations(objectives_of(records[0]), 2))[:PAIRS]
    with style():
        figure = new_figure((9.2, 4.1 * len(pairs) + 0.5))
        grid = figure.subplots(len(pairs), 2, squeeze=False)
        for row, pair in zip(grid, pairs, strict=True):
            for axes, metric in zip(row, PANELS, strict=True):
                _draw_trade_offs(axes, records, metric, pair)
        handles, labels = grid[0][0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=4, frameon=False)
        return _png(figure)


def hypervolume_figure(records: Sequence[Record]) -> bytes:
    """Draws each method's hypervolumes: every seed, the mean and its interval.

    Args:
        records: Records with finite values.

    Returns:
        A PNG file.

    Example:
        >>> from raco_optim.cli.figures import hypervolume_figure
        >>> point = {"method": "linear", "weights": {"a": 1.0}, "seed": 0, "c": None}
        >>> scores = {"loss": 0.5, "margin": 0.1, "accuracy": 0.75, "labelled": 4}
        >>> hypervolume_figure([{"point": point, "evaluation": {"a": scores}}])[1:4]
        b'PNG'
    """
    looks = _looks(records)
    with style():
        figure = new_figure((9.2, 1.3 + 0.36 * len(looks)))
        grid = figure.subplots(1, 2, sharey=True)
        for axes, metric in zip(grid, PANELS, strict=True):
            found = hypervolumes(records, metric)
            for y, (method, drawn) in enumerate(looks.items()):
                values = list(found[method].values())
                if not values:  # no seed has all of the trade-offs
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
        # With two objectives the weights have an order, and a line shows it.
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
