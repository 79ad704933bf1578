"""Writes what each step did to a file, without waiting for the device."""

from __future__ import annotations

import contextlib
import io
import os
import uuid
from collections import deque
from dataclasses import dataclass, replace
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch import Tensor

from raco_optim import step_log
from raco_optim.coefficients import MixingCoefficients
from raco_optim.step import Step, report
from raco_optim.unwrap import inside

# Steps that may be under way on a device before it is waited for.
_MOST = 100


@dataclass(frozen=True)
class _Unread:
    """A step whose numbers are on their way to the host."""

    number: int
    step: Step
    copies: list[torch.cuda.Event]

    @property
    def arrived(self) -> bool:
        mixing = self.step.mixing
        tensors = [self.step.gram, self.step.losses, mixing.coefficients, mixing.p]
        here = all(t is None or t.is_cpu for t in tensors)
        return here and all(e.query() for e in self.copies)  # type: ignore[no-untyped-call]


class StepLogger:
    """Keeps the report of each step in a file, from which `raco_optim.plot` makes pictures.

    Nothing waits for an accelerator: a step's numbers (a few m x m matrices) are copied as it runs,
    and written by the first `log` that finds them there. A killed process loses those alone. Every
    line is a JSON object that a report's fields can be read from; `read_steps` makes reports of it.

    Of several processes, which all would write the same, the first one writes.

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
        self._file: io.FileIO | None = None
        self._size = 0
        self._closed = False
        self._unread: deque[_Unread] = deque()
        self._seen: Step | None = None
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
        found = inside(optimizer)
        last = found.last_step
        if last is None or last is self._seen or not found.processes.first:
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
            self._append(step_log.encode(first.number, report(first.step)))
            self._unread.popleft()

    def _append(self, line: bytes) -> None:
        assert self._file is not None
        if os.fstat(self._file.fileno()).st_size != self._size:
            raise OSError(
                f"`path` must be written by one process at a time; got {str(self._path)!r}, which "
                f"another one has changed. Give each run a file of its own."
            )
        left = memoryview(line)
        try:
            while left:
                left = left[self._file.write(left) :]
        except OSError as error:
            # A part of a line would spoil those that come after it.
            with contextlib.suppress(OSError):
                self._file.truncate(self._size)
                self._file.seek(self._size)
            raise self._not_writable(error) from error
        self._size += len(line)

    def _open(self, names: tuple[str, ...]) -> None:
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            goes_on = self._resume and self._path.exists()
        except OSError as error:
            raise self._not_writable(error) from error
        try:
            self._file = io.FileIO(self._path, "r+" if goes_on else "x")
        except FileExistsError:
            raise FileExistsError(
                f"`path` must be a new file; got {str(self._path)!r}, which exists. Choose "
                f"another, or pass resume=True to go on with the run that it holds."
            ) from None
        except OSError as error:
            raise self._not_writable(error) from error
        try:
            self._begin(step_log.parse(self._path), names)
        except BaseException:
            self._file.close()
            self._file = None
            raise

    def _begin(self, found: step_log.Parsed, names: tuple[str, ...]) -> None:
        assert self._file is not None
        if found.reports and found.reports[-1].names != names:
            raise ValueError(
                f"`path` must be the log of a run with the losses {list(names)}, to go on with it; "
                f"got {str(self._path)!r}, whose losses are {list(found.reports[-1].names)}. Log "
                f"each run to a file of its own."
            )
        self._size = found.size
        try:
            self._file.truncate(found.size)
            self._file.seek(found.size)
        except OSError as error:
            raise self._not_writable(error) from error
        if found.run is None:
            self._append(step_log.header(uuid.uuid4().hex))
        elif not found.ended:
            self._append(b"\n")
        if found.steps:
            self._next = found.steps[-1] + 1

    def _not_writable(self, error: OSError) -> OSError:
        return OSError(
            f"`path` must be a file that can be written; got {str(self._path)!r} "
            f"({error.strerror}). Make room, or choose another."
        )


def _checked_step(step: Any, least: int) -> int:  # noqa: ANN401  # that is what it checks
    if not isinstance(step, int) or isinstance(step, bool) or step < least:
        raise ValueError(
            f"`step` must be an integer of at least {least}, above the last one; got {step!r}."
        )
    return step


def _fetched(number: int, step: Step) -> _Unread:
    """Begins to copy a step's tensors to the host.

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

    mixing = step.mixing
    rest = (None if x is None else fetch(x) for x in (mixing.p, mixing.p_clipped, mixing.gap))
    copied = replace(
        step,
        gram=fetch(step.gram),
        mixing=MixingCoefficients(fetch(mixing.coefficients), *rest),
        losses=fetch(step.losses),
    )
    for device, event in events.items():
        event.record(torch.cuda.current_stream(device))
    return _Unread(number, copied, list(events.values()))
