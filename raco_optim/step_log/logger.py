"""Writes what each step did to a file, without waiting for the device."""

from __future__ import annotations

import dataclasses
import os
import uuid
from collections import deque
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from raco_optim.optimizer import unwrap
from raco_optim.report import StepReport
from raco_optim.step_log import jsonl
from raco_optim.step_log.log import Parsed, encode, header, parse

# Steps that may be under way on a device before it is waited for.
_MOST = 100


class _Unread(NamedTuple):
    """A step whose numbers are on their way to the host."""

    number: int
    report: StepReport
    copies: list[torch.cuda.Event]

    @property
    def arrived(self) -> bool:
        here = all(tensor.is_cpu for tensor in _tensors(self.report).values())
        return here and all(e.query() for e in self.copies)  # type: ignore[no-untyped-call]


class StepLogger:
    """Keeps the report of each step in a file, from which `raco_optim.plot` makes pictures.

    Nothing waits for an accelerator: a step's numbers (a few m x m matrices) are copied while it
    runs, and written by the first `log` that finds them there. A killed process loses only those.
    Each line is a JSON object with the fields of a report, and its `cosines`, `clip_angle` and
    `outcome`; NaN and infinities are the strings "NaN", "Infinity" and "-Infinity". `read_steps`
    turns the lines into reports again.

    Of several processes, which would all write the same, only the first one writes.

    Args:
        path: The file to write, and its folders if need be; it is made by the first `log`.
        resume: Go on with the run that the file holds, if there is one, without a line that was
            cut short. By default a file that exists is refused.

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
        ...     len(path.read_text().splitlines())  # one names the run
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
        """Takes what the last ``backward`` did; nothing if there was none since the last call.

        Args:
            optimizer: A `MultiObjectiveOptimizer`, or a wrapper of one.
            step: Number of the step. Default: one more than the last. A run that goes on from a
                checkpoint tells where it is by its first number.

        Raises:
            OSError: The file can't be written; what was logged is in it, and may be so later.
            TypeError: There is no `MultiObjectiveOptimizer` inside `optimizer`.
            ValueError: `step` is not above the last one, the logger is closed, or the file to go
                on with is no log, or that of other losses.
        """
        if self._closed:
            raise ValueError(
                f"`log` must be called before `close`; got a closed logger of {str(self._path)!r}. "
                f"To go on, make another with resume=True."
            )
        found = unwrap(optimizer)
        last = found.last_step
        if last is None or last is self._seen or not found.is_main:
            return
        if self._file is None:
            self._open(last.names)
        step = self._next if step is None else _checked_step(step, self._least)
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

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        try:
            self.close()
        except Exception:
            # What broke the training says more than what it broke here.
            if error is None:
                raise

    def _write(self, *, wait: bool) -> None:
        while self._unread and (wait or self._unread[0].arrived):
            first = self._unread[0]
            for copy in first.copies:
                copy.synchronize()
            assert self._file is not None
            # Without `sync`: a killed process loses nothing that was written, and every step would
            # wait for the disk.
            self._file.append(encode(first.number, first.report.to_host()))
            self._unread.popleft()

    def _open(self, names: tuple[str, ...]) -> None:
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise jsonl.not_writable(self._path, error) from error
        try:
            file = jsonl.Appender(self._path, new=not self._resume)
        except FileExistsError:
            raise FileExistsError(
                f"`path` must be a new file; got {str(self._path)!r}, which exists. Choose "
                f"another, or pass resume=True to go on with the run that it holds."
            ) from None
        except OSError as error:
            raise jsonl.not_writable(self._path, error) from error
        try:
            self._begin(file, parse(self._path), names)
        except BaseException:
            file.close()
            raise
        self._file = file

    def _begin(self, file: jsonl.Appender, found: Parsed, names: tuple[str, ...]) -> None:
        if found.reports and found.reports[-1].names != names:
            raise ValueError(
                f"`path` must be the log of a run with the losses {list(names)}, to go on with it; "
                f"got {str(self._path)!r}, whose losses are {list(found.reports[-1].names)}. Log "
                f"each run to a file of its own."
            )
        file.cut(found.records)
        if found.run is None:
            file.append(header(uuid.uuid4().hex))
        if found.steps:
            self._next = found.steps[-1] + 1


def _checked_step(step: Any, least: int) -> int:  # noqa: ANN401  # that is what it checks
    if not isinstance(step, int) or isinstance(step, bool) or step < least:
        raise ValueError(
            f"`step` must be an integer of at least {least}, above the last one; got {step!r}."
        )
    return step


def _fetched(number: int, report: StepReport) -> _Unread:
    """Begins to copy a report's tensors to the host.

    They are copied on the host too: a rule may return the same tensor every time.
    """
    events: dict[torch.device, torch.cuda.Event] = {}

    def fetch(tensor: Tensor) -> Tensor:
        # Converted where it is: a conversion on the host would wait for the copy, or not.
        tensor = tensor.detach().to(torch.float64)
        if not tensor.is_cuda:
            return tensor.clone()
        events[tensor.device] = torch.cuda.Event()  # type: ignore[no-untyped-call]
        return tensor.to("cpu", non_blocking=True)

    copies = {name: fetch(tensor) for name, tensor in _tensors(report).items()}
    for device, event in events.items():
        event.record(torch.cuda.current_stream(device))
    copied = dataclasses.replace(report, **copies)  # type: ignore[arg-type]  # tensors for tensors
    return _Unread(number, copied, list(events.values()))


def _tensors(report: StepReport) -> dict[str, Tensor]:
    fields = {field.name: getattr(report, field.name) for field in dataclasses.fields(report)}
    return {name: value for name, value in fields.items() if isinstance(value, Tensor)}
