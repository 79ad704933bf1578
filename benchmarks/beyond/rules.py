r"""The candidates: what might keep the user's trade-off better than CAGrad-Clip.

With the Gram matrix H, weights w, radius c, :math:`g_0 = \sum_i w_i g_i`, p the solution of
CAGrad's subproblem and :math:`\tilde p = \min(p, w)`, CAGrad-Clip adds to g_0 a correction of
length :math:`c |g_0|` along :math:`\tilde G`. Each rule here changes one thing of that. All are
functions of H (or of H in another metric), and their corrections are no longer than
:math:`c |g_0|`, which is all that Theorem 3.1 needs; see `benchmarks.beyond`.

A rule sees the losses that are present in a step: H and w are theirs. The formulas hold for
weights that sum to 1; where losses are absent, `Candidate` divides w by its sum W, and multiplies
the coefficients by W.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from scipy.optimize import minimize, nnls
from torch import Tensor

from raco_optim import MixingCoefficients, Rule, mixing_coefficients, solve_subproblem

TEMPERATURE = 0.5
DECAY = 0.9
MASS = 2.0


class Candidate(Rule):
    """A rule with a radius c.

    Args:
        c: Radius of the correction relative to the weighted gradient.
    """

    def __init__(self, c: float) -> None:
        self.c = c

    def __call__(self, gram: Tensor, weights: Sequence[float]) -> MixingCoefficients:
        """Computes the coefficients of the losses that are present."""
        total = math.fsum(weights)
        if total == 0:  # only losses of weight zero are present
            return MixingCoefficients(gram.new_zeros(len(weights)))
        if abs(total - 1) <= 1e-15:
            return self.mix(gram, list(weights))
        mixing = self.mix(gram, [x / total for x in weights])
        return replace(mixing, coefficients=total * mixing.coefficients)

    def mix(self, gram: Tensor, w: list[float]) -> MixingCoefficients:
        """Computes the coefficients for weights that sum to 1."""
        raise NotImplementedError

    def settings(self) -> dict[str, Any]:
        """Returns c."""
        return {"c": self.c}


class Averaging(Candidate):
    """A candidate that remembers an exponential average of one matrix a step.

    The average is over the steps in which all losses are present: the matrix of fewer losses does
    not say which they are.
    """

    def __init__(self, c: float) -> None:
        super().__init__(c)
        self._total, self._mass = torch.zeros((), dtype=torch.float64), 0.0
        self._complete = True

    def __call__(self, gram: Tensor, weights: Sequence[float]) -> MixingCoefficients:
        """Computes the coefficients of the losses that are present."""
        self._complete = math.fsum(weights) > 1 - 1e-12
        return super().__call__(gram, weights)

    def average(self, now: Tensor) -> Tensor:
        """Takes the matrix of this step; returns the bias-corrected average so far."""
        if not self._complete or (self._mass and self._total.shape != now.shape):
            return now
        self._total = DECAY * self._total + (1 - DECAY) * now
        self._mass = DECAY * self._mass + (1 - DECAY)
        return self._total / self._mass

    def state_dict(self) -> dict[str, Any]:
        """Returns the sum and the mass of the average."""
        return {"total": self._total.clone(), "mass": self._mass}

    def check_state(self, state: Any) -> None:  # noqa: ANN401  # that is what it checks
        """Raises `ValueError` if the state is not one of `state_dict`."""
        fits = isinstance(state, Mapping) and state.keys() == {"total", "mass"}
        if not (fits and isinstance(state["total"], Tensor) and isinstance(state["mass"], float)):
            raise ValueError(
                f"`state` of the rule must hold a tensor `total` and a number `mass`; got "
                f"{state!r}. Load a checkpoint of the same rule."
            )

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restores what `state_dict` returned."""
        self.check_state(state)
        self._total, self._mass = state["total"].clone(), state["mass"]


class Budget(Candidate):
    r"""Budgeted clipping: the correction keeps the length that clipping left.

    .. math:: \alpha = w + c |g_0| \tilde p / \max(|G_p|, |\tilde G|)

    CAGrad-Clip where clipping does not shorten :math:`G_p`; at a vertex p = e_i the correction is
    w_i times as long as CAGrad's.
    """

    def mix(self, gram: Tensor, w: list[float]) -> MixingCoefficients:
        """See the class."""
        full = mixing_coefficients(gram, w, self.c)
        p, p_clipped = _vectors(full)
        before, after = (_norm(gram, x) for x in (p, p_clipped))
        share = after / max(before, after) if after > 0 else 0.0
        weights = gram.new_tensor(w)
        return MixingCoefficients(weights + share * (full.coefficients - weights), p, p_clipped)


class Soft(Candidate):
    r"""Soft clipping with a temperature t: :math:`\tilde p = (p^{-1/t} + w^{-1/t})^{-t}`.

    The hard clip for t -> 0; t = 1 is ``clip="soft"`` of the library, p w / (p + w).
    """

    def mix(self, gram: Tensor, w: list[float]) -> MixingCoefficients:
        """See the class."""
        weights = gram.new_tensor(w)
        p = solve_subproblem(gram, w, self.c).p
        low, high = torch.minimum(p, weights), torch.maximum(p, weights)
        ratio = torch.where(high > 0, low / high, 0.0)
        p_clipped = low * (1 + ratio ** (1 / TEMPERATURE)) ** -TEMPERATURE
        return _corrected(gram, weights, self.c, p, p_clipped)


class Smooth(Averaging):
    r"""p of a Gram matrix that is smoothed over steps; all else from the one of this step.

    .. math:: \bar H_t = \sum_{s \le t} 0.9^{t - s} \, H_s / \mathrm{tr} H_s \Big/
        \sum_{s \le t} 0.9^{t - s}

    The bias-corrected exponential average. Dividing by the trace keeps the rule independent of a
    scale that changes between steps, as a GradScaler's does.
    """

    def mix(self, gram: Tensor, w: list[float]) -> MixingCoefficients:
        """See the class."""
        weights, trace = gram.new_tensor(w), gram.trace()
        p = solve_subproblem(self.average(gram / trace) if trace > 0 else gram, w, self.c).p
        return _corrected(gram, weights, self.c, p, torch.minimum(p, weights))


class Conflict(Candidate):
    r"""The radius from the conflict of this step: CAGrad-Clip with c max(0, -min_ij cos(g_i, g_j)).

    The weighted sum where no two gradients conflict; all of c where two are opposite.
    """

    def mix(self, gram: Tensor, w: list[float]) -> MixingCoefficients:
        """See the class."""
        return mixing_coefficients(
            gram, w, self.c * min(1.0, max(0.0, -float(_cosines(gram).min())))
        )


class Persistent(Averaging):
    r"""The radius from the conflict that lasts: less correction where the losses truly compete.

    .. math:: c_t = c \max(0, 1 - 2 k_t), \qquad k_t = \max(0, -\min_{ij} \bar C_{ij})

    with the bias-corrected exponential average of the cosines (decay 0.9). Conflict that averages
    out over steps is noise or passes, and CAGrad-Clip is left as it is; where it stays, its mean
    cosine at -1/2, the losses have to be traded, and that is what the weights say how to do.
    """

    def mix(self, gram: Tensor, w: list[float]) -> MixingCoefficients:
        """See the class."""
        lasting = max(0.0, -float(self.average(_cosines(gram)).min()))
        return mixing_coefficients(gram, w, self.c * max(0.0, 1 - 2 * lasting))


class Cone(Candidate):
    r"""The shortest correction after which no loss rises to first order, at most c |g_0| long.

    .. math::
        u &\in \arg\min_{u \ge 0} \Big| g_0 + \sum_i u_i g_i \Big|, \qquad v = \sum_i u_i g_i \\
        \alpha &= w + \min(1, c |g_0| / |v|) \, u

    g_0 + v is the projection of g_0 to the cone where all <g_i, G> >= 0 (Lopez-Paz and Ranzato,
    Gradient Episodic Memory, 2017, project so for one loss). The weighted sum wherever that hurts
    no loss.
    """

    def mix(self, gram: Tensor, w: list[float]) -> MixingCoefficients:
        """See the class."""
        weights = gram.new_tensor(w)
        norms = gram.diagonal().sqrt()
        inverse = torch.where(norms > 0, 1 / norms, 0.0)
        values, vectors = np.linalg.eigh(_cosines(gram).numpy())
        root = np.sqrt(np.clip(values, 0, None))[:, None] * vectors.T
        scaled = (weights * norms / norms.max().clamp(min=1e-300)).numpy()
        found, _ = nnls(root, -root @ scaled)
        u = torch.from_numpy(found) * norms.max() * inverse
        length, limit = _norm(gram, u), self.c * _norm(gram, weights)
        return MixingCoefficients(weights + (min(1.0, limit / length) if length > 0 else 0.0) * u)


class Tail(Candidate):
    r"""CAGrad whose p is bounded by the weights: the minimum over p with p_i <= 2 w_i.

    CAGrad maximises the least improvement <g_i, G>; this the mean of the worst half (by weight) of
    the improvements, their conditional value at risk. p never has more than twice a loss's weight,
    so that nothing is left to clip. For a bound of 1, p = w; for 1 / min w, it is CAGrad.
    """

    def mix(self, gram: Tensor, w: list[float]) -> MixingCoefficients:
        """See the class."""
        weights = gram.new_tensor(w)
        bounds = (MASS * weights).clamp(max=1.0)
        p = solve_subproblem(gram, w, self.c).p
        if len(w) == 2:  # convex in one number: the nearest point that is allowed
            first = torch.minimum(torch.maximum(p[0], 1 - bounds[1]), bounds[0])
            p = torch.stack([first, 1 - first])
        elif bool((p > bounds).any()):
            p = _bounded(gram, weights, self.c, bounds)
        return _corrected(gram, weights, self.c, p, p)


RULES: dict[str, type[Candidate]] = {
    "budget": Budget,
    "soft": Soft,
    "smooth": Smooth,
    "conflict": Conflict,
    "persistent": Persistent,
    "cone": Cone,
    "tail": Tail,
}


def _cosines(gram: Tensor) -> Tensor:
    norms = gram.diagonal().sqrt()
    inverse = torch.where(norms > 0, 1 / norms, 0.0)
    return gram * inverse[:, None] * inverse


def _vectors(mixing: MixingCoefficients) -> tuple[Tensor, Tensor]:
    assert mixing.p is not None and mixing.p_clipped is not None
    return mixing.p, mixing.p_clipped


def _norm(gram: Tensor, x: Tensor) -> float:
    return float((x @ gram @ x).clamp(min=0).sqrt())


def _corrected(
    gram: Tensor, w: Tensor, c: float, p: Tensor, p_clipped: Tensor
) -> MixingCoefficients:
    """w + c |g0| G~ / |G~|, and w where G~ is zero to rounding."""
    length = _norm(gram, p_clipped)
    zero = length <= 1e-12 * float(p_clipped @ gram.diagonal().sqrt())
    share = 0.0 if zero else c * _norm(gram, w) / length
    return MixingCoefficients(w + share * p_clipped, p, p_clipped)


def _bounded(gram: Tensor, w: Tensor, c: float, bounds: Tensor) -> Tensor:
    """The minimiser of the subproblem among the p of the simplex below the bounds."""
    H = (gram / gram.diagonal().amax()).numpy()
    b = H @ w.numpy()
    s = c * np.sqrt(max(float(w.numpy() @ b), 0.0))

    def value(p: np.ndarray) -> tuple[float, np.ndarray]:
        Hp = H @ p
        norm = np.sqrt(max(float(p @ Hp), 1e-24))
        return float(p @ b + s * norm), b + s * Hp / norm

    found = minimize(
        value,
        w.numpy(),  # which is below the bounds
        jac=True,
        method="SLSQP",
        bounds=[(0.0, float(bound)) for bound in bounds],
        constraints={"type": "eq", "fun": lambda p: p.sum() - 1, "jac": np.ones_like},
        options={"ftol": 1e-12, "maxiter": 200},
    )
    return torch.from_numpy(np.clip(found.x, 0, None))
