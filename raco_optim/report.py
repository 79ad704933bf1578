"""What one step did, as data: one record for the optimizer, the log and the user."""

from __future__ import annotations

import enum
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from raco_optim._checks import ZERO

# Rows and pairs that a printed report shows.
_ROWS, _PAIRS = 20, 5


class Outcome(enum.Enum):
    """How a step ended; the value says it in words.

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
        'a loss or its gradient was NaN or Inf and nonfinite="propagate": alpha = w, .grad is not '
        "finite"
    )


@dataclass(frozen=True)
class StepReport:
    """What the last `backward` of a `MultiObjectiveOptimizer` computed; ``print`` shows a table.

    All tensors are float64 on the CPU. m is the number of losses.

    Attributes:
        names: Names of the losses, m strings (positions as strings where none were given).
        weights: The user's weights w, ``[m]``.
        gram: Gram matrix H of the per-loss gradients, ``[m, m]``.
        coefficients: alpha, ``[m]``: the combined gradient is ``sum_i alpha_i g_i``.
        losses: Values of the losses, ``[m]``; NaN for an absent one. Summed over the
            micro-batches of an accumulated step.
        p: Solution of the subproblem on the simplex, ``[m]``, NaN for an absent loss; None where
            the rule has none.
        p_clipped: The clipped solution p~, ``[m]``, NaN for an absent loss; None where the rule
            has none.
        gap: Relative Frank-Wolfe gap of p (see `solve_subproblem`); NaN where there is no p.
        absent: Names of the losses that were None in every process and micro-batch of the step.
        skip: Whether the update was skipped because of NaN or Inf (``nonfinite="skip"``).
        skipped: Updates skipped so far.
        gram_age: Steps since the Gram matrix was computed: 0, but between those of
            ``gram_every``.
        gradients: The mode that ran; why, where it is not the one that was asked for.

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
        losses = _host(self.losses)
        losses[[name in self.absent for name in self.names]] = math.nan
        return replace(
            self,
            weights=_host(self.weights),
            gram=_host(self.gram),
            coefficients=_host(self.coefficients),
            losses=losses,
            p=None if self.p is None else _host(self.p),
            p_clipped=None if self.p_clipped is None else _host(self.p_clipped),
            gap=math.nan if self.gap is None else float(self.gap),
        )

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
        """``1 - cos(G~, G_p)``, in [0, 2]: by how much clipping turned the correction.

        0 where clipping only rescaled it; NaN where either vector is zero or there is no p.
        """
        if self.p is None or self.p_clipped is None:
            return math.nan
        return _angle(self.gram, self.p.nan_to_num(), self.p_clipped.nan_to_num())

    @property
    def outcome(self) -> Outcome:
        """How the step ended."""
        if self.skip:
            return Outcome.SKIPPED
        present = torch.tensor([name not in self.absent for name in self.names])
        if not bool(self.gram.isfinite().all() & self.losses[present].isfinite().all()):
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

    def __str__(self) -> str:
        host, m = self.to_host(), len(self.names)
        none = torch.full((m,), math.nan)
        p, clipped = (none if x is None else x for x in (host.p, host.p_clipped))
        columns = [host.losses, host.weights, p, clipped, host.coefficients, host.norms]
        # Where there are too many: those with the largest share of the correction or the weights.
        order = sorted(
            range(m), key=lambda i: -max(float(p[i].nan_to_num()), float(host.weights[i]))
        )
        width = max(4, *(len(name) for name in self.names))
        head = ("value", "weight", "p", "clipped p", "alpha", "|gradient|")
        lines = [f"{'loss':<{width}}" + "".join(f"{title:>12}" for title in head)]
        for i in sorted(order[:_ROWS]):
            cells = [float(column[i]) for column in columns]
            shown = (
                "absent" if k == 0 and self.names[i] in self.absent else _cell(x)
                for k, x in enumerate(cells)
            )
            lines.append(f"{self.names[i]:<{width}}" + "".join(f"{cell:>12}" for cell in shown))
        if m > _ROWS:
            lines.append(f"... and {m - _ROWS} losses with less of p and of the weights")
        pairs = [
            (float(host.cosines[i, j]), i, j)
            for i in range(m)
            for j in range(i)
            if host.gram[i, j] < 0
        ]
        named = ", ".join(
            f"{self.names[j]} and {self.names[i]} ({cosine:.3f})"
            for cosine, i, j in sorted(pairs)[:_PAIRS]
        )
        more = f" and {len(pairs) - _PAIRS} more" if len(pairs) > _PAIRS else ""
        lines.append(f"conflicting pairs (cosine): {named + more if pairs else 'none'}")
        lines.append(f"outcome: {host.outcome.name}, {host.outcome.value}")
        age = f", Gram matrix of {self.gram_age} steps before" if self.gram_age else ""
        lines.append(f"gradients: {self.gradients}{age}; skipped so far: {self.skipped}")
        return "\n".join(lines)


def first_nonfinite(
    names: Sequence[str], host: Sequence[Sequence[float]], ranks: str
) -> str | None:
    """Says in words which loss or gradient is NaN or Inf; None where all are finite.

    Args:
        names: Names of the m losses.
        host: The Gram matrix, norms of the head gradients and losses, ``[m, m + 2]``.
        ranks: Which processes have a loss that is NaN or Inf, in words.
    """
    m = len(names)
    for name, row in zip(names, host, strict=True):
        if not math.isfinite(row[m + 1]):
            return (
                f"loss {name!r} is NaN or Inf{ranks}. If it has no data in this batch (the mean of "
                f"nothing is NaN), pass None; if it has, find the cause with "
                f"torch.autograd.set_detect_anomaly."
            )
    for i, (name, row) in enumerate(zip(names, host, strict=True)):
        if not (math.isfinite(row[i]) and math.isfinite(row[m])):
            return (
                f"the gradient of loss {name!r} is NaN or Inf. Find its cause "
                f"(torch.autograd.set_detect_anomaly)."
            )
    return None


def _cell(x: float) -> str:
    return "-" if math.isnan(x) else f"{x:.4g}"


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
