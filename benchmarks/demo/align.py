"""One alignment: a pretrained model + preference pairs + a `raco_optim` optimizer -> metrics.

Each objective has its own DPO loss on the shared pairs. With the log-ratio of a pair (x, y),

    Delta = [log pi(x) - log pi(y)] - [log pi_ref(x) - log pi_ref(y)],

and s_i = +1 if objective i prefers x, -1 if it prefers y and 0 if it has no preference,

    L_i = -mean over pairs with s_i != 0 of  log sigmoid(beta s_i Delta).

One forward pass gives Delta and thereby every loss; `raco_optim.alignment` has the formula.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from tokenizers import Tokenizer
from torch import Tensor
from transformers import Qwen3ForCausalLM

from benchmarks.demo.data import OBJECTIVES, PreferencePair
from benchmarks.demo.model import token_log_probs, tokenize, trim
from raco_optim import MultiObjectiveOptimizer
from raco_optim.alignment import PairLogProbs, preference_losses, reward_margins

BETA = 0.1


@dataclass(frozen=True)
class PairTensors:
    """Preference pairs as tensors."""

    ids: Tensor  # token ids [n, 2, T] of first and second sentence, padded on the right
    signs: Tensor  # preferences [n, m] in {+1, -1, 0}
    reference: Tensor  # log-probabilities [n, 2] under the reference model

    def batches(self, size: int) -> Iterator[PairTensors]:
        """Consecutive batches of `size` pairs, in order."""
        tensors = (self.ids.split(size), self.signs.split(size), self.reference.split(size))
        for ids, signs, reference in zip(*tensors, strict=True):
            yield PairTensors(trim(ids), signs, reference)


@dataclass(frozen=True)
class Evaluation:
    """How well a model does on one objective, over the pairs that the objective labels."""

    loss: float  # DPO's; log 2 for the reference model
    margin: float  # mean of beta s_i Delta, in nats; 0 for the reference model
    accuracy: float  # share with s_i Delta > 0; Delta = 0 is half right: 1/2 for the reference


@dataclass(frozen=True)
class Training:
    """Shares of the steps, as the optimizer reports them."""

    hurting_steps: float  # the combined gradient G raises a loss to first order: <g_i, G> < 0
    conflicting_steps: float  # <g_i, g_j> < 0


def log_probs(model: Qwen3ForCausalLM, ids: Tensor) -> Tensor:
    """Log-probabilities ``[n, 2]`` of pairs of token ids ``[n, 2, T]``."""
    return token_log_probs(model, ids.flatten(0, 1)).sum(-1).view(-1, 2)


def with_reference(policy: Tensor, pairs: PairTensors) -> PairLogProbs:
    """Log-probabilities ``[n, 2]`` of pairs, beside those of the reference model."""
    return PairLogProbs(*policy.T, *pairs.reference.T)


def pair_tensors(
    pairs: Sequence[PreferencePair], tokenizer: Tokenizer, reference: Qwen3ForCausalLM
) -> PairTensors:
    """Tokenizes pairs and computes the log-probabilities of the reference model."""
    ids = tokenize(tokenizer, [text for pair in pairs for text in (pair.first, pair.second)])
    signs = torch.tensor([pair.signs for pair in pairs])
    tensors = PairTensors(ids.view(len(pairs), 2, -1), signs, torch.zeros(len(pairs), 2))
    return replace(tensors, reference=all_log_probs(reference, tensors))


@torch.no_grad()
def all_log_probs(model: Qwen3ForCausalLM, pairs: PairTensors) -> Tensor:
    """Log-probabilities ``[n, 2]`` of any number of pairs, without a graph."""
    return torch.cat([log_probs(model, batch.ids) for batch in pairs.batches(64)])


def evaluate(model: Qwen3ForCausalLM, pairs: PairTensors) -> dict[str, Evaluation]:
    """Loss, margin and preference accuracy per objective; each must label some pair."""
    found = with_reference(all_log_probs(model, pairs), pairs)
    evaluations = {}
    for name, sign in zip(OBJECTIVES, pairs.signs.T, strict=True):
        margins = reward_margins(found, sign, beta=BETA)
        (loss,) = preference_losses(found, sign[:, None], beta=BETA)
        assert loss is not None
        evaluations[name] = Evaluation(
            loss=loss.item(),
            margin=margins.mean().item(),
            accuracy=((1 + margins.sign()) / 2).mean().item(),
        )
    return evaluations


def align(
    base: Qwen3ForCausalLM,
    pairs: PairTensors,
    make_optimizer: Callable[[torch.optim.Optimizer], MultiObjectiveOptimizer],
    *,
    on_step: Callable[[], object],
    batch_size: int = 16,
    lr: float = 1e-3,
) -> tuple[Qwen3ForCausalLM, Training]:
    """Aligns a copy of `base` in one pass over `pairs`; `on_step` is called after each step."""
    model = copy.deepcopy(base)
    optimizer = make_optimizer(torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=0.0))
    hurting, conflicting = [], []
    for batch in pairs.batches(batch_size):
        policy = with_reference(log_probs(model, batch.ids), batch)
        losses = preference_losses(policy, batch.signs, beta=BETA)
        optimizer.zero_grad()
        optimizer.backward(dict(zip(OBJECTIVES, losses, strict=True)))
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()

        report = optimizer.report  # a copy at each reading
        hurting.append(report.hurting)
        conflicting.append(report.conflicting)
        on_step()
    return model, Training(sum(hurting) / len(hurting), sum(conflicting) / len(conflicting))
