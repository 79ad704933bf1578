"""The report of a step, for the optimizer, the log and the user."""

from __future__ import annotations

import enum
import math
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from raco_optim._checks import ZERO
from raco_optim.objectives import shortened

# Most losses and pairs in a printed report, and its width.
_ROWS, _PAIRS, _WIDTH = 15, 5, 100


class Outcome(enum.Enum):
    """How a step ended; the value describes it.

    Example:
        >>> from raco_optim import Outcome
        >>> Outcome.SKIPPED.value
        'a loss, its gradient or a coefficient was NaN or Inf and nonfinite="skip": no update'
    """

    CORRECTED = "the weighted gradient was corrected within the trust region"
    WEIGHTED_SUM = "no correction (c = 0 or the correction's direction is zero): alpha = w"
    STATIONARY = (
        "the weighted gradient g0 is zero, or c >= 1 and a convex combination of the gradients is: "
        "no update"
    )
    COEFFICIENTS = "the coefficients were given by a rule without a trust region"
    SKIPPED = 'a loss, its gradient or a coefficient was NaN or Inf and nonfinite="skip": no update'
    NONFINITE = (
        'a loss, its gradient or a coefficient was NaN or Inf and nonfinite="propagate": .grad is '
        "not finite"
    )


@dataclass(frozen=True, repr=False)
class StepReport:
    """Results of the last `backward` of a `MultiObjectiveOptimizer`; ``print`` shows a table.

    All tensors are float64 on the CPU. m is the number of losses.

    Attributes:
        names: Names of the losses, m strings; their positions if the losses have no names.
        weights: The user's weights w, ``[m]``.
        gram: Gram matrix H of the per-loss gradients, ``[m, m]``.
        coefficients: alpha, ``[m]``: the combined gradient is ``sum_i alpha_i g_i``.
        losses: Values of the losses, ``[m]``, summed over the micro-batches of an accumulated step;
            NaN for an absent loss.
        p: Solution of the subproblem on the simplex, ``[m]``, NaN for an absent loss; None if the
            rule has none.
        p_clipped: The clipped solution p~, ``[m]``, NaN for an absent loss; None if the rule has
            none.
        gap: Relative Frank-Wolfe gap of p (see `solve_subproblem`); NaN without p.
        absent: Names of the losses that were None in every process and micro-batch of the step.
        skip: Whether the update was skipped because of NaN or Inf (``nonfinite="skip"``).
        skipped: Number of updates skipped so far.
        gram_age: Number of steps since the Gram matrix was computed; > 0 only with ``gram_every``.
        gradients: The gradient mode that ran and, if it is not the requested one, the reason.

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
    coefficients: Tensor
    losses: Tensor
    p: Tensor | None = None
    p_clipped: Tensor | None = None
    gap: Tensor | float | None = None
    absent: tuple[str, ...] = ()
    skip: bool = False
    skipped: int = 0
    gram_age: int = 0
    gradients: str = "dense"

    def to_host(self) -> StepReport:
        """Returns the report with float64 tensors on the CPU; waits for their device."""
        host: dict[str, Any] = {
            name: x.detach().to("cpu", torch.float64, copy=True)
            for name, x in tensors_of(self).items()
        }
        host["losses"][[name in self.absent for name in self.names]] = math.nan
        host["gap"] = math.nan if self.gap is None else float(self.gap)
        return replace(self, **host)

    @property
    def norms(self) -> Tensor:
        """Norms of the per-loss gradients, ``[m]``."""
        return self.gram.diagonal().clamp(min=0).sqrt()

    @property
    def cosines(self) -> Tensor:
        """``H_ij / sqrt(H_ii H_jj)``, ``[m, m]``; 0 where a gradient is zero."""
        norms = self.norms
        inverse = torch.where(norms > 0, 1 / norms, 0.0)
        return self.gram * inverse[:, None] * inverse

    @property
    def clip_angle(self) -> float:
        """``1 - cos(G~, G_p)``, in [0, 2]: how far clipping turned the correction.

        0 if clipping only rescaled it; NaN if either vector is zero or there is no p.
        """
        if self.p is None or self.p_clipped is None:
            return math.nan
        return _angle(self.gram, self.p.nan_to_num(), self.p_clipped.nan_to_num())

    @property
    def outcome(self) -> Outcome:
        """The outcome of the step."""
        if self.skip:
            return Outcome.SKIPPED
        present = torch.tensor([name not in self.absent for name in self.names])
        finite = self.gram.isfinite().all() & self.coefficients.isfinite().all()
        if not bool(finite & self.losses[present].isfinite().all()):
            return Outcome.NONFINITE
        if self.p_clipped is None:
            return Outcome.COEFFICIENTS
        w, alpha = self.weights, self.coefficients
        g0_is_zero = bool(w @ self.gram @ w <= ZERO * (w @ self.norms) ** 2)
        if g0_is_zero or not alpha.any():
            return Outcome.STATIONARY
        same = torch.equal(alpha[present], w[present])
        return Outcome.WEIGHTED_SUM if same else Outcome.CORRECTED

    @property
    def hurting(self) -> bool:
        """Whether the combined gradient G raises a loss to first order: some <g_i, G> < 0."""
        return bool((self.gram @ self.coefficients < 0).any())

    @property
    def conflicting(self) -> bool:
        """Whether two losses conflict: some <g_i, g_j> < 0."""
        return bool((self.gram < 0).any())

    def __repr__(self) -> str:
        return f"<StepReport: m = {len(self.names)}, {self.to_host().outcome.name}>"

    def __str__(self) -> str:
        host, m = self.to_host(), len(self.names)
        present = torch.tensor([name not in self.absent for name in self.names])
        columns = {"value": host.losses, "weight": host.weights}
        for title, x in (("p", host.p), ("clipped p", host.p_clipped)):
            if x is not None and not x.isnan().all():
                columns[title] = x
        columns |= {"alpha": host.coefficients, "norm": host.norms}
        order, finite = list(range(m)), host.losses.isfinite() & host.norms.isfinite()
        if m > _ROWS:  # non-finite losses first, then the largest p
            p = columns.get("p", host.coefficients.abs())
            order.sort(key=lambda i: (not present[i], finite[i], -p[i], -host.weights[i]))
        rows = [["loss", *columns]]
        for i in order[:_ROWS]:
            cells = [
                f"{float(x[i]):.4g}" if present[i] or title == "weight" else "-"
                for title, x in columns.items()
            ]
            rows.append([shortened(self.names[i]), *cells])
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines = [
            "  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])])
            for row in rows
        ]
        if m > _ROWS:
            lines.append(
                f"... and {m - _ROWS} more, with no larger {'p' if 'p' in columns else 'alpha'}"
            )
        if self.absent:
            lines.append(f"absent losses: {len(self.absent)}")
        known = (host.gram.isfinite() & present & present[:, None]).triu(1)
        number = int((known & (host.gram < 0)).sum())
        lines.append(f"conflicting pairs: {number} of {int(known.sum())}")
        worst = host.cosines.where(known, 1.0).flatten().argsort()[: min(number, _PAIRS)]
        for k in worst.tolist():
            i, j = divmod(k, m)
            pair = f"{shortened(self.names[i])}, {shortened(self.names[j])}"
            lines.append(f"  {pair}: cosine {float(host.cosines[i, j]):.3g}")
        age = f" (steps since the Gram matrix: {self.gram_age})" if self.gram_age else ""
        for text in (
            f"outcome: {host.outcome.name}, {host.outcome.value}",
            f"gradients: {self.gradients}{age}; updates skipped so far: {self.skipped}",
        ):
            lines.append(textwrap.fill(text, _WIDTH, subsequent_indent="  "))
        return "\n".join(lines)


def tensors_of(report: StepReport) -> dict[str, Tensor]:
    """Returns the tensor fields by name."""
    return {name: x for name, x in vars(report).items() if isinstance(x, Tensor)}


def first_nonfinite(
    names: Sequence[str], host: Sequence[Sequence[float]], ranks: str
) -> str | None:
    """Describes the first non-finite loss or gradient; rows: H, head norm, loss."""
    m = len(names)
    for name, row in zip(names, host, strict=True):
        if not math.isfinite(row[m + 1]):
            return (
                f"loss {name!r} is NaN or Inf{ranks}. If it has no data in this batch (a mean over "
                f"nothing is NaN), pass None; otherwise find the cause with "
                f"torch.autograd.set_detect_anomaly(True)."
            )
    for i, (name, row) in enumerate(zip(names, host, strict=True)):
        if not (math.isfinite(row[i]) and math.isfinite(row[m])):
            return (
                f"the gradient of loss {name!r} is NaN or Inf. Find the cause with "
                f"torch.autograd.set_detect_anomaly(True)."
            )
    return None


def _angle(H: Tensor, p: Tensor, p_clipped: Tensor) -> float:
    """Returns 1 - cos of the angle between the two combinations."""
    unit = H / H.diagonal().amax()
    units = []
    for x in (p, p_clipped):
        squared_norm = x @ unit @ x
        if not squared_norm > ZERO * (x @ unit.diagonal().sqrt()) ** 2:
            return math.nan
        units.append(x / squared_norm.sqrt())
    # |u - v|^2 / 2 avoids the cancellation in 1 - u.v.
    difference = units[0] - units[1]
    return float((difference @ unit @ difference).clamp(0, 4)) / 2
