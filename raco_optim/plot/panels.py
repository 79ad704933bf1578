"""Pictures of the series of a run, each on one pair of axes."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np

from raco_optim.plot.canvas import GREY, INK, draw_curve, finish, legend, look, shortened
from raco_optim.plot.heat_map import draw_heat_map
from raco_optim.plot.moving import moving, window_of
from raco_optim.plot.series import Array, Series

if TYPE_CHECKING:
    from matplotlib.artist import Artist
    from matplotlib.axes import Axes

Draw = Callable[["Axes", Series, int | None], None]

LOSSES = 3  # drawn as curves; more are the rows of a heat map


def draw_cosines(ax: Axes, series: Series, window: int | None) -> None:
    """Draws the cosines between the gradients of every two losses."""
    names, m = series.names, len(series.names)
    if m < 2:
        raise ValueError(
            f"`log` must have at least two losses for cosines; got {list(names)}. Draw another "
            f"picture."
        )
    found = series.cosines()
    pairs = [
        (f"{shortened(names[i])}, {shortened(names[j])}", found[:, i, j])
        for i, j in itertools.combinations(range(m), 2)
    ]
    size = window_of(len(series.steps), window)
    text = "cosine of the gradients"
    if m > LOSSES:
        groups = [[pair] for pair in sorted(pairs, key=lambda pair: _mean(pair[1]))]
        draw_heat_map(ax, series.steps, groups, size, text, limits=(-1, 1))
        _label(ax, size, y="")
    else:
        ax.axhline(0, color=GREY, lw=0.8)
        _draw_lines(ax, series, pairs, size, band=True)
        _label(ax, size, band=True, y=text)


def draw_solution(ax: Axes, series: Series, window: int | None) -> None:
    """Draws p, the clipped p and the weights."""
    from matplotlib.lines import Line2D

    p, clipped, weights = series.solution(), series.clipped(), series.weights()
    if not np.isfinite(p).any():
        raise ValueError(
            "`log` must have p in at least one step; got none, because the rule has no subproblem "
            "or no step was finite. Draw `cosines` or `conflict_rate`."
        )
    size = window_of(len(series.steps), window)
    text = "p, clipped p" if series.clips else "p"
    if len(series.names) > LOSSES:
        groups = [
            [(shortened(name), p[:, i]), (f"{shortened(name)}, clipped", clipped[:, i])][
                : 1 + series.clips
            ]
            for i, name in enumerate(series.names)
        ]
        groups.sort(key=lambda group: -_mean(group[0][1]))
        draw_heat_map(ax, series.steps, groups, size, text, limits=(0, None))
        _label(ax, size, y="")
        return
    entries: list[tuple[str, Artist]] = []
    thin: dict[str, Any] = {"linewidth": 1, "marker": ""}
    for i, name in enumerate(series.names):
        curve = moving(series.steps, p[:, i], size)
        if series.clips:
            draw_curve(ax, curve, i, linestyle="--", **thin)
            upper, curve = curve, moving(series.steps, clipped[:, i], size)
            colour = look(i)["color"]
            ax.fill_between(curve.x, curve.mean, upper.mean, color=colour, alpha=0.15, lw=0)
        draw_curve(ax, curve, i)
        draw_curve(ax, moving(series.steps, weights[:, i], size), i, linestyle=":", **thin)
        entries.append((shortened(name), Line2D([], [], **look(i), markersize=4.5)))
    if series.clips:
        entries.append(("clipped p", Line2D([], [], color=INK, linestyle="-")))
    linestyle = "--" if series.clips else "-"
    entries.append(("p", Line2D([], [], color=INK, linestyle=linestyle, linewidth=1)))  # type: ignore[arg-type]
    entries.append(("weight w", Line2D([], [], color=INK, linestyle=":", linewidth=1)))
    legend(ax, entries)
    ax.set_ylim(bottom=-0.02)
    _label(ax, size, y=f"{text} and weight")


def draw_clip_angle(ax: Axes, series: Series, window: int | None) -> None:
    """Draws the angle by which clipping turned the correction."""
    angle = series.clip_angle
    if not np.isfinite(angle).any():
        raise ValueError(
            "`log` must have a clip angle in at least one step; got none. Only CAGradClip clips. "
            "Draw `cosines` or `conflict_rate`."
        )
    size = window_of(len(series.steps), window)
    draw_curve(ax, moving(series.steps, angle, size), 0, band=size > 1)
    ax.set_ylim(bottom=0)
    _label(ax, size, band=True, y="angle by which clipping turns [°]")


def draw_conflict_rate(ax: Axes, series: Series, window: int | None) -> None:
    """Draws how often losses conflict, and how often the update hurts one."""
    rates = [
        ("two losses conflict", 100 * series.conflicting()),
        ("the update hurts a loss", 100 * series.hurting()),
    ]
    if not any(np.isfinite(rate).any() for _, rate in rates):
        raise ValueError(
            "`log` must have an update in at least one step; got NaN or Inf in all steps. Look for "
            "the cause in the losses."
        )
    size = window_of(len(series.steps), window, least=20)
    _draw_lines(ax, series, rates, size, band=False)
    ax.set_ylim(-3, 103)
    _label(ax, size, y="share of steps [%]")


def _draw_lines(
    ax: Axes, series: Series, values: list[tuple[str, Array]], size: int, *, band: bool
) -> None:
    entries: list[tuple[str, Artist]] = []
    for k, (name, column) in enumerate(values):
        curve = moving(series.steps, column, size)
        entries.append((name, draw_curve(ax, curve, k, band=band and size > 1)))
    legend(ax, entries)


def _label(ax: Axes, size: int, *, y: str, band: bool = False) -> None:
    from matplotlib.ticker import MaxNLocator

    note = "; shaded: the middle half" if band else ""
    finish(ax, x="step" if size == 1 else f"step (means of {size}{note})", y=y)
    ax.xaxis.set_major_locator(MaxNLocator(5, steps=[1, 2, 5, 10], integer=True))


def _mean(x: Array) -> float:
    finite = x[np.isfinite(x)]
    return float(finite.mean()) if len(finite) else 0.0
