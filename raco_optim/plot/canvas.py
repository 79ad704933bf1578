"""Axes, colours, legends and files that all pictures share."""

from __future__ import annotations

import contextlib
import io
import itertools
import os
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.artist import Artist
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

    from raco_optim.plot.moving import Curve

# Okabe and Ito's colours, which are distinct for any colour vision; markers and dashes are
# distinct in black and white.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#882255", "#000000")
MARKERS = ("o", "s", "D", "^", "v", "P", "X", "*")
INK, GREY, PALE = "#222222", "#767676", "#e5e5e5"
# A dollar sign in a user's name does not start a formula.
_TEXT = {"text.parse_math": False}
_OWN = {
    **_TEXT,
    "font.size": 9,
    "xtick.labelsize": 8,
    "ytick.labelsize": 8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": GREY,
    "lines.linewidth": 1.4,
}
SIZE = (5.2, 3.3)  # inches
_LONGEST = 24  # characters of a name
_NAME = "raco_optim name"  # marks names of points
_NEAR = 0.06  # distance, in widths of the data, at which names overlap


@contextlib.contextmanager
def style(*, own: bool = True) -> Iterator[None]:
    """Sets matplotlib up for a picture for a while; `own` is False for a figure of the user."""
    try:
        import matplotlib
    except ImportError as error:
        raise ImportError(
            "`raco_optim.plot` must have matplotlib installed; got none. Run `pip install "
            '"raco_optim[plot]"`.'
        ) from error
    with matplotlib.rc_context(_OWN if own else _TEXT):  # type: ignore[arg-type]
        yield


@contextlib.contextmanager
def axes_or_new(ax: Axes | None) -> Iterator[Axes]:
    """Yields the given axes, or those of a new figure.

    The figure is not one of pyplot: it opens no window, and is freed with its last reference.
    """
    with style(own=ax is None):
        from matplotlib.axes import Axes

        given: object = new_figure(SIZE).subplots() if ax is None else ax
        if not isinstance(given, Axes):
            raise TypeError(
                f"`ax` must be axes of matplotlib; got {type(ax).__name__}. Leave it out for a new "
                f"figure."
            )
        yield given


def new_figure(size: tuple[float, float]) -> Figure:
    """Returns a new figure with automatic layout."""
    from matplotlib.figure import Figure

    return Figure(figsize=size, layout="constrained")


def look(i: int) -> dict[str, Any]:
    """Returns colour and marker of the i-th series; 56 of them are different."""
    return {"color": COLOURS[i % len(COLOURS)], "marker": MARKERS[(i + i // 8) % len(MARKERS)]}


def draw_curve(
    ax: Axes,
    curve: Curve,
    i: int,
    *,
    band: bool = False,
    **looks: Any,  # noqa: ANN401  # matplotlib's
) -> Line2D:
    """Draws the i-th curve, optionally with its band, and returns its line."""
    # Shifted, so markers of different curves don't overlap.
    every = max(1, len(curve.x) // 7)
    drawn = {**look(i), "markersize": 4.5, "markevery": (i * every // 3 % every, every), **looks}
    if band:
        ax.fill_between(curve.x, curve.low, curve.high, color=drawn["color"], alpha=0.18, lw=0)
    return ax.plot(curve.x, curve.mean, **drawn)[0]


def finish(ax: Axes, *, x: str, y: str) -> None:
    """Labels the axes, and draws a grid behind the data."""
    for axis, text in ((ax.xaxis, x), (ax.yaxis, y)):
        axis.label.set_parse_math(False)
        axis.set_label_text(text)
    ax.grid(axis="y", color=PALE, lw=0.7)
    ax.set_axisbelow(True)


def legend(ax: Axes, entries: Sequence[tuple[str, Artist]]) -> None:
    """Draws a legend above the axes, where it covers no data."""
    labels = [label for label, _ in entries]
    ax.legend(
        [handle for _, handle in entries],
        labels,
        loc="lower left",
        bbox_to_anchor=(0, 1),
        borderaxespad=0.2,
        ncols=_columns(labels, 1.12 * size_of(ax)[0]),  # the layout will make them wider
        frameon=False,
        handlelength=2.4,
        columnspacing=1.4,
    )


def _columns(labels: Sequence[str], width: float) -> int:
    """Returns the number of columns that fit; matplotlib fills a legend by columns."""
    widths = [5.2 * len(label) + 42 for label in labels]  # with a handle, about, in points
    for n in range(len(labels), 1, -1):
        rows, longer = divmod(len(labels), n)
        ends = list(itertools.accumulate([rows + 1] * longer + [rows] * (n - longer), initial=0))
        if sum(max(widths[i:j]) for i, j in itertools.pairwise(ends)) <= width:
            return n
    return 1


def size_of(ax: Axes) -> tuple[float, float]:
    """Returns width and height of the axes in points, before labels take their space."""
    box = ax.get_window_extent()
    points = 72 / ax.figure.dpi
    return box.width * points, box.height * points


def name_point(ax: Axes, point: Sequence[float], text: str) -> None:
    """Writes a name beside a point, below names that are already there."""
    x, y = map(float, point)
    width, height = ax.dataLim.width or 1.0, ax.dataLim.height or 1.0
    there = {
        (a.get_text(), *a.xy)  # type: ignore[attr-defined]
        for a in ax.texts
        if a.get_gid() == _NAME
        and abs(a.xy[0] - x) < _NEAR * width  # type: ignore[attr-defined]
        and abs(a.xy[1] - y) < _NEAR * height  # type: ignore[attr-defined]
    }
    if all(name != text for name, *_ in there):
        ax.annotate(
            text,
            (x, y),
            (7, 4 - 9 * len(there)),
            textcoords="offset points",
            color=INK,
            fontsize=7.5,
            gid=_NAME,
        )


def shortened(name: str) -> str:
    """Returns a name cut to `_LONGEST` characters."""
    return name if len(name) <= _LONGEST else f"{name[: _LONGEST - 1]}…"


def save(picture: Axes | Figure, path: str | os.PathLike[str]) -> None:
    """Writes a picture to a file; readers never see a partial file.

    Args:
        picture: Axes or a figure, as the functions of this module return them.
        path: The file. The suffix sets the format: ``.pdf``, ``.svg``, ``.png`` or any other that
            matplotlib supports.

    Raises:
        OSError: The file can't be written.
        TypeError: `picture` is neither axes nor a figure.
        ValueError: matplotlib does not support the suffix.

    Example:
        >>> import os, tempfile
        >>> from matplotlib.figure import Figure
        >>> from raco_optim import plot
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     plot.save(Figure(), f"{folder}/empty.pdf")
        ...     os.listdir(folder)
        ['empty.pdf']
    """
    import matplotlib
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure, FigureBase

    given: object = picture
    if not isinstance(given, Axes | FigureBase):
        raise TypeError(
            f"`picture` must be axes or a figure of matplotlib; got {type(given).__name__}. Pass "
            f"the picture first, then the path."
        )
    path = Path(path)
    # The figure of a figure is the outermost one.
    figure = picture if isinstance(picture, Figure) else picture.figure.figure
    formats = figure.canvas.get_supported_filetypes()
    kind = path.suffix[1:].lower()
    if kind not in formats:
        raise ValueError(
            f"`path` must end in one of {', '.join(f'.{name}' for name in sorted(formats))}; got "
            f"{str(path)!r}."
        )
    picture_file = io.BytesIO()
    # 42: TrueType fonts, which journals accept and whose text can be selected.
    with matplotlib.rc_context({"pdf.fonttype": 42, "ps.fonttype": 42}):
        figure.savefig(picture_file, format=kind, dpi=200, bbox_inches="tight", pad_inches=0.03)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=path.parent) as folder:
            whole = Path(folder, path.name)
            whole.write_bytes(picture_file.getvalue())
            os.replace(whole, path)
    except OSError as error:
        raise OSError(
            f"`path` must be a writable file; got {str(path)!r} ({error.strerror}). Choose "
            f"another path."
        ) from error
