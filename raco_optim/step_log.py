"""Logs of steps as JSON lines: a header that names the run, then a report a line."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from raco_optim.report import Outcome, StepReport

_KIND = "step log"
_VERSION = 1
_HEAD = b'{"raco_optim": "' + _KIND.encode()  # every log begins with it


@dataclass(frozen=True)
class StepLog:
    """The steps of one run.

    Attributes:
        run: What tells this run from others, 32 hexadecimal digits.
        steps: Numbers of the steps, ascending.
        reports: What they did.

    Example:
        >>> from raco_optim.step_log import StepLog
        >>> StepLog("0" * 32, steps=(), reports=()).reports
        ()
    """

    run: str
    steps: tuple[int, ...]
    reports: tuple[StepReport, ...]


class Parsed(NamedTuple):
    """What a file holds, as far as it is whole."""

    run: str | None
    steps: tuple[int, ...]
    reports: tuple[StepReport, ...]
    size: int  # in bytes, up to where a line was cut short
    ended: bool  # with a newline


def read_steps(path: str | os.PathLike[str]) -> StepLog:
    """Reads what a `StepLogger` wrote, or is writing.

    A last line that was cut short is left out. Where the numbers of the steps go back, the run went
    on from a checkpoint, and what follows replaces what was there.

    Args:
        path: The file.

    Returns:
        The steps; their reports are those of the optimizer, to the last bit.

    Raises:
        OSError: The file can't be read.
        ValueError: It is no log of a `StepLogger`, it has no steps, or those of several runs.

    Example:
        >>> import tempfile, torch
        >>> from raco_optim import CAGradClip, StepLogger, read_steps
        >>> x = torch.nn.Parameter(torch.tensor([1.0, 1.0]))
        >>> opt = CAGradClip(torch.optim.SGD([x], lr=0.1), weights={"a": 0.5, "b": 0.5})
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     with StepLogger(f"{folder}/steps.jsonl") as logger:
        ...         opt.backward({"a": x[0] ** 2, "b": x[1] ** 2})
        ...         logger.log(opt)
        ...     log = read_steps(f"{folder}/steps.jsonl")
        >>> log.steps, log.reports[0].losses.tolist()
        ((0,), [1.0, 1.0])
    """
    found = parse(Path(path))
    if found.run is None or not found.steps:
        raise ValueError(
            f"`path` must be a log with at least one step; got {str(path)!r}, which has none. Call "
            f"`log` of a StepLogger after each step."
        )
    return StepLog(found.run, found.steps, found.reports)


def parse(path: Path) -> Parsed:
    """Reads a file as `read_steps` does, and allows that there is nothing in it yet."""
    run: str | None = None
    steps: list[int] = []
    reports: list[StepReport] = []
    size, ended = 0, True
    for number, line in enumerate(_lines(path), start=1):
        ended = line.endswith(b"\n")
        try:
            entry = json.loads(line)
        except ValueError as error:
            # Of a file that is no log at all, nobody may drop a line.
            if ended or not (number > 1 or line.startswith(_HEAD) or _HEAD.startswith(line)):
                raise _no_log(path, number) from error
            return Parsed(run, tuple(steps), tuple(reports), size, True)
        if not isinstance(entry, dict) or ("step" in entry and run is None):
            raise _no_log(path, number)
        if "step" not in entry:
            run = _run(entry, run, path, number)
        else:
            try:
                step, report = _decode(entry)
            except (KeyError, TypeError, ValueError) as error:
                raise _no_log(path, number) from error
            while steps and steps[-1] >= step:
                steps.pop()
                reports.pop()
            steps.append(step)
            reports.append(report)
        size += len(line)
    return Parsed(run, tuple(steps), tuple(reports), size, ended)


def header(run: str) -> bytes:
    """Returns the first line of a log."""
    return json.dumps({"raco_optim": _KIND, "version": _VERSION, "run": run}).encode() + b"\n"


def encode(step: int, report: StepReport) -> bytes:
    """Returns the line of a step.

    NaN and infinity, for which JSON has no numbers, are the strings "NaN", "Infinity" and
    "-Infinity".
    """
    entry = {"step": step} | {name: _plain(value) for name, value in vars(report).items()}
    return json.dumps(entry, allow_nan=False).encode() + b"\n"


def _lines(path: Path) -> Iterator[bytes]:
    try:
        with path.open("rb") as file:
            yield from file
    except OSError as error:
        raise OSError(
            f"`path` must be a file that can be read; got {str(path)!r} ({error.strerror})."
        ) from error


def _no_log(path: Path, line: int) -> ValueError:
    return ValueError(
        f"`path` must be a log of a StepLogger; got {str(path)!r}, whose line {line} is not one of "
        f"its lines."
    )


def _run(entry: dict[str, Any], earlier: str | None, path: Path, line: int) -> str:
    run, version = entry.get("run"), entry.get("version")
    if entry.get("raco_optim") != _KIND or not isinstance(run, str) or not isinstance(version, int):
        raise _no_log(path, line)
    if version > _VERSION:
        raise ValueError(
            f"`path` must be a log of version {_VERSION} or older; got version {version} in "
            f"{str(path)!r}. Update raco_optim."
        )
    if earlier not in (None, run):
        raise ValueError(
            f"`path` must be the log of one run; got {str(path)!r}, where another one begins at "
            f"line {line}. Log each run to a file of its own."
        )
    return run


def _plain(value: Any) -> Any:  # noqa: ANN401  # a field of a report
    if isinstance(value, Tensor):
        value = value.tolist()
    if isinstance(value, list | tuple):
        return [_plain(entry) for entry in value]
    if isinstance(value, float) and not math.isfinite(value):
        return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
    return value.name if isinstance(value, Enum) else value


def _decode(entry: dict[str, Any]) -> tuple[int, StepReport]:
    names = tuple(str(name) for name in entry["names"])
    m = len(names)

    def vector(key: str) -> Tensor:
        return _tensor(entry[key], [m])

    report = StepReport(
        names=names,
        weights=vector("weights"),
        gram=_tensor(entry["gram"], [m, m]),
        cosines=_tensor(entry["cosines"], [m, m]),
        p=None if entry["p"] is None else vector("p"),
        p_clipped=None if entry["p_clipped"] is None else vector("p_clipped"),
        coefficients=vector("coefficients"),
        gap=float(entry["gap"]),
        clip_angle=float(entry["clip_angle"]),
        outcome=Outcome[entry["outcome"]],
        losses=vector("losses"),
        absent=tuple(str(name) for name in entry["absent"]),
        skipped=int(entry["skipped"]),
        age=int(entry["age"]),
    )
    return int(entry["step"]), report


def _tensor(value: Any, shape: list[int]) -> Tensor:  # noqa: ANN401  # what a file holds
    tensor = torch.tensor(_floats(value), dtype=torch.float64, device="cpu")
    if list(tensor.shape) != shape:
        raise ValueError(f"shape {list(tensor.shape)} instead of {shape}")
    return tensor


def _floats(value: Any) -> Any:  # noqa: ANN401  # numbers, or lists of lists of them
    return [_floats(entry) for entry in value] if isinstance(value, list) else float(value)
