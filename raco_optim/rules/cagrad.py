"""The rule of CAGrad and CAGrad-Clip: subproblem, clipping, coefficients."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from operator import mul
from typing import Any, Literal

import torch
from torch import Tensor

from raco_optim._checks import ZERO, checked_choice, checked_radius
from raco_optim.rules.rule import MixingCoefficients, Rule
from raco_optim.subproblem.certificate import Array
from raco_optim.subproblem.few_losses import FEW
from raco_optim.subproblem.solve import SOLVERS, Solver, copied, solve, solve_on_host

Clip = Literal["hard", "soft", "none"]
CLIPS = ("hard", "soft", "none")

# With c >= 1, combinations of gradients that cancel to 1e-4 of their terms count as zero. The
# remainder is partly rounding, which the coefficients would scale to |g_0|: float32 gradients gave
# <g_i, d> = -0.4 |g_i| |g_0| when they cancelled to 1e-7, and -0.004 |g_i| |g_0| at 1e-5.
_CRITICAL = 1e-8
_SMALLEST = torch.finfo(torch.float64).tiny


class CAGradRule(Rule):
    r"""Weighted CAGrad, clipped or not; `mixing_coefficients` gives the formula.

    If some losses are absent from a step, the weights of the others sum to W < 1. Then
    :math:`\alpha(H, w) = W \alpha(H, w / W)`, and p and the clipped p refer to :math:`w / W`.

    Args:
        c: Radius of the correction relative to :math:`|g_0|`.
        clip: ``"hard"``, ``"soft"`` or ``"none"``.
        solver: ``"exact"``, ``"pgd"`` or ``"slsqp"``; see `solve_subproblem`.
        below_one: Whether c must be in [0, 1); otherwise any c >= 0 is valid.

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
        """The kind of clipping."""
        return self._clip

    @clip.setter
    def clip(self, clip: Clip) -> None:
        self._clip: Clip = checked_choice("clip", clip, CLIPS)

    @property
    def solver(self) -> Solver:
        """The solver of the subproblem."""
        return self._solver

    @solver.setter
    def solver(self, solver: Solver) -> None:
        self._solver: Solver = checked_choice("solver", solver, SOLVERS)

    def __call__(self, gram: Tensor, weights: Sequence[float]) -> MixingCoefficients:
        """Computes the coefficients of the present losses."""
        return mix(gram, weights, self._c, self._clip, self._solver)

    def settings(self) -> dict[str, Any]:
        """Returns c, clip and solver."""
        return {"c": self._c, "clip": self._clip, "solver": self._solver}

    def state_dict(self) -> dict[str, Any]:
        """Returns c."""
        return {"c": self._c}

    def check_state(self, state: Any) -> None:  # noqa: ANN401  # checked here
        """Raises `ValueError` unless the state holds only a valid c."""
        if not isinstance(state, Mapping) or state.keys() != {"c"}:
            raise ValueError(
                f'`state` of the rule must hold only "c" for CAGradRule; got {state!r}. '
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
    """Computes the coefficients for checked arguments; see `mixing_coefficients`."""
    total = math.fsum(weights)
    if total == 0:  # only losses of weight zero are present
        zeros = H.new_zeros(len(weights))
        return MixingCoefficients(zeros, zeros + 1 / len(weights), zeros, H.new_zeros(()))
    if abs(total - 1) <= 1e-15:
        total = 1.0
    shares = [x / total for x in weights]
    if solver == "pgd":
        solution = solve(H, shares, c, solver)
        own, w = copied([weights, shares], H)
        alpha, clipped = _combined(H, (own, w, solution.p), (c, c * total), clip)
        return MixingCoefficients(alpha, solution.p, clipped, solution.gap)
    # Without torch: twenty of its operations take longer than the solver of few losses.
    values = H.numpy(force=True)
    p, _, gap = solve_on_host(values, shares, c, solver)
    alpha, clipped = _combined(values, (weights, shares, p), (c, c * total), clip)
    numbers = copied([*alpha, *p, *clipped, gap], H)
    first, second, third = numbers[:-1].view(3, -1).unbind()
    return MixingCoefficients(first, second, third, numbers[-1])


def _combined(
    H: Tensor | Array, vectors: tuple[Any, Any, Any], radii: tuple[float, float], clip: Clip
) -> tuple[Any, Any]:
    """Returns alpha and the clipped p: tensors, or lists if H is a numpy array.

    The vectors are the user's weights, the weights that sum to 1, and p. The radii are relative to
    g_0 of the second weights and of the first.
    """
    own, w, p = vectors
    c, radius = radii
    on_device = isinstance(H, Tensor)
    minimum = torch.minimum if on_device else min

    def each(f: Any, *x: Any) -> Any:  # noqa: ANN401
        return f(*x) if on_device else list(map(f, *x))

    clipped = p
    if clip == "hard":
        clipped = each(minimum, p, w)
    elif clip == "soft":
        clipped = each(lambda x, y: x * y / (x + y + _SMALLEST), p, w)  # 0 where both are zero
    # Scaled first, to keep squares in the range of float64.
    few = not on_device and len(H) <= FEW
    unit: Any
    norms: Any
    if few:  # calling numpy takes longer
        rows = H.tolist()
        largest = max(row[i] for i, row in enumerate(rows)) + _SMALLEST
        unit = [[x / largest for x in row] for row in rows]
        norms = [row[i] ** 0.5 for i, row in enumerate(unit)]
    else:
        unit = H / (H.diagonal().max() + _SMALLEST)
        norms = unit.diagonal() ** 0.5

    def squares(q: Any) -> tuple[Any, Any]:  # noqa: ANN401
        """Returns |sum_i q_i g_i|^2 and (sum_i q_i |g_i|)^2."""
        if few:
            image = [sum(map(mul, row, q)) for row in unit]
            return sum(map(mul, q, image)), sum(map(mul, q, norms)) ** 2
        return q @ (unit @ q), (q @ norms) ** 2

    (squared_g0, _), (squared, size) = squares(w), squares(clipped)
    moving = (squared > ZERO * size) & (squared_g0 > 0)
    length = radius * (moving * squared_g0 / (squared + _SMALLEST)) ** 0.5
    alpha = each(lambda x, y: x + length * y, own, clipped)
    if c >= 1:
        (squared, size), (squared_d, size_d) = squares(p), squares(alpha)
        stays = (squared > _CRITICAL * size) & (squared_d > _CRITICAL * size_d)
        alpha = each(lambda x: x * stays, alpha)
    return alpha, clipped
