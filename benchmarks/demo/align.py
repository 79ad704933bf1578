"""One alignment: a pretrained model + preference pairs + a `raco_optim` optimizer -> metrics.

Each objective has its own DPO loss on the shared pairs. With the log-ratio of a pair (x, y),

    Delta = [log pi(x) - log pi(y)] - [log pi_ref(x) - log pi_ref(y)],

and s_i = +1 if objective i prefers x, -1 if it prefers y and 0 if it has no preference,

    L_i = -mean over pairs with s_i != 0 of  log sigmoid(beta s_i Delta).

One forward pass gives Delta and thereby every loss.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from tokenizers import Tokenizer
from torch import Tensor
from transformers import Qwen3ForCausalLM

from benchmarks.demo.data import OBJECTIVES, PreferencePair
from benchmarks.demo.model import token_log_probs, tokenize, trim
from raco_optim import MultiObjectiveOptimizer

BETA = 0.1


@dataclass(frozen=True)
class PairTensors:
    """Preference pairs as tensors.

    Attributes:
        ids: Token ids ``[n, 2, T]``: first and second sentence, padded on the right.
        signs: Preferences ``[n, m]`` in {+1, -1, 0}.
        reference: Log-ratio ``[n]`` under the reference model, computed once.
    """

    ids: Tensor
    signs: Tensor
    reference: Tensor

    def batches(self, size: int) -> Iterator[PairTensors]:
        """Consecutive batches of `size` pairs, in order."""
        tensors = (self.ids.split(size), self.signs.split(size), self.reference.split(size))
        for ids, signs, reference in zip(*tensors, strict=True):
            yield PairTensors(trim(ids), signs, reference)


@dataclass(frozen=True)
class Evaluation:
    """How well a model does on one objective, over the pairs that the objective labels.

    Attributes:
        loss: DPO loss; log 2 for the reference model.
        margin: Mean of beta s_i Delta, in nats; 0 for the reference model.
        accuracy: Share of pairs with s_i Delta > 0. Delta = 0 counts as half right, so that the
            reference model scores 1/2.
    """

    loss: float
    margin: float
    accuracy: float


@dataclass(frozen=True)
class Training:
    """What the optimizer reported along the way.

    Attributes:
        hurting_steps: Share of steps whose combined gradient G, followed downhill, raises the loss
            of some objective to first order: (H alpha)_i = <g_i, G> < 0.
        conflicting_steps: Share of steps with <g_i, g_j> < 0.
    """

    hurting_steps: float
    conflicting_steps: float


def log_ratios(model: Qwen3ForCausalLM, ids: Tensor) -> Tensor:
    """Log-ratios log pi(first) - log pi(second) ``[n]`` of pairs of token ids ``[n, 2, T]``."""
    log_probs = token_log_probs(model, ids.flatten(0, 1)).sum(-1).view(-1, 2)
    return log_probs[:, 0] - log_probs[:, 1]


def pair_tensors(
    pairs: Sequence[PreferencePair], tokenizer: Tokenizer, reference: Qwen3ForCausalLM
) -> PairTensors:
    """Tokenizes pairs and computes the log-ratios of the reference model."""
    ids = tokenize(tokenizer, [text for pair in pairs for text in (pair.first, pair.second)])
    signs = torch.tensor([pair.signs for pair in pairs])
    tensors = PairTensors(ids.view(len(pairs), 2, -1), signs, torch.zeros(len(pairs)))
    return replace(tensors, reference=deltas(reference, tensors))


@torch.no_grad()
def deltas(model: Qwen3ForCausalLM, pairs: PairTensors) -> Tensor:
    """Delta ``[n]`` of every pair, without a graph."""
    return torch.cat(
        [log_ratios(model, batch.ids) - batch.reference for batch in pairs.batches(64)]
    )


def reward_margins(delta: Tensor, signs: Tensor) -> dict[str, Tensor]:
    """beta s_i Delta for every pair that objective i labels, per objective.

    Args:
        delta: Log-ratio of the policy minus that of the reference ``[n]``.
        signs: Preferences ``[n, m]`` in {+1, -1, 0}.

    Returns:
        For each objective a vector with one entry per pair whose sign is not 0.
    """
    return {
        name: BETA * (sign * delta)[sign != 0]
        for name, sign in zip(OBJECTIVES, signs.T, strict=True)
    }


def dpo_losses(delta: Tensor, signs: Tensor) -> dict[str, Tensor | None]:
    """One DPO loss per objective on shared pairs; None for one that labels no pair."""
    return {
        name: -F.logsigmoid(margins).mean() if len(margins) else None
        for name, margins in reward_margins(delta, signs).items()
    }


def evaluate(model: Qwen3ForCausalLM, pairs: PairTensors) -> dict[str, Evaluation]:
    """Loss, margin and preference accuracy per objective."""
    return {
        name: Evaluation(
            loss=-F.logsigmoid(margins).mean().item(),
            margin=margins.mean().item(),
            accuracy=((1 + margins.sign()) / 2).mean().item(),
        )
        for name, margins in reward_margins(deltas(model, pairs), pairs.signs).items()
    }


def align(
    base: Qwen3ForCausalLM,
    pairs: PairTensors,
    make_optimizer: Callable[[torch.optim.Optimizer], MultiObjectiveOptimizer],
    *,
    on_step: Callable[[], object],
    batch_size: int = 16,
    lr: float = 1e-3,
) -> tuple[Qwen3ForCausalLM, Training]:
    """Aligns a copy of `base` in one pass over `pairs`.

    Args:
        base: The pretrained model; it is not changed.
        pairs: Training pairs.
        make_optimizer: Wraps the inner AdamW in a multi-objective optimizer.
        on_step: Called after each step.
        batch_size: Pairs per step.
        lr: Learning rate of AdamW.

    Returns:
        The aligned model, and what happened to the gradients.
    """
    model = copy.deepcopy(base)
    optimizer = make_optimizer(torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=0.0))
    hurting, conflicting = [], []
    for batch in pairs.batches(batch_size):
        losses = dpo_losses(log_ratios(model, batch.ids) - batch.reference, batch.signs)
        optimizer.zero_grad()
        optimizer.backward(losses)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()

        report = optimizer.report
        hurting.append(bool((report.gram @ report.coefficients < 0).any()))
        conflicting.append(bool((report.gram < 0).any()))
        on_step()
    return model, Training(sum(hurting) / len(hurting), sum(conflicting) / len(conflicting))
