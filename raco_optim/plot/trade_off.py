"""A picture of the final losses of runs with different weights."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
from torch import Tensor

from raco_optim.pareto import pareto_front
from raco_optim.plot.canvas import GREY, INK, axes_or_new, finish, legend, look, name_point
from raco_optim.plot.series import Array, Log, Series, gather

if TYPE_CHECKING:
    from matplotlib.artist import Artist
    from matplotlib.axes import Axes

_LAST = 10  # the last tenth of the steps is the end of a run
_TICK = 0.07  # half the length of a line of equal weighted loss, in widths of the data
_FRONT = "raco_optim front"  # marks lines of earlier calls


def front(
    runs: Sequence[Log],
    *,
    points: Tensor | npt.ArrayLike | None = None,
    objectives: tuple[str, str] | None = None,
    label: str = "runs",
    ax: Axes | None = None,
) -> Axes:
    """Draws the final losses of runs with different weights, and their Pareto front.

    Each point is labelled with its weights. Runs with the same weights are small dots around their
    mean. A filled marker is on the front; a hollow one is dominated in all m objectives. With two
    objectives, a short line through each point marks equal weighted loss: the point minimises the
    weighted loss where this line touches the front. To compare methods, draw each into the same
    axes with a different label.

    Args:
        runs: Logs, one per run; see `cosines`.
        points: Objective values of the runs, ``[n, m]``, smaller is better, for example losses on
            held-out data. Default: the mean training losses of the last tenth of the steps.
        objectives: The two losses to draw. Default: the first two.
        label: Name of these runs in the legend.
        ax: Axes to draw into. Default: those of a new figure.

    Returns:
        The axes.

    Raises:
        ValueError: There are no runs, the names of their losses differ, there are fewer than two
            objectives, or a point is not finite.
        TypeError: `runs` is not a sequence of logs.
        OSError: A file can't be read.

    Example:
        >>> import torch
        >>> from raco_optim import CAGradClip, plot
        >>> runs = []
        >>> for w in (0.2, 0.5, 0.8):
        ...     x = torch.nn.Parameter(torch.zeros(1))
        ...     opt = CAGradClip(torch.optim.SGD([x], lr=0.2), weights={"a": w, "b": 1 - w})
        ...     reports = []
        ...     for _ in range(20):
        ...         opt.zero_grad()
        ...         opt.backward({"a": (x[0] - 1) ** 2, "b": (x[0] + 1) ** 2})
        ...         opt.step()
        ...         reports.append(opt.report)
        ...     runs.append(reports)
        >>> plot.front(runs).get_xlabel()
        'loss a'
    """
    found = _gather(runs)
    names = found[0].names
    values = _ends(found) if points is None else _checked_points(points, len(found), len(names))
    shown = _columns(objectives, names)
    weights = np.array([run.weights()[-1] for run in found])
    groups, member = np.unique(weights.round(6), axis=0, return_inverse=True)
    member = member.reshape(-1)
    means = np.array([values[member == k].mean(axis=0) for k in range(len(groups))])
    best = pareto_front(means).numpy()
    with axes_or_new(ax) as ax:
        entries = _draw(ax, values[:, shown], means[:, shown], groups, best, label)
        before = ax.get_legend()
        if before is not None:
            handles = zip(before.get_texts(), before.legend_handles, strict=True)
            earlier = [(t.get_text(), h) for t, h in handles if h is not None]
            entries = list(dict(earlier + entries).items())
        legend(ax, entries)
        kind = "loss " if points is None else ""
        finish(ax, x=f"{kind}{names[shown[0]]}", y=f"{kind}{names[shown[1]]}")
    return ax


def _draw(
    ax: Axes, values: Array, means: Array, weights: Array, best: npt.NDArray[np.bool_], label: str
) -> list[tuple[str, Artist]]:
    from matplotlib.lines import Line2D

    before = sum(line.get_gid() == _FRONT for line in ax.get_lines())
    two = weights.shape[1] == 2
    # Smaller markers for later methods, which may cover earlier ones.
    marker = look(before) | {"markersize": max(7.5 - 1.7 * before, 3), "linestyle": ""}
    if len(values) > len(means):
        ax.plot(*values.T, ".", color=marker["color"], alpha=0.5, markersize=3)
    order = np.argsort(means[best][:, 0])
    ax.plot(*means[best][order].T, **marker | {"linestyle": "-" if two else ""}, lw=1, gid=_FRONT)
    ax.plot(*means[~best].T, **marker, markerfacecolor="white")
    ax.margins(0.1)  # room for the names
    span = np.array([ax.dataLim.width or 1.0, ax.dataLim.height or 1.0])
    for point, w in zip(means, weights, strict=True):
        if two:
            along = np.array([w[1], -w[0]])
            along *= _TICK / np.hypot(*(along / span))
            ends = np.transpose([point - along, point + along])
            ax.plot(*ends, color=INK, lw=0.8, scalex=False, scaley=False, zorder=3)
        name_point(ax, point, " / ".join(f"{x:.2g}" for x in w))
    entries: list[tuple[str, Artist]] = [(label, Line2D([], [], **marker))]
    if not best.all():
        hollow = marker | {"color": GREY, "markerfacecolor": "white"}
        entries.append(("dominated", Line2D([], [], **hollow)))
    if two:
        entries.append(("equal weighted loss", Line2D([], [], color=INK, lw=0.8)))
    return entries


def _gather(runs: Sequence[Log]) -> list[Series]:
    if isinstance(runs, str) or not isinstance(runs, Sequence):
        raise TypeError(
            f"`runs` must be a sequence of logs, one per run; got {type(runs).__name__}. Put a "
            f"single log into a list."
        )
    found = [gather(run, f"runs[{k}]") for k, run in enumerate(runs)]
    if not found:
        raise ValueError("`runs` must hold at least one log; got none. Pass one per run.")
    names = found[0].names
    for k, run in enumerate(found):
        if run.names != names:
            raise ValueError(
                f"`runs` must have the same losses; got {list(names)} and, in runs[{k}], "
                f"{list(run.names)}. Draw them separately."
            )
    if len(names) < 2:
        raise ValueError(
            f"`runs` must have at least two losses for a trade-off; got {list(names)}."
        )
    return found


def _ends(runs: Sequence[Series]) -> Array:
    ends = []
    for k, run in enumerate(runs):
        last = run.losses()[-max(1, len(run.reports) // _LAST) :]
        known = ~np.isnan(last)
        with np.errstate(invalid="ignore"):  # a mean of nothing, or of infinities
            end = np.where(known, last, 0).sum(axis=0) / known.sum(axis=0)
        if not np.isfinite(end).all():
            raise ValueError(
                f"`runs` must have finite losses in the last tenth of their steps; got "
                f"{dict(zip(run.names, end.tolist(), strict=True))} in runs[{k}]. Leave it out, or "
                f"pass `points`."
            )
        ends.append(end)
    return np.array(ends)


def _checked_points(points: Tensor | npt.ArrayLike, n: int, m: int) -> Array:
    found = np.asarray(points, dtype=np.float64)
    if found.shape != (n, m) or not np.isfinite(found).all():
        raise ValueError(
            f"`points` must be finite and of shape [{n}, {m}], one row per run and one column per "
            f"loss; got {found.tolist()!r}."
        )
    return found


def _columns(objectives: tuple[str, str] | None, names: tuple[str, ...]) -> list[int]:
    wanted = names[:2] if objectives is None else tuple(objectives)
    if len(set(wanted)) != 2 or not set(wanted) <= set(names):
        raise ValueError(f"`objectives` must be two of {list(names)}; got {objectives!r}.")
    return [names.index(name) for name in wanted]
