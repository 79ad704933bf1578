"""Pictures of gradient surgery over the steps of a run."""

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
    """Draws the cosines between the gradients of every two losses over the steps.

    The pairs of up to three losses are lines. More losses give a heat map with a row per pair, the
    strongest conflicts at the top, as many as fit. Steps with an absent loss or a zero gradient are
    left out.

    Args:
        log: A file of a `StepLogger`, a result of `read_steps`, or a sequence of reports.
        window: Number of steps to average in a point. Default: a thirtieth of the run.
        ax: Axes to draw into. Default: those of a new figure.

    Returns:
        The axes.

    Raises:
        ValueError: There are fewer than two losses, no steps, or several runs.
        TypeError: `log` is none of these.
        OSError: The file can't be read.

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
    """Draws p, the clipped p and the weights over the steps; the clipped part is shaded.

    Up to three losses are lines. More losses give a heat map with a row per loss, the largest p at
    the top, as many as fit. If nothing was clipped (CAGrad, MGDA), only p is drawn.

    Args:
        log: See `cosines`.
        window: See `cosines`.
        ax: See `cosines`.

    Returns:
        The axes.

    Raises:
        ValueError: No step has a p, there are no steps, or several runs.
        TypeError: See `cosines`.
        OSError: See `cosines`.

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
    """Draws the angle by which clipping turned the correction, over the steps.

    The angle is 0 if clipping only rescaled the correction.

    Args:
        log: See `cosines`.
        window: See `cosines`.
        ax: See `cosines`.

    Returns:
        The axes.

    Raises:
        ValueError: No step has this angle, there are no steps, or several runs.
        TypeError: See `cosines`.
        OSError: See `cosines`.

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
    """Draws how often two losses conflict, and how often the update hurts a loss.

    Two losses conflict if their gradients have a negative inner product; the update hurts a loss if
    its gradient and the update do. Steps without an update, because of NaN or Inf, are left out.

    Args:
        log: See `cosines`.
        window: See `cosines`; the default is at least 20.
        ax: See `cosines`.

    Returns:
        The axes.

    Raises:
        ValueError: No step was finite, there are no steps, or several runs.
        TypeError: See `cosines`.
        OSError: See `cosines`.

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
    """Draws `cosines`, `solution`, `clip_angle` and `conflict_rate`, as far as the run has them.

    Args:
        log: See `cosines`.
        window: See `cosines`.

    Returns:
        The figure.

    Raises:
        ValueError: There are no steps, or several runs.
        TypeError: See `cosines`.
        OSError: See `cosines`.

    Example:
        >>> import torch
        >>> from raco_optim import LinearScalarization, plot
        >>> x = torch.nn.Parameter(torch.tensor([1.0, 1.0]))
        >>> opt = LinearScalarization(torch.optim.SGD([x], lr=0.1), {"a": 0.5, "b": 0.5})
        >>> opt.backward({"a": x[0] ** 2, "b": (x[1] - 2) ** 2})
        >>> len(plot.overview([opt.report]).axes)  # this rule has no p
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
