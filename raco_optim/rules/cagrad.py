"""The rule of CAGrad and CAGrad-Clip: subproblem -> clipping -> coefficients."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from operator import mul
from typing import Any, Literal

import torch
from torch import Tensor

from raco_optim._checks import ZERO, checked_choice, checked_radius
from raco_optim.rules.rule import MixingCoefficients, Rule
from raco_optim.subproblem.few_losses import FEW
from raco_optim.subproblem.solve import SOLVERS, Solver, solve, solve_on_host

Clip = Literal["hard", "soft", "none"]
CLIPS = ("hard", "soft", "none")

# With c >= 1, combinations of gradients that cancel to 1e-4 of their terms count as zero. What
# they leave is rounding in part, and coefficients that scale it to |g_0| scale its rounding too:
# float32 gradients would then give <g_i, d> = -0.4 |g_i| |g_0| (cancelled to 1e-7), -0.004 (1e-5).
_CRITICAL = 1e-8
_SMALLEST = torch.finfo(torch.float64).tiny


class CAGradRule(Rule):
    r"""CAGrad with weights, clipped or not; `mixing_coefficients` has the formula.

    If losses are absent from a step, the weights of those that are present sum to W < 1. Then
    :math:`\alpha(H, w) = W \alpha(H, w / W)`, and p and the clipped p refer to :math:`w / W`.

    Args:
        c: Radius of the correction relative to :math:`|g_0|`.
        clip: ``"hard"``, ``"soft"`` or ``"none"``.
        solver: ``"exact"``, ``"pgd"`` or ``"slsqp"``; see `solve_subproblem`.
        below_one: Whether c must be in [0, 1); otherwise any c >= 0 is accepted.

    Raises:
        ValueError: An argument is out of its range; the message names it.

    Example:
        >>> import torch
        >>> from raco_optim.rules import CAGradRule
        >>> rule = CAGradRule(c=0.4)
        >>> rule(torch.eye(2, dtype=torch.float64), [0.5, 0.5]).coefficients
        tensor([0.7000, 0.7000], dtype=torch.float64)
    """

    def __init__(
        self, c: float, clip: Clip = "hard", solver: Solver = "exact", *, below_one: bool = True
    ) -> None:
        self._below_one = below_one
        self.c, self.clip, self.solver = c, clip, solver

    @property
    def c(self) -> float:
        """Radius of the correction relative to the weighted gradient."""
        return self._c

    @c.setter
    def c(self, c: float) -> None:
        self._c = checked_radius(c, below_one=self._below_one)

    @property
    def clip(self) -> Clip:
        """How p is clipped."""
        return self._clip

    @clip.setter
    def clip(self, clip: Clip) -> None:
        self._clip: Clip = checked_choice("clip", clip, CLIPS)

    @property
    def solver(self) -> Solver:
        """Which solver finds p."""
        return self._solver

    @solver.setter
    def solver(self, solver: Solver) -> None:
        self._solver: Solver = checked_choice("solver", solver, SOLVERS)

    def __call__(self, gram: Tensor, weights: Sequence[float]) -> MixingCoefficients:
        """Computes the coefficients of the losses that are present."""
        return mix(gram, weights, self._c, self._clip, self._solver)

    def settings(self) -> dict[str, Any]:
        """Returns c, clip and solver."""
        return {"c": self._c, "clip": self._clip, "solver": self._solver}

    def state_dict(self) -> dict[str, Any]:
        """Returns c."""
        return {"c": self._c}

    def check_state(self, state: Any) -> None:  # noqa: ANN401  # that is what it checks
        """Raises `ValueError` if the state holds anything but a valid c."""
        if not isinstance(state, Mapping) or state.keys() != {"c"}:
            raise ValueError(
                f'`state` of the rule must hold "c" alone for CAGradRule; got {state!r}. '
                f"Load a checkpoint of the same rule."
            )
        checked_radius(state["c"], below_one=self._below_one)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Sets c."""
        self.check_state(state)
        self.c = state["c"]


def mix(
    H: Tensor, weights: Sequence[float], c: float, clip: Clip, solver: Solver
) -> MixingCoefficients:
    """Computes the coefficients for arguments that were checked; see `mixing_coefficients`."""
    total = math.fsum(weights)
    if total == 0:  # only losses of weight zero are present
        zeros = H.new_zeros(len(weights))
        return MixingCoefficients(zeros, zeros + 1 / len(weights), zeros, H.new_zeros(()))
    if abs(total - 1) <= 1e-15:
        total = 1.0
    shares = [x / total for x in weights]
    if solver != "pgd" and len(shares) <= FEW:
        # Twenty operations of torch take longer than the solver does.
        numbers = H.new_tensor(_mix_few(H.tolist(), (weights, shares), c, clip, solver))
        alpha, p, p_clipped = numbers[:-1].view(3, -1).unbind()
        return MixingCoefficients(alpha, p, p_clipped, numbers[-1])
    solution = solve(H, shares, c, solver)
    w, p = H.new_tensor(shares), solution.p
    if clip == "hard":
        p_clipped = torch.minimum(p, w)
    elif clip == "soft":
        p_clipped = torch.nan_to_num(p * w / (p + w))  # 0 / 0, where both are zero, is 0
    else:
        p_clipped = p
    # Scaled first, so that no square leaves the range of float64.
    unit = H / H.diagonal().amax().clamp(min=_SMALLEST)
    squared_g0 = w @ (unit @ w)
    squared_norm = p_clipped @ (unit @ p_clipped)
    ratio = torch.where(_vanishes(unit, p_clipped, ZERO), 0.0, squared_g0 / squared_norm)
    alpha = H.new_tensor(weights) + c * total * ratio.clamp(min=0).sqrt() * p_clipped
    if c >= 1:
        critical = _vanishes(unit, p, _CRITICAL) | _vanishes(unit, alpha, _CRITICAL)
        alpha = torch.where(critical, 0.0, alpha)
    return MixingCoefficients(alpha, p, p_clipped, solution.gap)


def _vanishes(H: Tensor, q: Tensor, limit: float) -> Tensor:
    """Returns whether |sum_i q_i g_i|^2 is at most `limit` times (sum_i q_i |g_i|)^2."""
    return q @ (H @ q) <= limit * (q @ H.diagonal().sqrt()).square()


def _mix_few(
    rows: list[list[float]],
    weights: tuple[Sequence[float], list[float]],
    c: float,
    clip: Clip,
    solver: Solver,
) -> list[float]:
    """Computes alpha, p, the clipped p and the gap, in one list, as `mix` does, without tensors.

    `weights` are those of the user, and those that sum to 1.
    """
    own, w = weights
    p, _, gap = solve_on_host(rows, w, c, solver)
    if clip == "hard":
        clipped = list(map(min, p, w))
    elif clip == "soft":
        clipped = [x * y / (x + y) if x + y else 0.0 for x, y in zip(p, w, strict=True)]
    else:
        clipped = p
    largest = max(max(row[i] for i, row in enumerate(rows)), _SMALLEST)
    unit = [[x / largest for x in row] for row in rows]
    norms = [math.sqrt(row[i]) for i, row in enumerate(unit)]

    def squares(q: list[float]) -> tuple[float, float]:
        """Returns |sum_i q_i g_i|^2 and (sum_i q_i |g_i|)^2."""
        image = [sum(map(mul, row, q)) for row in unit]
        return sum(map(mul, q, image)), sum(map(mul, q, norms)) ** 2

    squared, size = squares(clipped)
    ratio = 0.0 if squared <= ZERO * size else max(squares(w)[0], 0.0) / squared
    length = c * math.fsum(own) * math.sqrt(ratio)
    alpha = [x + length * y for x, y in zip(own, clipped, strict=True)]
    if c >= 1 and any(squared <= _CRITICAL * size for squared, size in map(squares, (p, alpha))):
        alpha = [0.0] * len(alpha)
    return [*alpha, *p, *clipped, gap]
