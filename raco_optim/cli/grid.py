"""Runs a grid of trainings into one JSONL file, a line per run; after a kill it resumes."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from raco_optim.cli.environment import environment
from raco_optim.cli.errors import UsageError
from raco_optim.cli.files import check_writable, held
from raco_optim.cli.records import append, end_last_line, plain, point_key, read_records

__all__ = [
    "WITHOUT_WEIGHTS",
    "WITH_RADIUS",
    "Point",
    "grid_points",
    "point_key",
    "read_records",
    "records_so_far",
    "run_grid",
]

# Methods that have a radius, and methods that ignore weights.
WITH_RADIUS = ("raco", "cagrad")
WITHOUT_WEIGHTS = ("mgda",)


@dataclass(frozen=True)
class Point:
    """One run of a grid.

    Attributes:
        method: Name of the method, as in `MultiObjectiveDPOConfig`.
        weights: Weight of each objective, in the order of the objectives.
        seed: Seed of the run.
        c: Radius of the trust region; None for a method without one.

    Example:
        >>> from raco_optim.cli.grid import Point
        >>> Point("linear", {"helpful": 0.7, "harmless": 0.3}, seed=0).label
        'linear helpful=0.7,harmless=0.3 seed=0'
    """

    method: str
    weights: Mapping[str, float]
    seed: int
    c: float | None = None

    @property
    def label(self) -> str:
        """The point in one line of text."""
        weights = ",".join(f"{name}={weight:g}" for name, weight in self.weights.items())
        radius = "" if self.c is None else f" c={self.c:g}"
        return f"{self.method}{radius} {weights} seed={self.seed}"


def grid_points(
    methods: Iterable[str],
    weights: Sequence[Mapping[str, float]],
    seeds: Iterable[int],
    radii: Sequence[float] = (0.4,),
) -> list[Point]:
    """Returns all combinations of methods, weights and seeds, and of radii for methods with one.

    A method that ignores weights runs once per seed, with equal weights. Seeds change slowest, so a
    grid that is stopped early has all methods for the first seeds.

    Args:
        methods: Names of the methods.
        weights: Mappings from objective to weight, one per trade-off, with equal objectives.
        seeds: Seeds.
        radii: Values of c.

    Returns:
        Distinct points.

    Example:
        >>> from raco_optim.cli.grid import grid_points
        >>> weights = [{"a": 0.8, "b": 0.2}, {"a": 0.5, "b": 0.5}]
        >>> for point in grid_points(["raco", "mgda"], weights, seeds=[0]):
        ...     print(point.label)
        raco c=0.4 a=0.8,b=0.2 seed=0
        mgda a=0.5,b=0.5 seed=0
        raco c=0.4 a=0.5,b=0.5 seed=0
    """
    methods = list(methods)
    points = {}
    for seed in seeds:
        for trade_off in weights:
            for method in methods:
                free = method in WITHOUT_WEIGHTS
                asked = dict.fromkeys(trade_off, 1 / len(trade_off)) if free else dict(trade_off)
                for c in radii if method in WITH_RADIUS else [None]:
                    point = Point(method, asked, seed, c)
                    points[point_key(vars(point))] = point
    return list(points.values())


def run_grid(
    path: Path,
    points: Sequence[Point],
    settings: Mapping[str, Any],
    run: Callable[[Point], dict[str, Any]],
) -> list[dict[str, Any]]:
    """Runs the points that the file has no record of, and appends a record after each run.

    Each record is on the disk before the next run starts. After a kill, call it again: it repeats
    only the run in progress, and drops an incomplete last record.

    Args:
        path: The JSONL file; created if missing.
        points: The runs, in this order.
        settings: Everything that all runs share, as JSON values. It must equal the settings of the
            records in the file.
        run: Trains and evaluates at a point; returns ``"evaluation"`` (loss, margin, accuracy and
            labelled by objective), ``"training"`` and optionally ``"extra"``. Numbers may be
            NumPy's or 0-d tensors. NaN and Inf become null, and values that JSON can't hold their
            ``repr``, with a message.

    Returns:
        The records of `points`, in this order.

    Raises:
        UsageError: The file holds something else or runs with other settings, can't be written,
            or another process writes it. The file is unchanged.
        ValueError: A point occurs twice, JSON can't hold a point or the settings, or `run` returns
            something else.

    Example:
        >>> import pathlib, tempfile
        >>> from raco_optim.cli.grid import Point, run_grid
        >>> def run(point):
        ...     loss = 0.7 - point.weights["a"] / 10
        ...     scores = {"loss": loss, "margin": 0.1, "accuracy": 0.5, "labelled": 8}
        ...     return {"evaluation": {"a": scores}, "training": {"seconds": 0.0}}
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     path = pathlib.Path(folder, "results.jsonl")
        ...     (record,) = run_grid(path, [Point("linear", {"a": 1.0}, 0)], {"steps": 8}, run)
        >>> record["point"]
        {'method': 'linear', 'weights': {'a': 1.0}, 'seed': 0, 'c': None}
    """
    keys = [point_key(vars(point)) for point in points]
    if len(set(keys)) < len(keys):
        raise ValueError(f"`points` must be distinct; got {[point.label for point in points]}.")
    common = plain(settings, "settings")
    check_writable(path, "--output")
    with held(path, "--output"):
        records = records_so_far(path, common)
        done = {point_key(record["point"]): record for record in records}
        end_last_line(path)
        left = [point for point, key in zip(points, keys, strict=True) if key not in done]
        for number, point in enumerate(left, start=len(points) - len(left) + 1):
            sys.stderr.write(f"run {number} of {len(points)}: {point.label}\n")
            result = run(point)
            if not {"evaluation", "training"} <= result.keys():
                raise ValueError(
                    f"`run` must return 'evaluation' and 'training'; got {list(result)}."
                )
            parts = {"point": vars(point), "settings": common, "extra": {}, **result}
            record = plain({**parts, "environment": environment()}, "result", unknown=_as_text)
            append(path, record)
            done[point_key(record["point"])] = record
    return [done[key] for key in keys]


def _as_text(where: str, value: object) -> str:
    """Keeps a value that JSON can't hold as text; the run is over and must not be lost."""
    sys.stderr.write(
        f"{where} is a {type(value).__name__}, which JSON can't hold; saved as text.\n"
    )
    return repr(value)


def records_so_far(path: Path, settings: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Reads the records that a grid can continue from.

    Args:
        path: The JSONL file; it need not exist.
        settings: The settings of the grid; see `run_grid`.

    Raises:
        UsageError: The file holds something else or runs with other settings.

    Example:
        >>> from pathlib import Path
        >>> from raco_optim.cli.grid import records_so_far
        >>> records_so_far(Path("nowhere.jsonl"), {"steps": 8})
        []
    """
    records, asked = read_records(path) if path.exists() else [], plain(settings)
    for record in records:
        _check_settings(path, record["settings"], asked)
    return records


def _check_settings(path: Path, found: Mapping[str, Any], asked: Mapping[str, Any]) -> None:
    if found != asked:
        both = {**found, **asked}
        there, here = (
            ", ".join(
                f"{name} = {settings.get(name, 'unset')!r}"
                for name in both
                if found.get(name, "unset") != asked.get(name, "unset")
            )
            for settings in (found, asked)
        )
        raise UsageError(
            f"{path} holds runs with other settings ({there}) than this command ({here}). "
            f"Choose another file, or use the same settings."
        )
