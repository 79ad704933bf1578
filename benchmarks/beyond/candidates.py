"""The candidates by name, as optimizers and as methods of the multi-task study."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor
from torch.optim import Optimizer

from benchmarks.beyond.metric import InnerMetric
from benchmarks.beyond.rules import RULES
from raco_optim import MultiObjectiveOptimizer

BASELINES = ("linear", "cagrad", "raco")
CANDIDATES = ("budget", "soft", "metric", "smooth", "conflict", "cone", "tail", "persistent")
TITLES = {
    "linear": "weighted sum",
    "cagrad": "CAGrad",
    "raco": "CAGrad-Clip",
    "budget": "budgeted clipping",
    "soft": "soft clipping",
    "metric": "inner metric",
    "smooth": "smoothed Gram matrix",
    "conflict": "c by conflict",
    "cone": "projection to the cone",
    "tail": "bounded p",
    "persistent": "c by lasting conflict",
}
COMPARED_NAMES = (*BASELINES, *CANDIDATES)
RADII = (0.4, 0.8)


def candidate(
    name: str,
    inner: Optimizer,
    weights: Sequence[float],
    c: float,
    shared: Sequence[Tensor] | None = None,
) -> MultiObjectiveOptimizer:
    """Makes the optimizer of a candidate.

    Args:
        name: One of `CANDIDATES`.
        inner: The optimizer that it drives.
        weights: Weights of the losses, summing to 1.
        c: Radius of the correction.
        shared: Parameters that enter the Gram matrix; default: all.
    """
    if name == "metric":
        return InnerMetric(inner, weights, c, shared)
    return MultiObjectiveOptimizer(inner, RULES[name](c), weights=weights, shared_parameters=shared)
