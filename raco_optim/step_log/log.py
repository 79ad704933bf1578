"""Step logs as JSON lines: a header that names the run, then one report per line."""

from __future__ import annotations

import dataclasses
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from raco_optim.report import StepReport
from raco_optim.step_log import jsonl

_KIND = "step log"
_VERSION = 1
_HEAD = b'{"raco_optim": "' + _KIND.encode()  # every log begins with it


@dataclass(frozen=True)
class StepLog:
    """The steps of one run.

    Attributes:
        run: Identifier of the run, 32 hexadecimal digits.
        steps: Numbers of the steps, ascending.
        reports: Their reports.

    Example:
        >>> from raco_optim.step_log import StepLog
        >>> StepLog("0" * 32, steps=(), reports=()).reports
        ()
    """

    run: str
    steps: tuple[int, ...]
    reports: tuple[StepReport, ...]


def read_steps(path: str | os.PathLike[str]) -> StepLog:
    """Reads the file of a `StepLogger`, also while it is written.

    An incomplete last line is ignored. If the run resumed from a checkpoint, its new steps replace
    the earlier ones with the same numbers.

    Args:
        path: The file.

    Returns:
        The steps; the reports equal the optimizer's bit by bit.

    Raises:
        OSError: The file can't be read.
        ValueError: The file is not a log of a `StepLogger`, has no steps, or has several runs.

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
    log, _ = parse(Path(path))
    if not log.steps:
        raise ValueError(
            f"`path` must be a log with at least one step; got {str(path)!r}, which has none. Call "
            f"`StepLogger.log` after each step."
        )
    return log


def parse(path: Path) -> tuple[StepLog, jsonl.Records]:
    """Returns the log, with the run "" if the file is empty, and the lines of the file."""
    try:
        records = jsonl.read(path)
    except OSError as error:
        raise OSError(
            f"`path` must be a readable file; got {str(path)!r} ({error.strerror})."
        ) from error
    except jsonl.BadLine as error:
        raise _no_log(path, error.number) from error
    run = ""
    steps: list[int] = []
    reports: list[StepReport] = []
    for number, entry in enumerate(records.entries, start=1):
        if not isinstance(entry, dict) or ("step" in entry and not run):
            raise _no_log(path, number)
        if "step" not in entry:
            run = _run(entry, run, path, number)
            continue
        try:
            report = _decode(entry)
        except (KeyError, TypeError, ValueError) as error:
            raise _no_log(path, number) from error
        while steps and steps[-1] >= entry["step"]:
            steps.pop()
            reports.pop()
        steps.append(entry["step"])
        reports.append(report)
    # The torn line may belong to another kind of file, which must not be changed.
    if not run and not jsonl.may_begin(records.torn, _HEAD):
        raise _no_log(path, 1)
    return StepLog(run, tuple(steps), tuple(reports)), records


def header(run: str) -> dict[str, Any]:
    """Returns the first record of a log."""
    return {"raco_optim": _KIND, "version": _VERSION, "run": run}


def encode(step: int, report: StepReport) -> dict[str, Any]:
    """Returns the record of a step: the fields of its report, and values for other readers."""
    entry = {"step": step} | vars(report)
    entry |= {"cosines": report.cosines, "clip_angle": report.clip_angle}
    entry["outcome"] = report.outcome.name
    numbers = {k: v.tolist() if isinstance(v, Tensor) else v for k, v in entry.items()}
    record: dict[str, Any] = jsonl.plain(numbers)
    return record


def _no_log(path: Path, line: int) -> ValueError:
    return ValueError(
        f"`path` must be a log of a StepLogger; got {str(path)!r}, whose line {line} is something "
        f"else."
    )


def _run(entry: dict[str, Any], earlier: str, path: Path, line: int) -> str:
    run, version = entry.get("run"), entry.get("version")
    known = entry.get("raco_optim") == _KIND and isinstance(run, str) and run
    if not known or not isinstance(version, int):
        raise _no_log(path, line)
    if version > _VERSION:
        raise ValueError(
            f"`path` must be a log of version {_VERSION} or older; got version {version} in "
            f"{str(path)!r}. Update raco_optim."
        )
    if earlier not in ("", run):
        raise ValueError(
            f"`path` must be the log of one run; got {str(path)!r}, where another run begins at "
            f"line {line}. Use a separate file for each run."
        )
    return str(run)


# Types of the fields that are not floats.
_TYPES: dict[str, type] = dict.fromkeys(("step", "skipped", "gram_age"), int)
_TYPES |= {"names": list, "absent": list, "skip": bool, "gradients": str}


def _decode(entry: dict[str, Any]) -> StepReport:
    """Returns the report of a record; its properties are computed again."""
    for name, kind in _TYPES.items():
        if type(entry[name]) is not kind:
            raise TypeError(f"{entry[name]!r} instead of {kind.__name__}")
    names, absent = tuple(entry["names"]), tuple(entry["absent"])
    if not all(isinstance(name, str) for name in (*names, *absent)):
        raise TypeError(f"{names} and {absent} instead of strings")
    fields = {field.name: entry[field.name] for field in dataclasses.fields(StepReport)}
    fields |= {"names": names, "absent": absent, "gap": float(entry["gap"])}
    m = len(names)
    for name in ("weights", "gram", "coefficients", "losses", "p", "p_clipped"):
        if fields[name] is not None or name not in ("p", "p_clipped"):
            tensor = torch.tensor(_floats(fields[name]), dtype=torch.float64, device="cpu")
            if list(tensor.shape) != ([m, m] if name == "gram" else [m]):
                raise ValueError(f"{name} has shape {list(tensor.shape)}")
            fields[name] = tensor
    return StepReport(**fields)


def _floats(value: Any) -> Any:  # noqa: ANN401  # numbers, or lists of lists of them
    return [_floats(entry) for entry in value] if isinstance(value, list) else float(value)
