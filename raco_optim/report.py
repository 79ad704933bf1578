"""What one step did, as data."""

from __future__ import annotations

import enum
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from raco_optim._checks import ZERO


class Outcome(enum.Enum):
    """How a step ended; the value says it in words.

    Example:
        >>> from raco_optim import Outcome
        >>> Outcome.STATIONARY.value
        'the weighted gradient g0 is zero: no update'
    """

    CORRECTED = "the weighted gradient was corrected within the trust region"
    WEIGHTED_SUM = "no correction (c = 0 or the correction's direction is zero): alpha = w"
    STATIONARY = "the weighted gradient g0 is zero: no update"
    COEFFICIENTS = "the coefficients were given by a rule without a trust region"
    SKIPPED = 'a loss, its gradient or a coefficient was NaN or Inf and nonfinite="skip": no update'
    NONFINITE = (
        'a loss or its gradient was NaN or Inf and nonfinite="propagate": alpha = w, .grad is not '
        "finite"
    )


@dataclass(frozen=True)
class StepReport:
    """What the last `backward` of a `MultiObjectiveOptimizer` computed.

    All tensors are float64 on the CPU. m is the number of losses.

    Attributes:
        names: Names of the losses, m strings (positions as strings where none were given).
        weights: The user's weights w, ``[m]``.
        gram: Gram matrix H of the per-loss gradients, ``[m, m]``.
        cosines: ``H_ij / sqrt(H_ii H_jj)``, ``[m, m]``; 0 where a gradient is zero.
        p: Solution of the subproblem on the simplex, ``[m]``; None where the rule has none.
        p_clipped: The clipped solution p~, ``[m]``; None where the rule has none.
        coefficients: alpha, ``[m]``: the combined gradient is ``sum_i alpha_i g_i``.
        gap: Relative Frank-Wolfe gap of p (see `solve_subproblem`); NaN where there is no p.
        clip_angle: ``1 - cos(G~, G_p)``, in [0, 2]: by how much clipping turned the correction.
            0 where it only rescaled it; NaN where either vector is zero or there is no p.
        outcome: How the step ended.
        losses: Values of the losses, ``[m]``; NaN for an absent one. Summed over the
            micro-batches of an accumulated step.
        absent: Names of the losses that were None in every micro-batch of the step.
        skipped: Updates skipped so far because of NaN or Inf (``nonfinite="skip"``).
        age: Steps since the Gram matrix was computed: 0, but between those of ``solve_every``.

    Example:
        >>> import torch
        >>> from raco_optim import CAGradClip
        >>> x = torch.nn.Parameter(torch.tensor([1.0, 1.0]))
        >>> opt = CAGradClip(torch.optim.SGD([x], lr=0.1), weights={"a": 0.5, "b": 0.5}, c=0.0)
        >>> opt.backward({"a": x[0] ** 2, "b": x[1] ** 2})
        >>> opt.report.coefficients.tolist()
        [0.5, 0.5]
        >>> opt.report.outcome.name
        'WEIGHTED_SUM'
    """

    names: tuple[str, ...]
    weights: Tensor
    gram: Tensor
    cosines: Tensor
    p: Tensor | None
    p_clipped: Tensor | None
    coefficients: Tensor
    gap: float
    clip_angle: float
    outcome: Outcome
    losses: Tensor
    absent: tuple[str, ...]
    skipped: int
    age: int = 0

    @property
    def hurting(self) -> bool:
        """Whether the combined gradient G raises a loss to first order: some <g_i, G> < 0."""
        return bool((self.gram @ self.coefficients < 0).any())

    @property
    def conflicting(self) -> bool:
        """Whether two losses conflict: some <g_i, g_j> < 0."""
        return bool((self.gram < 0).any())


def make_report(
    *,
    names: Sequence[str],
    weights: Sequence[float],
    gram: Tensor,
    p: Tensor | None,
    p_clipped: Tensor | None,
    coefficients: Tensor,
    gap: Tensor | None,
    losses: Tensor,
    absent: Sequence[bool],
    skip: bool,
    skipped: int,
    age: int = 0,
) -> StepReport:
    """Derives a `StepReport` from what a step kept; waits for the device the tensors are on."""
    H = _host(gram)
    w = torch.tensor(weights, dtype=torch.float64, device="cpu")
    alpha = _host(coefficients)
    norms = H.diagonal().sqrt()
    inverse = torch.where(norms > 0, 1 / norms, 0.0)
    values = _host(losses)
    finite = bool(H.isfinite().all() & values.isfinite().all())
    values[list(absent)] = math.nan
    g0_is_zero = bool(w @ H @ w <= ZERO * (w @ norms) ** 2)
    if skip:
        outcome = Outcome.SKIPPED
    elif not finite:
        outcome = Outcome.NONFINITE
    elif p_clipped is None:
        outcome = Outcome.COEFFICIENTS
    elif g0_is_zero:
        outcome = Outcome.STATIONARY
    else:
        outcome = Outcome.WEIGHTED_SUM if torch.equal(alpha, w) else Outcome.CORRECTED
    return StepReport(
        names=tuple(names),
        weights=w,
        gram=H,
        cosines=H * inverse[:, None] * inverse,
        p=None if p is None else _host(p),
        p_clipped=None if p_clipped is None else _host(p_clipped),
        coefficients=alpha,
        gap=math.nan if gap is None else float(gap),
        clip_angle=(
            math.nan if p is None or p_clipped is None else _angle(H, _host(p), _host(p_clipped))
        ),
        outcome=outcome,
        losses=values,
        absent=tuple(name for name, is_absent in zip(names, absent, strict=True) if is_absent),
        skipped=skipped,
        age=age,
    )


def _host(tensor: Tensor) -> Tensor:
    return tensor.detach().to("cpu", torch.float64, copy=True)


def _angle(H: Tensor, p: Tensor, p_clipped: Tensor) -> float:
    """Returns 1 - cos of the angle between the two combinations."""
    unit = H / H.diagonal().amax()
    units = []
    for x in (p, p_clipped):
        squared_norm = x @ unit @ x
        if not squared_norm > ZERO * (x @ unit.diagonal().sqrt()) ** 2:
            return math.nan
        units.append(x / squared_norm.sqrt())
    # |u - v|^2 / 2 keeps the digits that 1 - u.v would cancel.
    difference = units[0] - units[1]
    return float((difference @ unit @ difference).clamp(0, 4)) / 2
