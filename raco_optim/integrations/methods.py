"""The methods of the trainer: the losses of each, and its optimizer."""

from __future__ import annotations

import functools
import math
from collections.abc import Iterable
from dataclasses import replace

from torch import Tensor, nn
from torch.optim import Optimizer

from raco_optim.alignment import (
    PairLogProbs,
    amopo_losses,
    modpo_loss,
    preference_losses,
    reward_margins,
)
from raco_optim.integrations.preference_data import Preferences
from raco_optim.integrations.trl_config import MultiObjectiveDPOConfig
from raco_optim.optimizer import MultiObjectiveOptimizer
from raco_optim.optimizers import MGDA, AllOptions, CAGrad, CAGradClip


def multi_objective(
    args: MultiObjectiveDPOConfig,
    inner: Optimizer,
    model: nn.Module,
    *,
    one_pass: bool,
    scaled: bool,
) -> MultiObjectiveOptimizer:
    """Wraps an optimizer for a method that combines the gradients of the objectives.

    Args:
        args: Settings, including the method.
        inner: The optimizer.
        model: The model.
        one_pass: Whether to use one backward pass for all objectives where the layers allow it.
        scaled: Whether a `GradScaler` scales the losses and skips steps.
    """
    weights = args.objective_weights
    options: AllOptions = {"nonfinite": "propagate" if scaled else args.nonfinite}
    if one_pass:
        options |= {"gradients": "per_example", "model": model}
    if args.method == "mgda":
        return MGDA(inner, weights, **options)
    if args.method == "cagrad":
        return CAGrad(inner, weights, args.c, solver=args.solver, **options)
    return CAGradClip(inner, weights, args.c, solver=args.solver, **options)


def unscale_report(optimizer: MultiObjectiveOptimizer, scale: float, nonfinite: str) -> None:
    """Divides the last report's losses and Gram matrix by the loss scale; counts an overflow.

    Raises:
        FloatingPointError: With ``nonfinite="raise"``, if a loss itself is NaN or Inf.
    """
    report, progress = optimizer.report, optimizer._core.progress
    losses, gram = report.losses / scale, report.gram / scale**2
    for name, loss in zip(report.names, losses.tolist(), strict=True):
        if nonfinite == "raise" and name not in report.absent and not math.isfinite(loss):
            raise FloatingPointError(
                f"loss {name!r} is NaN or Inf; got {loss}. Choose nonfinite='skip' to leave out "
                f"such updates, or train with bf16=True."
            )
    skip = not bool(gram.isfinite().all() & report.coefficients.isfinite().all())
    skipped = progress.skipped + skip
    report = replace(report, losses=losses, gram=gram, skip=skip, skipped=skipped)
    optimizer._core.progress = replace(progress, report=report, skipped=skipped)


def losses(
    args: MultiObjectiveDPOConfig,
    log_probs: PairLogProbs,
    preferences: Preferences,
    counts: Tensor | None,
    *,
    training: bool,
) -> list[Tensor | None]:
    """Returns one loss per objective; None if it labels no pair.

    Args:
        args: Settings: the method decides the losses in training, `loss_type` in evaluation.
        log_probs: Log-probabilities of B pairs.
        preferences: Preferences over the same pairs.
        counts: Total weight of the labelled pairs of the accumulated batch, ``[m]``; None to
            count these B pairs alone.
        training: Whether the model is trained or evaluated.
    """
    signs, pair_weights, margins = preferences
    if training and args.method == "amopo":
        return amopo_losses(
            log_probs, signs, beta=args.beta, pair_weights=pair_weights, counts=counts
        )
    if training and args.method == "modpo":
        assert margins is not None
        assert args.modpo_objective is not None
        k = list(args.objective_weights).index(args.modpo_objective)
        found: list[Tensor | None] = [None] * len(args.objective_weights)
        found[k] = modpo_loss(
            log_probs,
            signs[:, k],
            margins,
            list(args.objective_weights.values()),
            k,
            beta=args.beta,
            pair_weight=pair_weights[:, k],
            count=None if counts is None else counts[k],
        )
        return found
    terms = [
        (
            factor,
            preference_losses(log_probs, signs, pair_weights=pair_weights, counts=counts, **form),
        )
        for factor, form in args.loss_forms
    ]
    factors = [factor for factor, _ in terms]
    return [weighted(each, factors) for each in zip(*(term for _, term in terms), strict=True)]


def margins_of_labelled(
    args: MultiObjectiveDPOConfig, log_probs: PairLogProbs, signs: Tensor, *, training: bool
) -> list[Tensor]:
    """Returns, per objective, the reward margins of the pairs that it labels."""
    _, form = args.loss_forms[0]
    loss, per_token = form["loss"], form["length_normalized"]
    if training and args.method == "amopo":  # SimPO without a target margin
        loss, per_token = "simpo", True
    if training and args.method == "modpo":  # DPO with a margin
        loss, per_token = "dpo", False
    return [
        reward_margins(log_probs, sign, loss=loss, beta=args.beta, length_normalized=per_token)
        for sign in signs.T
    ]


def loss_weights(args: MultiObjectiveDPOConfig, *, training: bool) -> list[float]:
    """Returns the weights of the losses; MODPO's single loss contains them already."""
    weights = list(args.objective_weights.values())
    return [1.0] * len(weights) if training and args.method == "modpo" else weights


def weighted(losses: Iterable[Tensor | None], weights: Iterable[float]) -> Tensor | None:
    """Returns the weighted sum of the losses that are not None; None if all are."""
    terms = [w * loss for w, loss in zip(weights, losses, strict=True) if loss is not None]
    return functools.reduce(lambda total, term: total + term, terms) if terms else None
