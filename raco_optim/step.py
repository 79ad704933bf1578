"""The stages in a row: what the optimizer wrapper, and any trainer with its own loop, calls."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from raco_optim.coefficients import MixingCoefficients
from raco_optim.combine import add_combined_gradient
from raco_optim.gradients import Gradient, Loss, iterate_gradients
from raco_optim.gram import gram_matrix
from raco_optim.report import StepReport, make_report

Rule = Callable[[Tensor], Tensor | MixingCoefficients]
NonFinite = Literal["raise", "skip", "propagate"]
NONFINITE = ("raise", "skip", "propagate")


@dataclass
class Gradients:
    """Per-loss values and gradients, summed over the micro-batches of one step."""

    names: tuple[str, ...]
    values: list[Tensor | None]
    rows: list[Gradient]
    named: bool = False
    """Whether the user named the losses, or their positions do."""


@dataclass(frozen=True)
class Step:
    """What a step computed, as it was left on its device."""

    names: tuple[str, ...]
    weights: list[float]
    gram: Tensor
    mixing: MixingCoefficients
    losses: Tensor
    absent: list[bool]
    skip: bool


def collect(
    names: tuple[str, ...],
    losses: list[Loss | None],
    parameters: list[Tensor],
    pending: Gradients | None,
    *,
    keep: bool,
) -> Gradients:
    """Computes the gradients of the losses and adds the pending ones, which stay as they are.

    With `keep`, the result outlives this call, and what autograd returned is copied: it may be a
    tensor that user code holds too.
    """
    found = Gradients(names, [], [])
    for value, row in iterate_gradients(losses, parameters, names):
        if keep:
            row = [None if g is None else g.clone() for g in row]
        found.values.append(value)
        found.rows.append(row)
    return merge(found, pending)


def merge(found: Gradients, pending: Gradients | None) -> Gradients:
    """Adds the pending gradients, which stay as they are, to those found, and returns these."""
    if pending is not None:
        for k, earlier in enumerate(pending.values):
            found.values[k] = _sum(earlier, found.values[k])
        for row, earlier_row in zip(found.rows, pending.rows, strict=True):
            for j, g in enumerate(earlier_row):  # one at a time, so that each is freed at once
                row[j] = _sum(g, row[j])
    return found


def solve(
    gradients: Gradients,
    weights: list[float],
    shared: Sequence[bool],
    rule: Rule,
    nonfinite: NonFinite,
) -> Step:
    """Computes the Gram matrix of the shared part of the gradients, and the coefficients.

    Raises:
        FloatingPointError: See `MultiObjectiveOptimizer`.
        ValueError: The rule returned something other than one coefficient per loss.
    """
    names, m = gradients.names, len(gradients.names)
    gram = gram_matrix(
        [[g for g, s in zip(row, shared, strict=True) if s] for row in gradients.rows]
    ).to(next((g.device for row in gradients.rows for g in row if g is not None), "cpu"))
    absent = [value is None for value in gradients.values]
    zero = gram.new_zeros(())
    losses = torch.stack([zero if v is None else v.to(gram).reshape(()) for v in gradients.values])
    skip = False
    if nonfinite == "propagate":
        finite = gram.isfinite().all()
        mixing = _mix(
            rule, torch.where(finite, gram, torch.eye(m, dtype=gram.dtype, device=gram.device))
        )
        alpha = mixing.coefficients
        mixing = MixingCoefficients(
            torch.where(finite.to(alpha.device), alpha, alpha.new_tensor(weights)),
            *(_nan_unless(finite, x) for x in (mixing.p, mixing.p_clipped, mixing.gap)),
        )
    else:
        heads = torch.stack(
            [
                sum(
                    (
                        torch.linalg.vector_norm(g, dtype=torch.float64)
                        for g, s in zip(row, shared, strict=True)
                        if g is not None and not s
                    ),
                    start=zero,
                )
                for row in gradients.rows
            ]
        )
        # The one copy to the host; what follows is of size m and done there.
        host = torch.cat([gram, heads[:, None], losses[:, None]], dim=1).cpu()
        gram, losses = host[:, :m], host[:, m + 1]
        problem = _first_nonfinite(names, host.tolist())
        if problem is None:
            mixing = _mix(rule, gram)
        elif nonfinite == "raise":
            raise FloatingPointError(
                f"{problem} is NaN or Inf. Find its cause (torch.autograd.set_detect_anomaly)."
            )
        else:
            skip = True
            mixing = MixingCoefficients(gram.new_zeros(m))
    return Step(names, weights, gram, mixing, losses, absent, skip)


def write(
    parameters: Sequence[Tensor], gradients: Gradients, step: Step, shared: Sequence[bool]
) -> None:
    """Adds the combined gradient to ``.grad``; the heads get the weighted sum.

    The rows of the gradients are consumed.
    """
    weights = torch.tensor(step.weights, dtype=torch.float64, device="cpu")
    for part, coefficients in ((True, step.mixing.coefficients), (False, weights)):
        chosen = [j for j, s in enumerate(shared) if s == part]
        rows: list[Gradient] = []
        for row in gradients.rows:
            rows.append([row[j] for j in chosen])
            for j in chosen:
                row[j] = None
        add_combined_gradient([parameters[j] for j in chosen], rows, coefficients)


def report(step: Step, skipped: int = 0) -> StepReport:
    """Says what a step did; waits for the device. `skipped` counts updates left out so far."""
    return make_report(
        names=step.names,
        weights=step.weights,
        gram=step.gram,
        p=step.mixing.p,
        p_clipped=step.mixing.p_clipped,
        coefficients=step.mixing.coefficients,
        gap=step.mixing.gap,
        losses=step.losses,
        absent=step.absent,
        skip=step.skip,
        skipped=skipped,
    )


def _sum(earlier: Tensor | None, later: Tensor | None) -> Tensor | None:
    if earlier is None or later is None:
        return later if earlier is None else earlier
    return earlier + later


def _nan_unless(finite: Tensor, x: Tensor | None) -> Tensor | None:
    return None if x is None else torch.where(finite.to(x.device), x, torch.nan)


def _first_nonfinite(names: Sequence[str], host: list[list[float]]) -> str | None:
    m = len(names)
    for i, name in enumerate(names):
        if not math.isfinite(host[i][m + 1]):
            return f"loss {name!r}"
    for i, name in enumerate(names):
        if not (math.isfinite(host[i][i]) and math.isfinite(host[i][m])):
            return f"the gradient of loss {name!r}"
    return None


def _mix(rule: Rule, gram: Tensor) -> MixingCoefficients:
    with torch.no_grad():
        mixing = rule(gram)
    if not isinstance(mixing, Tensor | MixingCoefficients):
        raise TypeError(
            f"`rule` must return a tensor or MixingCoefficients; got {type(mixing).__name__}."
        )
    if isinstance(mixing, Tensor):
        mixing = MixingCoefficients(mixing)
    alpha = mixing.coefficients
    if alpha.shape != gram.shape[:1] or not alpha.is_floating_point():
        raise ValueError(
            f"`rule` must return a real tensor of shape [{len(gram)}], one coefficient per loss; "
            f"got shape {list(alpha.shape)} and dtype {alpha.dtype}."
        )
    return mixing
