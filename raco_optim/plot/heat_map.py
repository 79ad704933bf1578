"""Many curves as the rows of one picture."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from raco_optim.plot.canvas import size_of
from raco_optim.plot.moving import moving
from raco_optim.plot.series import Array

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_LEAST, _MOST = 6.3, 9.5  # height of a row in points, which must fit its name


def draw_heat_map(
    ax: Axes,
    steps: Array,
    groups: Sequence[Sequence[tuple[str, Array]]],
    size: int,
    label: str,
    limits: tuple[float, float | None],
) -> None:
    """Draws each curve as a row, from the top, and says how many do not fit.

    Args:
        ax: Axes to draw into.
        steps: Numbers of the steps, ``[n]``.
        groups: Names and values, ``[n]``, of curves; those of a group stay together.
        size: Number of steps in the mean of a cell.
        label: Label of the colours.
        limits: Values of the first and the last colour; None for the largest value.
    """
    height = size_of(ax)[1]
    fit = max(1, int(height / _LEAST / len(groups[0])))
    rows = [row for group in groups[:fit] for row in group]
    curves = [moving(steps, column, size) for _, column in rows]
    # Cells meet in the middle between two windows.
    x = curves[0].x
    edges = np.concatenate([[steps[0] - 0.5], (x[1:] + x[:-1]) / 2, [steps[-1] + 0.5]])
    # From dark blue to light yellow: larger is lighter, also in black and white.
    mesh = ax.pcolormesh(
        edges,
        np.arange(len(rows) + 1) - 0.5,
        np.ma.masked_invalid([curve.mean for curve in curves]),
        cmap="cividis",
        vmin=limits[0],
        vmax=limits[1],
        rasterized=True,
    )
    names = [name for name, _ in rows]
    ax.set_yticks(range(len(rows)), names, fontsize=0.85 * min(_MOST, height / len(rows)))
    ax.tick_params(axis="y", length=0)
    ax.set_ylim(len(rows) - 0.5, -0.5)
    left_out = len(groups) - fit
    note = f"\n({left_out} more do not fit)" if left_out > 0 else ""
    ax.figure.colorbar(mesh, ax=ax, label=f"{label}{note}")
