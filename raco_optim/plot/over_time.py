"""What surgery does, over the steps of a run."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np

from raco_optim.plot import panels
from raco_optim.plot.canvas import axes_or_new, new_figure, style
from raco_optim.plot.series import Log, gather

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


def cosines(log: Log, *, window: int | None = None, ax: Axes | None = None) -> Axes:
    """Draws the cosines between the gradients of each two losses over the steps.

    The pairs of up to three losses are lines; more are the rows of a heat map, those that conflict
    most at the top, as many as fit the height of the axes. Steps in which a loss is absent, or a
    gradient zero, are left out.

    Args:
        log: A file of a `StepLogger`, what `read_steps` returns, or reports.
        window: Steps whose mean is a point. Default: a thirtieth of the run.
        ax: Axes to draw into. Default: those of a new figure.

    Returns:
        The axes.

    Raises:
        ValueError: There are no two losses, no steps, or those of several runs.
        TypeError, OSError: `log` is none of these, or can't be read.

    Example:
        >>> import torch
        >>> from raco_optim import CAGradClip, plot
        >>> x = torch.nn.Parameter(torch.tensor([1.0, 1.0]))
        >>> opt = CAGradClip(torch.optim.SGD([x], lr=0.1), weights={"a": 0.5, "b": 0.5})
        >>> reports = []
        >>> for _ in range(3):
        ...     opt.zero_grad()
        ...     opt.backward({"a": x[0] ** 2 + x[1], "b": x[1] ** 2})
        ...     opt.step()
        ...     reports.append(opt.report)
        >>> plot.cosines(reports).get_ylabel()
        'cosine of the gradients'
    """
    return _on_axes(panels.draw_cosines, log, window, ax)


def solution(log: Log, *, window: int | None = None, ax: Axes | None = None) -> Axes:
    """Draws p, the clipped p and the weights over the steps; what clipping took is shaded.

    Up to three losses are lines; more are the rows of a heat map, those with the largest p at the
    top, as many as fit. Where nothing was ever clipped (CAGrad, MGDA), there is p alone.

    Args:
        log: See `cosines`.
        window: See `cosines`.
        ax: See `cosines`.

    Returns:
        The axes.

    Raises:
        ValueError: No step has a p, there are no steps, or those of several runs.
        TypeError, OSError: `log` is none of these, or can't be read.

    Example:
        >>> import torch
        >>> from raco_optim import CAGradClip, plot
        >>> x = torch.nn.Parameter(torch.tensor([1.0, 1.0]))
        >>> opt = CAGradClip(torch.optim.SGD([x], lr=0.1), weights={"a": 0.5, "b": 0.5})
        >>> opt.backward({"a": x[0] ** 2, "b": 4 * (x[1] - 2) ** 2})
        >>> plot.solution([opt.report]).get_ylabel()
        'p, clipped p and weight'
    """
    return _on_axes(panels.draw_solution, log, window, ax)


def clip_angle(log: Log, *, window: int | None = None, ax: Axes | None = None) -> Axes:
    """Draws by how much clipping turned the correction, over the steps: 0 where it rescaled it.

    Args:
        log: See `cosines`.
        window: See `cosines`.
        ax: See `cosines`.

    Returns:
        The axes.

    Raises:
        ValueError: No step has this angle, there are no steps, or those of several runs.
        TypeError, OSError: `log` is none of these, or can't be read.

    Example:
        >>> import torch
        >>> from raco_optim import CAGradClip, plot
        >>> x = torch.nn.Parameter(torch.tensor([1.0, 1.0]))
        >>> opt = CAGradClip(torch.optim.SGD([x], lr=0.1), weights={"a": 0.5, "b": 0.5})
        >>> opt.backward({"a": x[0] ** 2, "b": (x[1] - 2) ** 2})
        >>> plot.clip_angle([opt.report]).get_ylabel()
        'angle by which clipping turns [°]'
    """
    return _on_axes(panels.draw_clip_angle, log, window, ax)


def conflict_rate(log: Log, *, window: int | None = None, ax: Axes | None = None) -> Axes:
    """Draws the share of steps in which two losses conflict, and in which the update hurts one.

    To first order: a negative product of two gradients, and of a gradient and the update. Steps
    without an update, because of NaN or Inf, are left out.

    Args:
        log: See `cosines`.
        window: See `cosines`; by default no less than 20.
        ax: See `cosines`.

    Returns:
        The axes.

    Raises:
        ValueError: No step was finite, there are no steps, or those of several runs.
        TypeError, OSError: `log` is none of these, or can't be read.

    Example:
        >>> import torch
        >>> from raco_optim import CAGradClip, plot
        >>> x = torch.nn.Parameter(torch.tensor([1.0, 1.0]))
        >>> opt = CAGradClip(torch.optim.SGD([x], lr=0.1), weights={"a": 0.5, "b": 0.5})
        >>> opt.backward({"a": x[0] ** 2, "b": (x[1] - 2) ** 2})
        >>> plot.conflict_rate([opt.report]).get_ylabel()
        'share of steps [%]'
    """
    return _on_axes(panels.draw_conflict_rate, log, window, ax)


def overview(log: Log, *, window: int | None = None) -> Figure:
    """Draws all that a run has of `cosines`, `solution`, `clip_angle` and `conflict_rate`.

    Args:
        log: See `cosines`.
        window: See `cosines`.

    Returns:
        The figure.

    Raises:
        ValueError: There are no steps, or those of several runs.
        TypeError, OSError: `log` is none of these, or can't be read.

    Example:
        >>> import torch
        >>> from raco_optim import LinearScalarization, plot
        >>> x = torch.nn.Parameter(torch.tensor([1.0, 1.0]))
        >>> opt = LinearScalarization(torch.optim.SGD([x], lr=0.1), {"a": 0.5, "b": 0.5})
        >>> opt.backward({"a": x[0] ** 2, "b": (x[1] - 2) ** 2})
        >>> len(plot.overview([opt.report]).axes)  # there is no p, and so no clipping
        2
    """
    series = gather(log)
    drawn: list[panels.Draw] = []
    if len(series.names) > 1:
        drawn.append(panels.draw_cosines)
    if np.isfinite(series.solution()).any():
        drawn.append(panels.draw_solution)
    if series.clips and np.isfinite(series.clip_angle).any():
        drawn.append(panels.draw_clip_angle)
    drawn.append(panels.draw_conflict_rate)
    columns = min(2, len(drawn))
    rows = math.ceil(len(drawn) / columns)
    with style():
        figure = new_figure((4.6 * columns, 3.0 * rows))
        grid = figure.subplots(rows, columns, squeeze=False).flatten()
        for draw, ax in zip(drawn, grid, strict=False):
            draw(ax, series, window)
        for ax in grid[len(drawn) :]:
            ax.remove()
    return figure


def _on_axes(draw: panels.Draw, log: Log, window: int | None, ax: Axes | None) -> Axes:
    series = gather(log)
    with axes_or_new(ax) as ax:
        draw(ax, series, window)
    return ax
