"""The steps of a log as arrays."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from raco_optim.report import StepReport
from raco_optim.step_log import StepLog, read_steps

Log = str | os.PathLike[str] | StepLog | Sequence[StepReport]
Array = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Series:
    """The n steps of a run with m losses."""

    names: tuple[str, ...]
    steps: Array
    reports: tuple[StepReport, ...]

    def losses(self) -> Array:
        """Returns the values of the losses, ``[n, m]``; NaN for an absent one."""
        return self._stack(lambda report: report.losses)

    def weights(self) -> Array:
        """Returns the user's weights, ``[n, m]``."""
        return self._stack(lambda report: report.weights)

    def cosines(self) -> Array:
        """Returns the cosines of the gradients, ``[n, m, m]``.

        NaN if a gradient is zero or not finite or its loss absent; a report may have 0 there, which
        would look like orthogonal gradients.
        """

        def defined(report: StepReport) -> Tensor:
            squares = report.gram.diagonal()
            known = (squares > 0) & squares.isfinite()
            return torch.where(known[:, None] & known, report.cosines, math.nan)

        return self._stack(defined)

    def solution(self) -> Array:
        """Returns p, ``[n, m]``; NaN for an absent loss and for a step without p."""
        return self._stack(lambda report: self._or_nan(report.p))

    def clipped(self) -> Array:
        """Returns the clipped p, ``[n, m]``; NaN as in `solution`."""
        return self._stack(lambda report: self._or_nan(report.p_clipped))

    @cached_property
    def clips(self) -> bool:
        """Whether p was ever clipped."""
        clipped = self.clipped()
        known = np.isfinite(clipped)
        return bool((clipped[known] != self.solution()[known]).any())

    @cached_property
    def clip_angle(self) -> Array:
        """Degrees by which clipping turned the correction, ``[n]``; NaN where undefined."""
        # With x = 1 - cos, arccos(1 - x) would be inaccurate for small angles.
        turned = np.array([report.clip_angle for report in self.reports])
        angle: Array = np.degrees(2 * np.arcsin(np.sqrt(turned.clip(0, 2) / 2)))
        return angle

    def conflicting(self) -> Array:
        """Returns 1 for a step with a conflict, else 0, ``[n]``; NaN for a step without update."""
        return self._shares(lambda report: report.conflicting)

    def hurting(self) -> Array:
        """Returns 1 for a step that raises a loss to first order, else 0, as `conflicting`."""
        return self._shares(lambda report: report.hurting)

    def _stack(self, of: Callable[[StepReport], Tensor]) -> Array:
        return torch.stack([of(report) for report in self.reports]).numpy()

    def _or_nan(self, x: Tensor | None) -> Tensor:
        return torch.full([len(self.names)], math.nan, dtype=torch.float64) if x is None else x

    @cached_property
    def _updates(self) -> Array:
        """1 for a step with a finite update, else NaN, ``[n]``."""
        skipped = np.array([report.skip for report in self.reports])
        absent = np.array([[x in report.absent for x in self.names] for report in self.reports])
        finite = np.isfinite(self._stack(lambda report: report.gram)).all(axis=(1, 2))
        finite &= np.isfinite(self._stack(lambda report: report.coefficients)).all(axis=1)
        finite &= (np.isfinite(self.losses()) | absent).all(axis=1) & ~skipped
        return np.where(finite, 1.0, math.nan)

    def _shares(self, of: Callable[[StepReport], bool]) -> Array:
        found = np.array([of(report) for report in self.reports], dtype=np.float64)
        return self._updates * found


def gather(log: Log, argument: str = "log") -> Series:
    """Returns the steps of a log, or raises unless it holds one run with at least one step."""
    if isinstance(log, str | os.PathLike):
        log = read_steps(log)
    if isinstance(log, StepLog):
        steps, reports = log.steps, log.reports
    else:
        reports = _reports(log, argument)
        steps = tuple(range(len(reports)))
    if not reports:
        raise ValueError(
            f"`{argument}` must hold at least one step; got none. Collect `report` after each "
            f"step, or use a StepLogger."
        )
    names = reports[0].names
    for step, report in zip(steps, reports, strict=True):
        if report.names != names:
            raise ValueError(
                f"`{argument}` must be one run; got the losses {list(names)} and, in step {step}, "
                f"{list(report.names)}. Draw each run separately."
            )
    return Series(names, np.array(steps, dtype=np.float64), reports)


def _reports(log: object, argument: str) -> tuple[StepReport, ...]:
    rule = (
        f"`{argument}` must be the path of a StepLogger's file, a result of `read_steps`, or a "
        f"sequence of StepReports"
    )
    if not isinstance(log, Sequence):
        raise TypeError(f"{rule}; got {type(log).__name__}.")
    for report in log:
        if not isinstance(report, StepReport):
            raise TypeError(f"{rule}; got a sequence with {type(report).__name__}.")
    return tuple(log)
