"""Writes the report of each step to a file, without waiting for the device."""

from __future__ import annotations

import dataclasses
import os
import uuid
from collections import deque
from pathlib import Path
from typing import Any, NamedTuple

import torch

from raco_optim.optimizer import unwrap
from raco_optim.report import StepReport, tensors_of
from raco_optim.step_log import jsonl
from raco_optim.step_log.log import encode, header, parse

# Most steps that may be unread before `log` waits for the device.
_MOST = 100


class _Unread(NamedTuple):
    """A step whose numbers are being copied to the CPU."""

    number: int
    report: StepReport
    copied: torch.cuda.Event | None

    @property
    def arrived(self) -> bool:
        here = all(tensor.is_cpu for tensor in tensors_of(self.report).values())
        return here and (self.copied is None or self.copied.query())  # type: ignore[no-untyped-call]


class StepLogger:
    """Writes the report of each step to a file, for `read_steps` and `raco_optim.plot`.

    It does not wait for an accelerator: the numbers of a step (a few m x m matrices) are copied in
    the background and written by a later `log`. A killed process loses only those. Each line is a
    JSON object with the fields of a report, and its `cosines`, `clip_angle` and `outcome`; NaN and
    infinities are the strings "NaN", "Infinity" and "-Infinity".

    With several processes, only the first one writes.

    Args:
        path: The file to write. The first `log` creates it, and its folders if needed.
        resume: Whether to continue the run in an existing file, without an incomplete last line. By
            default an existing file is an error.

    Example:
        >>> import pathlib, tempfile, torch
        >>> from raco_optim import CAGradClip, StepLogger
        >>> x = torch.nn.Parameter(torch.tensor([1.0, 1.0]))
        >>> opt = CAGradClip(torch.optim.SGD([x], lr=0.1), weights={"a": 0.5, "b": 0.5})
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     path = pathlib.Path(folder, "steps.jsonl")
        ...     with StepLogger(path) as logger:
        ...         for _ in range(3):
        ...             opt.zero_grad()
        ...             opt.backward({"a": x[0] ** 2, "b": x[1] ** 2})
        ...             opt.step()
        ...             logger.log(opt)
        ...     len(path.read_text().splitlines())  # the first line names the run
        4
    """

    def __init__(self, path: str | os.PathLike[str], *, resume: bool = False) -> None:
        self._path = Path(path)
        self._resume = resume
        self._file: jsonl.Appender | None = None
        self._closed = False
        self._unread: deque[_Unread] = deque()
        self._seen: StepReport | None = None
        self._least = self._next = 0

    def log(
        self,
        optimizer: Any,  # noqa: ANN401  # an optimizer or any wrapper of it
        step: int | None = None,
    ) -> None:
        """Logs the last ``backward``; does nothing if there was none since the last call.

        Args:
            optimizer: A `MultiObjectiveOptimizer`, or a wrapper of one.
            step: Number of the step. Default: one more than the last. After resuming from a
                checkpoint, pass the number of the first step.

        Raises:
            OSError: The file can't be written. It keeps all earlier steps; logging may continue.
            TypeError: `optimizer` contains no `MultiObjectiveOptimizer`.
            ValueError: `step` is not above the last one, the logger is closed, or the file to
                resume is not a log or has other losses.
        """
        if self._closed:
            raise ValueError(
                f"`log` must be called before `close`; got a closed logger of {str(self._path)!r}. "
                f"To continue, create another StepLogger with resume=True."
            )
        found = unwrap(optimizer)
        last = found.last_step
        if last is None or last is self._seen or not found.is_main:
            return
        if self._file is None:
            self._open(last.names)
        step = self._next if step is None else step
        if type(step) is not int or step < self._least:
            raise ValueError(
                f"`step` must be an integer of at least {self._least}, above the last one; got "
                f"{step!r}."
            )
        self._unread.append(_fetched(step, last))
        self._seen = last
        self._least = self._next = step + 1
        self._write(wait=len(self._unread) > _MOST)

    def close(self) -> None:
        """Waits for the last steps, writes them, and closes the file."""
        try:
            self._write(wait=True)
        finally:
            self._closed = True
            self._unread.clear()
            if self._file is not None:
                self._file.close()

    def __enter__(self) -> StepLogger:
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        try:
            self.close()
        except Exception:
            # The error of the training matters more.
            if error is None:
                raise

    def _write(self, *, wait: bool) -> None:
        while self._unread and (wait or self._unread[0].arrived):
            first = self._unread[0]
            if first.copied is not None:
                first.copied.synchronize()
            assert self._file is not None
            # Without `sync`, which would wait for the disk: a kill loses nothing that was written.
            self._file.append(encode(first.number, first.report.to_host()))
            self._unread.popleft()

    def _open(self, names: tuple[str, ...]) -> None:
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            self._file = jsonl.Appender(self._path, new=not self._resume)
        except OSError as error:
            # `mkdir` raises the same error if the folder is a file.
            if isinstance(error, FileExistsError) and not self._resume and self._path.exists():
                raise FileExistsError(
                    f"`path` must be a new file; got {str(self._path)!r}, which exists. Choose "
                    f"another, or pass resume=True to continue its run."
                ) from None
            raise jsonl.not_writable(self._path, error) from error
        try:
            self._begin(self._file, names)
        except BaseException:
            self._file.close()
            self._file = None
            raise

    def _begin(self, file: jsonl.Appender, names: tuple[str, ...]) -> None:
        log, records = parse(self._path)
        if log.reports and log.reports[-1].names != names:
            raise ValueError(
                f"`path` must be the log of a run with the losses {list(names)} to continue it; "
                f"got {str(self._path)!r} with the losses {list(log.reports[-1].names)}. Use a "
                f"separate file for each run."
            )
        file.cut(records)
        if not log.run:
            file.append(header(uuid.uuid4().hex))
        if log.steps:
            self._next = log.steps[-1] + 1


def _fetched(number: int, report: StepReport) -> _Unread:
    """Starts copying tensors to the CPU, also from the CPU, where a rule may reuse them."""
    copies: dict[str, Any] = {}
    event = None
    for name, tensor in tensors_of(report).items():
        # Converted on its device: a conversion on the CPU could run before the copy has finished.
        x = tensor.detach().to(torch.float64)
        copies[name] = x.to("cpu", non_blocking=True) if x.is_cuda else x.clone()
        if x.is_cuda:
            event = torch.cuda.Event()  # type: ignore[no-untyped-call]
            event.record(torch.cuda.current_stream(x.device))
    return _Unread(number, dataclasses.replace(report, **copies), event)
