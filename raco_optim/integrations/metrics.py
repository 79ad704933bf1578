"""Sums over batches, kept on their device, and the means that a log shows."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from raco_optim.step import Step, report


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


class Means:
    """Running means of named values, without what is undefined."""

    def __init__(self) -> None:
        self._sums: dict[str, tuple[float, int]] = {}

    def add(self, values: Mapping[str, float]) -> None:
        """Takes the values of one step."""
        for key, value in values.items():
            if not math.isnan(value):
                total, number = self._sums.get(key, (0.0, 0))
                self._sums[key] = total + value, number + 1

    def pop(self) -> dict[str, float]:
        """Returns the means since the last call."""
        means = {key: total / number for key, (total, number) in self._sums.items()}
        self._sums.clear()
        return means


def step_values(step: Step) -> dict[str, float]:
    """What the report of a training step says, as named numbers; NaN where it is undefined."""
    told = report(step)
    norms = told.gram.diagonal().sqrt()
    found = {
        "clip_angle": told.clip_angle,
        "gap": told.gap,
        "hurting": float(told.hurting),
        "conflicting": float(told.conflicting),
    }
    for i, a in enumerate(step.names):
        if not step.absent[i]:
            found[f"grad_norm/{a}"] = float(norms[i])
        found[f"alpha/{a}"] = float(told.coefficients[i])
        for key, p in (("p", told.p), ("p_clipped", told.p_clipped)):
            if p is not None:
                found[f"{key}/{a}"] = float(p[i])
        for j, b in enumerate(step.names[:i]):
            if not (step.absent[i] or step.absent[j]):
                found[f"cosine/{b}/{a}"] = float(told.cosines[j, i])
    return found
