"""Trains one rule on the MLP for several seeds at once, several times faster than one by one.

Every tensor has a leading dimension of seeds, S. The gradients of the losses, ``g_i``, are never
formed: a linear layer with inputs ``a_n`` and gradients ``delta_in`` of its outputs adds
``sum_nm (1 + a_n . a_m) (delta_in . delta_jm)`` to the Gram matrix, and its combined gradient is
``sum_n (sum_i alpha_i delta_in) a_n^T``. The rules are those of the library's optimizers, and the
tests hold the result against `training.train`, which uses these optimizers.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.studies.qm9.data import QM9, TARGETS, Molecules
from benchmarks.studies.qm9.methods import METHODS
from benchmarks.studies.qm9.models import HistogramMLP
from benchmarks.studies.qm9.training import Batches, Length, Observed, Run, delta_m
from raco_optim.rules import FunctionRule, Rule


class _Models(nn.Module):
    """S networks like `HistogramMLP`, each with the initial weights of its seed."""

    def __init__(self, seeds: Sequence[int]) -> None:
        super().__init__()
        layers: list[list[Tensor]] = []
        for seed in seeds:
            torch.manual_seed(seed)
            model = HistogramMLP()
            first, second = model.trunk[0], model.trunk[2]
            heads = [
                torch.stack([getattr(h, x)[0] for h in model.heads]) for x in ("weight", "bias")
            ]
            layers.append([first.weight, first.bias, second.weight, second.bias, *heads])
        self.layers = nn.ParameterList(torch.stack(x).detach() for x in zip(*layers, strict=True))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Returns the outputs of the layers, before and after SiLU the hidden ones: z, z, h, y."""
        w1, b1, w2, b2, w3, b3 = self.layers
        z1 = torch.baddbmm(b1[:, None], x, w1.mT)
        z2 = torch.baddbmm(b2[:, None], F.silu(z1), w2.mT)
        h2 = F.silu(z2)
        return z1, z2, h2, torch.baddbmm(b3[:, None], h2, w3.mT)


def train_together(
    runs: Sequence[Run], data: QM9, length: Length, reference: list[float]
) -> list[dict[str, Any]]:
    """Trains runs of one rule on the MLP with all labels, which differ in their seed only."""
    start = time.process_time()
    run, m = runs[0], len(TARGETS)
    models = _Models([r.seed for r in runs])
    torch.manual_seed(run.seed)  # for rules that draw numbers
    inner = torch.optim.Adam(models.parameters(), run.rate)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(inner, length.steps)
    method, weights = METHODS[run.method], [1 / m] * m
    assert method.make is not None
    rules = [method.make(inner, weights, list(models.layers)[:4]).rule for _ in runs]
    rules = [rule if isinstance(rule, Rule) else FunctionRule(rule) for rule in rules]
    samplers = [Batches(r, len(data.train), length.batch) for r in runs]
    observed = [Observed() for _ in runs]
    best = torch.full((len(runs),), torch.inf, dtype=torch.float64)
    kept = [p.detach().clone() for p in models.layers]
    with torch.no_grad():
        for step in range(1, length.steps + 1):
            rows = torch.stack([sampler.draw()[0] for sampler in samplers])
            gram = _gradients(models, data.train, rows, rules, method.logarithm)
            if step % 20 == 0:
                for one, H in zip(observed, gram, strict=True):
                    one.add(H)
            inner.step()
            schedule.step()
            if step % (length.steps // length.evaluations) == 0:
                found = _errors(models, data.validation)
                score = torch.tensor([delta_m(e, reference) for e in found], dtype=torch.float64)
                better = score < best
                best = torch.minimum(score, best)
                for old, new in zip(kept, models.layers, strict=True):
                    old[better] = new[better]
        for old, new in zip(kept, models.layers, strict=True):
            new.copy_(old)
        validation, test = _errors(models, data.validation), _errors(models, data.test)
    seconds = round((time.process_time() - start) / len(runs), 2)
    return [
        {"validation": v, "test": t, "gradients": o.summary(), "seconds": seconds}
        for v, t, o in zip(validation, test, observed, strict=True)
    ]


def _gradients(
    models: _Models, part: Molecules, rows: Tensor, rules: Sequence[Any], logarithm: bool
) -> Tensor:
    """Writes the combined gradients to ``.grad``; returns the Gram matrices, ``[S, m, m]``."""
    x, y = part.histogram[rows], part.targets[rows]
    z1, z2, h2, prediction = models(x)
    _, _, w2, _, w3, _ = models.layers
    count, m = rows.shape[1], y.shape[2]
    error = prediction - y
    scale = torch.full_like(error[:, 0], 2 / count)  # dL_i = scale_i error_i dprediction_i
    if logarithm:
        scale = scale / error.square().mean(1)
    outer = scale[:, None] * error  # [S, N, m]
    delta2 = outer.mT[..., None] * w3[:, :, None] * _silu_slope(z2)[:, None]  # [S, m, N, width]
    delta1 = (delta2.flatten(1, 2) @ w2).view_as(delta2) * _silu_slope(z1)[:, None]
    h1 = F.silu(z1)
    gram = sum(_gram(a, delta) for a, delta in ((x, delta1), (h1, delta2)))
    gram = ((gram + gram.mT) / 2).double()
    mixed = [rule(H, [1 / m] * m).coefficients for rule, H in zip(rules, gram, strict=True)]
    alpha = torch.stack(mixed).to(x.dtype)
    both = [torch.einsum("sm,smnf->snf", alpha, delta) for delta in (delta1, delta2)]
    heads = outer / m  # a head has one loss and gets w_i g_i
    pairs = ((x, both[0]), (h1, both[1]), (h2, heads))
    grads = [g for a, delta in pairs for g in (delta.mT @ a, delta.sum(1))]
    for parameter, grad in zip(models.layers, grads, strict=True):
        parameter.grad = grad
    return gram


def _gram(a: Tensor, delta: Tensor) -> Tensor:
    """Gram matrices of the gradients of a linear layer with a bias, ``[S, m, m]``."""
    similar = torch.baddbmm(torch.ones(1, 1, 1), a, a.mT)
    return (similar[:, None] @ delta).flatten(2) @ delta.flatten(2).mT


def _silu_slope(z: Tensor) -> Tensor:
    gate = z.sigmoid()
    return gate * (1 + z * (1 - gate))


def _errors(models: _Models, part: Molecules) -> list[list[float]]:
    """Mean absolute errors by seed and target, in standard deviations of the training set."""
    total = torch.zeros(len(models.layers[0]), part.targets.shape[1], dtype=torch.float64)
    for rows in torch.arange(len(part)).split(1000):
        x = part.histogram[rows].expand(len(total), -1, -1)
        total += (models(x)[3] - part.targets[rows]).abs().double().sum(1)
    return (total / len(part)).tolist()
