"""Logs of steps as JSON lines: a header that names the run, then a report a line."""

from __future__ import annotations

import dataclasses
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

from raco_optim.report import StepReport
from raco_optim.step_log import jsonl

_T = TypeVar("_T")

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
    records: jsonl.Records


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
    try:
        records = jsonl.read(path)
    except OSError as error:
        raise OSError(
            f"`path` must be a file that can be read; got {str(path)!r} ({error.strerror})."
        ) from error
    except jsonl.BadLine as error:
        raise _no_log(path, error.number) from error
    for number, entry in enumerate(records.entries, start=1):
        if not isinstance(entry, dict) or ("step" in entry and run is None):
            raise _no_log(path, number)
        if "step" not in entry:
            run = _run(entry, run, path, number)
            continue
        try:
            step, report = _decode(entry)
        except (KeyError, TypeError, ValueError) as error:
            raise _no_log(path, number) from error
        while steps and steps[-1] >= step:
            steps.pop()
            reports.pop()
        steps.append(step)
        reports.append(report)
    # Of a file that is no log at all, nobody may drop a line.
    if run is None and not jsonl.may_begin(records.torn, _HEAD):
        raise _no_log(path, 1)
    return Parsed(run, tuple(steps), tuple(reports), records)


def header(run: str) -> dict[str, Any]:
    """Returns the first record of a log."""
    return {"raco_optim": _KIND, "version": _VERSION, "run": run}


def encode(step: int, report: StepReport) -> dict[str, Any]:
    """Returns the record of a step: the fields of its report, and what other readers want."""
    entry = {"step": step} | {name: getattr(report, name) for name in _FIELDS}
    entry |= {"cosines": report.cosines, "clip_angle": report.clip_angle}
    entry["outcome"] = report.outcome.name
    numbers = {k: v.tolist() if isinstance(v, Tensor) else v for k, v in entry.items()}
    record: dict[str, Any] = jsonl.plain(numbers)
    return record


_FIELDS = tuple(field.name for field in dataclasses.fields(StepReport))


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


def _decode(entry: dict[str, Any]) -> tuple[int, StepReport]:
    """Reads the fields alone: a report computes the rest again."""
    names = _strings(entry["names"])
    m = len(names)

    def vector(key: str) -> Tensor:
        return _tensor(entry[key], [m])

    def typed(key: str, kind: type[_T]) -> _T:
        value = entry[key]
        if type(value) is not kind:
            raise TypeError(f"{value!r} instead of {kind.__name__}")
        return value

    report = StepReport(
        names=names,
        weights=vector("weights"),
        gram=_tensor(entry["gram"], [m, m]),
        p=None if entry["p"] is None else vector("p"),
        p_clipped=None if entry["p_clipped"] is None else vector("p_clipped"),
        coefficients=vector("coefficients"),
        gap=float(entry["gap"]),
        losses=vector("losses"),
        absent=_strings(entry["absent"]),
        skip=typed("skip", bool),
        skipped=typed("skipped", int),
        gram_age=typed("gram_age", int),
        gradients=typed("gradients", str),
    )
    return typed("step", int), report


def _strings(value: Any) -> tuple[str, ...]:  # noqa: ANN401  # what a file holds
    if not isinstance(value, list) or not all(isinstance(entry, str) for entry in value):
        raise ValueError(f"{value!r} instead of a list of names")
    return tuple(value)


def _tensor(value: Any, shape: list[int]) -> Tensor:  # noqa: ANN401  # what a file holds
    tensor = torch.tensor(_floats(value), dtype=torch.float64, device="cpu")
    if list(tensor.shape) != shape:
        raise ValueError(f"shape {list(tensor.shape)} instead of {shape}")
    return tensor


def _floats(value: Any) -> Any:  # noqa: ANN401  # numbers, or lists of lists of them
    return [_floats(entry) for entry in value] if isinstance(value, list) else float(value)
