"""One run: a policy + preference pairs + a method -> a trained policy and what was measured.

The methods, by the losses that they train on and the rule that combines the gradients:

    linear, single   one DPO loss per objective    weighted sum (single: all weight on one)
    cagrad, raco     the same                      CAGrad without, CAGrad-Clip with clipping
    mgda             the same                      min-norm point, whatever the weights
    amopo            one AMoPO loss per objective  weighted sum
    modpo            one MODPO loss                none to combine
    soup             none: the weights of the models of `single`, averaged
    initial          none: the reference model
"""

from __future__ import annotations

import contextlib
import math
import statistics
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from benchmarks.studies.alignment.log_probs import in_batches
from benchmarks.studies.alignment.trials import EncodedPairs, Trial
from raco_optim import MGDA, CAGrad, CAGradClip, LinearScalarization, MultiObjectiveOptimizer
from raco_optim.alignment import PairLogProbs, amopo_losses, modpo_loss, preference_losses

BETA = 0.1
TRAINED = ("linear", "single", "cagrad", "raco", "mgda", "amopo", "modpo")
# MODPO trains on the pairs of one objective and takes the others' rewards as margins: here on
# those of the first objective, whose labels are human.
MODPO_OBJECTIVE = 0


@dataclass(frozen=True)
class Recipe:
    """Everything about a run but the data and the model."""

    method: str  # one of `TRAINED`
    weights: Mapping[str, float]
    lr: float
    batch_size: int
    amopo_beta: float = 1.0  # of losses whose rewards are means over tokens
    c: float | None = None  # radius of CAGrad and CAGrad-Clip


def trainable(model: torch.nn.Module) -> dict[str, Tensor]:
    """The parameters that a run trains, by name."""
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def losses(recipe: Recipe, log_probs: PairLogProbs, pairs: EncodedPairs) -> list[Tensor | None]:
    """The losses that a method trains on; None for one without a labelled pair."""
    if recipe.method == "amopo":
        return amopo_losses(log_probs, pairs.signs, beta=recipe.amopo_beta)
    if recipe.method == "modpo":
        k, weights = MODPO_OBJECTIVE, list(recipe.weights.values())
        sign, margins = pairs.signs[:, k], pairs.margins.to(log_probs.chosen.device)
        return [modpo_loss(log_probs, sign, margins, weights, k, beta=BETA)]
    return preference_losses(log_probs, pairs.signs, beta=BETA)


def optimizer_for(recipe: Recipe, inner: torch.optim.Optimizer) -> MultiObjectiveOptimizer:
    """The optimizer of the library that combines the gradients as the method does."""
    weights = list(recipe.weights.values())
    if recipe.method in ("cagrad", "raco"):
        assert recipe.c is not None
        return (CAGrad if recipe.method == "cagrad" else CAGradClip)(inner, weights, recipe.c)
    if recipe.method == "mgda":
        return MGDA(inner, weights)
    return LinearScalarization(inner, [1.0] if recipe.method == "modpo" else weights)


def train(trial: Trial, recipe: Recipe) -> tuple[PreTrainedModel, dict[str, Any]]:
    """Trains a policy in one pass over the training pairs; returns it, and means over the steps.

    ``hurting_steps`` is the share of steps whose combined gradient, followed downhill, raises a
    loss to first order, (H alpha)_i < 0; ``conflicting_steps`` that with some <g_i, g_j> < 0. In
    ``vertex_share`` p is a vertex, so that clipping cannot turn the correction. None where a
    method has no such number.
    """
    policy = trial.new_policy()
    parameters = list(trainable(policy).values())
    inner = torch.optim.AdamW(parameters, lr=recipe.lr, weight_decay=0.0)
    optimizer = optimizer_for(recipe, inner)
    device = parameters[0].device.type
    reports, start = [], time.perf_counter()
    for batch in trial.train.batches(recipe.batch_size):
        amp = torch.autocast(device, torch.bfloat16) if trial.bf16 else contextlib.nullcontext()
        with amp:
            found = losses(recipe, batch.log_probs(policy), batch)
        if any(loss is not None for loss in found):
            optimizer.zero_grad()
            optimizer.backward(found)
            torch.nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
            reports.append(optimizer.report)
    seconds = time.perf_counter() - start
    return policy, {"steps": len(reports), "seconds": seconds, **_means(recipe, reports)}


def _means(recipe: Recipe, reports: Sequence[Any]) -> dict[str, float | None]:
    def mean(values: Iterable[float]) -> float | None:
        known = [float(value) for value in values if not math.isnan(value)]
        return statistics.fmean(known) if known else None

    single = recipe.method == "modpo"  # one loss: nothing to hurt, nothing in conflict
    return {
        "hurting_steps": None if single else mean(r.hurting for r in reports),
        "conflicting_steps": None if single else mean(r.conflicting for r in reports),
        # p is NaN where a loss is absent.
        "vertex_share": mean(bool((r.p > 1 - 1e-9).any()) for r in reports if r.p is not None),
    }


def log_ratios(policy: PreTrainedModel, trial: Trial) -> list[float]:
    """Delta of every held-out pair, in nats, rounded to 0.01; accuracy and loss follow from it."""
    chosen, rejected = trial.held_out.scored(policy).log_ratios()
    return [round(delta, 2) for delta in (chosen - rejected).tolist()]


def nats_per_token(policy: PreTrainedModel, trial: Trial) -> float:
    """Cross-entropy of human text: what alignment may cost."""
    sums, tokens = in_batches(policy, trial.text)
    return -(sums.sum() / tokens.sum()).item()
