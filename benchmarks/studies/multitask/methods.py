"""The methods that are compared: ours, and TorchJD's weightings as rules of our optimizer."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torchjd.aggregation as jd
from torch import Tensor
from torch.optim import Optimizer

from raco_optim import MGDA, CAGrad, CAGradClip, LinearScalarization, MultiObjectiveOptimizer

Make = Callable[
    [Optimizer, Sequence[float], Sequence[Tensor], float | None], MultiObjectiveOptimizer
]
PLAIN, SCALED = 0.0, 1.0  # values of the parameter of a method that takes no weights


@dataclass(frozen=True)
class Method:
    """How a method is made and tuned.

    Attributes:
        title: Its name in tables.
        make: (inner optimizer, weights, shared parameters, own parameter) -> optimizer.
        scaled: Whether the losses are multiplied by m w_i; None: where the parameter is `SCALED`.
        parameter: What its own parameter is called; None if it has none.
        values: Values of the parameter that are tried; two or none.
    """

    title: str
    make: Make
    scaled: bool | None = False
    parameter: str | None = None
    values: tuple[float, ...] = ()

    def scales(self, parameter: float | None) -> bool:
        """Whether the losses are multiplied by m w_i."""
        return parameter == SCALED if self.scaled is None else self.scaled


def from_gram(weighting: Callable[[Sequence[float], float | None], Callable]) -> Make:
    """A rule of the Gram matrix, computed on a Gram matrix whose diagonal has mean 1.

    Some solvers stop by absolute tolerances; the directions of all rules here are those of any
    positive multiple, and Adam does not see the length.
    """

    def make(
        inner: Optimizer, weights: Sequence[float], shared: Sequence[Tensor], value: float | None
    ) -> MultiObjectiveOptimizer:
        rule = weighting(weights, value)

        def normalised(gram: Tensor) -> Tensor:
            return rule(gram / gram.diagonal().mean().clamp(min=torch.finfo(gram.dtype).tiny))

        return MultiObjectiveOptimizer(inner, normalised, weights=weights, shared_parameters=shared)

    return make


METHODS = {
    "linear": Method(
        "weighted sum",
        lambda inner, w, shared, _: LinearScalarization(inner, w, shared_parameters=shared),
    ),
    "cagrad": Method(
        "CAGrad",
        lambda inner, w, shared, c: CAGrad(inner, w, c, shared_parameters=shared),
        parameter="c",
        values=(0.4, 0.8),
    ),
    "raco": Method(
        "CAGrad-Clip",
        lambda inner, w, shared, c: CAGradClip(inner, w, c, shared_parameters=shared),
        parameter="c",
        values=(0.4, 0.8),
    ),
    "mgda": Method(
        "MGDA",
        lambda inner, w, shared, _: MGDA(inner, w, shared_parameters=shared),
        scaled=None,
        parameter="scaled",
        values=(PLAIN, SCALED),
    ),
    "upgrad": Method(
        "UPGrad", from_gram(lambda w, _: jd.UPGradWeighting(torch.tensor(w, dtype=torch.float64)))
    ),
    "pcgrad": Method(
        "PCGrad",
        from_gram(lambda w, _: jd.PCGradWeighting()),
        scaled=None,
        parameter="scaled",
        values=(PLAIN, SCALED),
    ),
    # The equation of Nash-MTL, G a = 1 / a, is FairGrad's for alpha = 1. TorchJD's own Nash-MTL
    # solves it with cvxpy and ECOS, takes 40 to 60 ms a call and now and then misses it by far.
    "nashmtl": Method("Nash-MTL", from_gram(lambda w, _: jd.FairGradWeighting(alpha=1.0))),
    "imtlg": Method("IMTL-G", from_gram(lambda w, _: jd.IMTLGWeighting())),
    "alignedmtl": Method(
        "Aligned-MTL",
        from_gram(lambda w, _: jd.AlignedMTLWeighting(torch.tensor(w, dtype=torch.float64))),
    ),
    "fairgrad": Method(
        "FairGrad",
        from_gram(lambda w, alpha: jd.FairGradWeighting(alpha=alpha)),
        scaled=True,
        parameter="alpha",
        values=(0.5, 2.0),
    ),
}
