"""The methods that are compared: scalar losses, and rules that combine one gradient per loss."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torchjd.aggregation as jd
from torch import Tensor, nn
from torch.optim import Optimizer

from raco_optim import MGDA, CAGrad, CAGradClip, MultiObjectiveOptimizer

Make = Callable[[Optimizer, list[float], Sequence[Tensor]], MultiObjectiveOptimizer]
RADII = (0.1, 0.4, 0.9)


class MeanLoss(nn.Module):
    """Equal weights (LS, linear scalarization)."""

    def forward(self, losses: Tensor) -> Tensor:
        """Returns one loss from m."""
        return losses.mean()


class MeanLogarithm(nn.Module):
    """The mean of the logarithms: each gradient is divided by its loss (scale-invariant, SI).

    A loss of zero, as an absent one is, adds nothing.
    """

    def forward(self, losses: Tensor) -> Tensor:
        """Returns one loss from m."""
        return losses[losses > 0].log().sum() / len(losses)


class UncertaintyWeighting(nn.Module):
    """Kendall, Gal and Cipolla (CVPR 2018): learned noise, sum of exp(-s) L / 2 + s / 2."""

    def __init__(self, m: int) -> None:
        super().__init__()
        self.log_variances = nn.Parameter(torch.zeros(m))

    def forward(self, losses: Tensor) -> Tensor:
        """Returns one loss from m."""
        return (losses * (-self.log_variances).exp() + self.log_variances).sum() / 2


class RandomLossWeighting(nn.Module):
    """Lin et al. (TMLR 2022): weights are the softmax of normal numbers, new in each step."""

    def forward(self, losses: Tensor) -> Tensor:
        """Returns one loss from m."""
        return losses @ torch.randn(len(losses)).softmax(0)


@dataclass(frozen=True)
class Method:
    """One method; either `scalar` or `make` is given."""

    title: str  # in tables
    scalar: Callable[[int], nn.Module] | None = None  # makes the module: m losses -> one
    make: Make | None = None  # (inner optimizer, weights, shared parameters) -> optimizer
    logarithm: bool = False  # whether the gradients are those of the logarithms of the losses


def _rule(rule: Callable[[Tensor], Tensor]) -> Make:
    """A rule of the Gram matrix, which is scaled to a diagonal of mean 1.

    Some solvers stop by absolute tolerances. The directions of all rules here are those of any
    positive multiple, and Adam does not see the length.
    """

    def normalised(gram: Tensor) -> Tensor:
        return rule(gram / gram.diagonal().mean().clamp(min=torch.finfo(gram.dtype).tiny))

    return lambda inner, w, shared: MultiObjectiveOptimizer(
        inner, normalised, weights=w, shared_parameters=shared
    )


def _unit_gradients(gram: Tensor) -> Tensor:
    """Weights that give every gradient the same norm, and ignore all conflict."""
    return gram.diagonal().clamp(min=torch.finfo(gram.dtype).tiny).rsqrt() / len(gram)


def _cagrad(kind: type[CAGrad | CAGradClip], c: float) -> Make:
    return lambda inner, w, shared: kind(inner, w, c, shared_parameters=shared)


_RULES: dict[str, tuple[str, Make]] = {
    "unit": ("equal gradient norms", _rule(_unit_gradients)),
    **{f"cagrad-{c}": (f"CAGrad, c = {c}", _cagrad(CAGrad, c)) for c in RADII},
    **{f"clip-{c}": (f"CAGrad-Clip, c = {c}", _cagrad(CAGradClip, c)) for c in RADII},
    "mgda": ("MGDA", lambda inner, w, shared: MGDA(inner, w, shared_parameters=shared)),
    "pcgrad": ("PCGrad", _rule(jd.PCGradWeighting())),
    "upgrad": ("UPGrad", _rule(jd.UPGradWeighting())),
    "imtlg": ("IMTL-G", _rule(jd.IMTLGWeighting())),
    # The equation of Nash-MTL, G a = 1 / a, is that of FairGrad for alpha = 1; TorchJD's own
    # Nash-MTL solves it with cvxpy in 50 ms a step.
    "nash": ("Nash-MTL", _rule(jd.FairGradWeighting(alpha=1.0))),
    "fairgrad": ("FairGrad, alpha = 2", _rule(jd.FairGradWeighting(alpha=2.0))),
    "aligned": ("Aligned-MTL", _rule(jd.AlignedMTLWeighting())),
}

METHODS: dict[str, Method] = {
    "equal": Method("equal weights", scalar=lambda _: MeanLoss()),
    "log": Method("sum of logarithms", scalar=lambda _: MeanLogarithm(), logarithm=True),
    "uncertainty": Method("uncertainty weighting", scalar=UncertaintyWeighting),
    "rlw": Method("random loss weighting", scalar=lambda _: RandomLossWeighting()),
    **{name: Method(title, make=make) for name, (title, make) in _RULES.items()},
    **{
        f"{name}-log": Method(f"{title}, of logarithms", make=make, logarithm=True)
        for name, (title, make) in _RULES.items()
    },
}
