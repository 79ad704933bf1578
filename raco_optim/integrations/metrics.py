"""Sums over the batches of all processes, and the means that a log shows."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from raco_optim.distributed.group import Group
from raco_optim.report import StepReport


def objective_sums(
    losses: Sequence[Tensor | None], margins: Sequence[Tensor], divisors: Tensor
) -> Tensor:
    """Sums over the labelled pairs of a batch, ``[m, 4]``; they add up over batches.

    Args:
        losses: m losses, each a sum over labelled pairs divided by its divisor; None for one that
            was not computed.
        margins: m vectors with the reward margins of the labelled pairs.
        divisors: ``[m]``.

    Returns:
        A row per objective: loss, margin, pairs with a positive margin (0 counts half), pairs; on
        the device of the margins.
    """
    zero = margins[0].new_zeros((), dtype=torch.float64)
    rows = []
    for loss, margin, divisor in zip(losses, margins, divisors, strict=True):
        margin = margin.detach().double()
        unknown = zero + (math.nan if len(margin) else 0.0)  # labelled, but not minimised (MODPO)
        rows.append(
            torch.stack(
                [
                    unknown if loss is None else loss.detach() * divisor,
                    margin.sum(),
                    ((1 + margin.sign()) / 2).sum(),
                    zero + len(margin),
                ]
            )
        )
    return torch.stack(rows)


class Log:
    """Gathers what is logged of the objectives, over the pairs of all processes, and of the steps.

    Pairs of training and of evaluation are kept apart.

    Args:
        weights: Weights of the objectives in evaluations.
        group: The processes; None for one on its own.
        device: Where sums are kept, and sent to other processes.
    """

    def __init__(
        self, weights: Mapping[str, float], group: Group | None, device: torch.device
    ) -> None:
        self._weights = dict(weights)
        self._group = group
        self._zero = torch.zeros(len(weights), 4, dtype=torch.float64, device=device)
        self._here = {True: self._zero, False: self._zero}
        self._everywhere: dict[bool, Tensor] = {}
        self._steps: dict[str, list[float]] = {}
        self._skipped = 0

    def begin(self, *, training: bool) -> None:
        """Begins a step or an evaluation, and drops the pairs of one that was not ended."""
        self._here[training] = self._zero

    def add(
        self,
        losses: Sequence[Tensor | None],
        margins: Sequence[Tensor],
        divisors: Tensor,
        *,
        training: bool,
    ) -> None:
        """Takes a batch of this process; see `objective_sums`."""
        sums = objective_sums(losses, margins, divisors)
        self._here[training] = self._here[training] + sums.to(self._zero.device)

    def end(self, *, training: bool) -> None:
        """Ends a step or an evaluation; all processes must call it."""
        sums = self._here[training]
        if self._group is not None:
            sums = self._group.sum([sums], sums.device)[0].view_as(sums)
        earlier = self._everywhere.get(training)
        self._everywhere[training] = sums if earlier is None else earlier + sums
        self._here[training] = self._zero

    def add_step(self, report: StepReport) -> None:
        """Takes the report of a training step; the pairs of a skipped one are dropped."""
        self._skipped = report.skipped
        if report.skip:
            self.begin(training=True)
            return
        for key, value in step_values(report).items():
            if not math.isnan(value):
                self._steps.setdefault(key, []).append(value)

    def clear(self) -> None:
        """Forgets what was not logged of the training."""
        self._everywhere.pop(True, None)
        self._steps.clear()

    def write(self, logs: dict[str, float], *, training: bool) -> None:
        """Adds the means since the last call."""
        # "eval_", or "eval_<name>_" where there are several data sets.
        prefix = "" if training else next((k[:-4] for k in logs if k.endswith("_loss")), "eval_")
        if training in self._everywhere:
            means = objective_means(list(self._weights), self._everywhere.pop(training))
            logs.update({prefix + key: value for key, value in means.items()})
            if not training:  # over all pairs; the Trainer's is a mean over batches
                logs[f"{prefix}loss"] = math.fsum(
                    w * means.get(f"loss/{name}", math.nan)
                    for name, w in self._weights.items()
                    if w
                )
        if training:
            logs.update({key: math.fsum(x) / len(x) for key, x in self._steps.items()})
            self._steps.clear()
            if self._skipped:
                logs["skipped"] = self._skipped


def objective_means(names: Sequence[str], sums: Tensor) -> dict[str, float]:
    """Means over the labelled pairs, and their number; nothing for an objective without any."""
    means = {}
    for name, (loss, margin, right, pairs) in zip(names, sums.tolist(), strict=True):
        if pairs:
            if not math.isnan(loss):
                means[f"loss/{name}"] = loss / pairs
            means[f"margin/{name}"] = margin / pairs
            means[f"accuracy/{name}"] = right / pairs
        means[f"labelled/{name}"] = pairs
    return means


def step_values(report: StepReport) -> dict[str, float]:
    """Returns the numbers of a report by name, NaN where undefined; none of absent objectives."""
    found = {
        "clip_angle": report.clip_angle,
        "gap": math.nan if report.gap is None else float(report.gap),
        "hurting": float(report.hurting),
        "conflicting": float(report.conflicting),
    }
    cosines = report.cosines
    vectors = {
        "grad_norm": report.norms,
        "alpha": report.coefficients,
        "p": report.p,
        "p_clipped": report.p_clipped,
    }
    present = [(i, name) for i, name in enumerate(report.names) if name not in report.absent]
    for i, a in present:
        for key, vector in vectors.items():
            if vector is not None:
                found[f"{key}/{a}"] = float(vector[i])
        for j, b in present:
            if j < i:
                found[f"cosine/{b}/{a}"] = float(cosines[j, i])
    return found
