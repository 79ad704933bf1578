"""What a method minimises (log-probabilities and preferences -> losses), and its optimizer."""

from __future__ import annotations

import functools
from collections.abc import Iterable
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer

from raco_optim.alignment import (
    PairLogProbs,
    amopo_losses,
    modpo_loss,
    preference_losses,
    reward_margins,
)
from raco_optim.integrations.trl_config import LOSS_TYPES, MultiObjectiveDPOConfig
from raco_optim.optimizer import MultiObjectiveOptimizer
from raco_optim.optimizers import MGDA, AllOptions, CAGrad, CAGradClip


def multi_objective(
    args: MultiObjectiveDPOConfig, inner: Optimizer, model: nn.Module
) -> MultiObjectiveOptimizer:
    """Wraps an optimizer for a method that combines the gradients of the objectives."""
    weights = args.objective_weights
    options: AllOptions = {"nonfinite": args.nonfinite}
    if uses_scores(args):
        options |= {"gradients": "per_example", "model": model}
    if args.method == "mgda":
        return MGDA(inner, weights, **options)
    if args.method == "cagrad":
        return CAGrad(inner, weights, args.c, solver=args.solver, **options)
    return CAGradClip(inner, weights, args.c, solver=args.solver, **options)


def uses_scores(args: MultiObjectiveDPOConfig) -> bool:
    """Whether the optimizer is given the scores of the completions, for one backward pass."""
    # Compiled as a whole, a model does not run the hooks that this needs.
    return not args.torch_compile or bool(args.gradient_checkpointing)


def needs_reference(args: MultiObjectiveDPOConfig, *, training: bool) -> bool:
    """Whether the losses need log-probabilities under the reference model."""
    return bool(_form(args, training)["loss"] != "simpo")


def losses(
    args: MultiObjectiveDPOConfig,
    log_probs: PairLogProbs,
    signs: Tensor,
    margins: Tensor | None,
    counts: Tensor | None,
    *,
    training: bool,
) -> list[Tensor | None]:
    """One loss per objective, None where it labels no pair.

    Args:
        args: Says which losses: those of the method in training, of `loss_type` in evaluation.
        log_probs: Of B pairs.
        signs: Preferences, ``[B, m]`` in {+1, -1, 0}.
        margins: Reward margins, ``[B, m]``, for MODPO.
        counts: Labelled pairs per objective of the accumulated batch, ``[m]``; None for this one.
        training: Whether the losses are minimised.
    """
    if training and args.method == "amopo":
        return amopo_losses(log_probs, signs, beta=args.beta, counts=counts)
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
            count=None if counts is None else counts[k],
        )
        return found
    return preference_losses(
        log_probs,
        signs,
        label_smoothing=args.label_smoothing,
        gamma=args.simpo_gamma,  # 0 but for SimPO
        counts=counts,
        **_form(args, training),
    )


def margins_of_labelled(
    args: MultiObjectiveDPOConfig, log_probs: PairLogProbs, signs: Tensor, *, training: bool
) -> list[Tensor]:
    """The reward margins of the pairs that each objective labels."""
    return [reward_margins(log_probs, sign, **_form(args, training)) for sign in signs.T]


def loss_weights(args: MultiObjectiveDPOConfig, *, training: bool) -> list[float]:
    """Returns the weights of the losses; MODPO's one loss has them inside."""
    weights = list(args.objective_weights.values())
    return [1.0] * len(weights) if training and args.method == "modpo" else weights


def weighted(losses: Iterable[Tensor | None], weights: Iterable[float]) -> Tensor | None:
    """Returns the weighted sum of the losses that are there, None if there are none."""
    terms = [w * loss for w, loss in zip(weights, losses, strict=True) if loss is not None]
    return functools.reduce(lambda total, term: total + term, terms) if terms else None


def _form(args: MultiObjectiveDPOConfig, training: bool) -> dict[str, Any]:
    loss, normalised = LOSS_TYPES[args.loss_type[0]]
    if training and args.method == "amopo":  # SimPO without a target margin
        loss, normalised = "simpo", True
    if training and args.method == "modpo":  # DPO with a margin
        loss, normalised = "dpo", False
    return {"loss": loss, "beta": args.beta, "length_normalized": normalised}
