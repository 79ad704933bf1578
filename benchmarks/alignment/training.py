"""One run: a policy + preference pairs + a method -> a trained policy and what was measured.

The methods, by the losses that they train on and the rule that combines the gradients:

    linear, single   one DPO loss per objective    weighted sum (single: all weight on one)
    cagrad, raco     the same                      CAGrad without, CAGrad-Clip with clipping
    mgda             the same                      min-norm point, whatever the weights
    amopo            one AMoPO loss per objective  weighted sum
    modpo            one MODPO loss                none to combine
    soup             none: the weights of the models of `single`, averaged
    initial          none: the reference model

and the candidates of `benchmarks.beyond`, which train on the losses of cagrad and raco.
"""

from __future__ import annotations

import contextlib
import math
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from benchmarks.alignment.data import Pair
from benchmarks.alignment.prefix import Text, completion_log_probs, in_batches
from benchmarks.alignment.sampling import OPTIONS
from benchmarks.beyond.candidates import CANDIDATES, candidate
from raco_optim import MGDA, CAGrad, CAGradClip, LinearScalarization, MultiObjectiveOptimizer
from raco_optim.alignment import (
    PairLogProbs,
    amopo_losses,
    modpo_loss,
    preference_losses,
    reward_margins,
)

TRAINED = ("linear", "single", "cagrad", "raco", "mgda", "amopo", "modpo")
SURGERY = ("cagrad", "raco", "mgda")
# MODPO trains on the pairs of one objective and takes the others' rewards as margins: here on
# those of the first objective, whose labels are human.
MODPO_OBJECTIVE = 0


@dataclass(frozen=True)
class EncodedPairs:
    """Preference pairs as a model reads them.

    Attributes:
        chosen: The texts in the column `chosen`.
        rejected: Those in the column `rejected`.
        signs: Preferences ``[n, m]`` in {+1, -1, 0}; 0 for a tie or a missing label.
        margins: Differences of reward scores ``[n, m]``, for MODPO; 0 where missing.
        reference: Log-probabilities ``[n, 2]`` of both under the reference model; NaN until known.
    """

    chosen: Sequence[Text]
    rejected: Sequence[Text]
    signs: Tensor
    margins: Tensor
    reference: Tensor

    @classmethod
    def of(
        cls,
        pairs: Sequence[Pair],
        texts: Sequence[Text],
        scale: Mapping[str, float],
    ) -> EncodedPairs:
        """From pairs and their texts, in the order chosen, rejected, chosen, rejected, ..."""
        signs = [[pair.sign(name) or 0 for name in scale] for pair in pairs]
        margins = [[pair.margin(name, scale) or 0.0 for name in scale] for pair in pairs]
        unknown = torch.full((len(pairs), 2), math.nan)
        return cls(texts[::2], texts[1::2], torch.tensor(signs), torch.tensor(margins), unknown)

    def __len__(self) -> int:
        return len(self.signs)

    def select(self, index: Sequence[int]) -> EncodedPairs:
        """The pairs at `index`."""
        chosen, rejected = ([texts[i] for i in index] for texts in (self.chosen, self.rejected))
        at = list(index)
        return EncodedPairs(chosen, rejected, self.signs[at], self.margins[at], self.reference[at])

    def batches(self, size: int) -> Iterator[EncodedPairs]:
        """Consecutive batches, in order."""
        for at in range(0, len(self), size):
            yield self.select(range(at, min(at + size, len(self))))

    def with_reference(self, model: PreTrainedModel, size: int = 16) -> EncodedPairs:
        """The same pairs, with the log-probabilities under `model` as those of the reference."""
        sums, _ = in_batches(model, [*self.chosen, *self.rejected], 2 * size)
        return replace(self, reference=sums.view(2, -1).T)

    def log_probs(self, model: PreTrainedModel) -> PairLogProbs:
        """Log-probabilities under `model`, with a graph, beside those of the reference."""
        sums, tokens = completion_log_probs(model, [*self.chosen, *self.rejected])
        return self._joined(sums, tokens)

    @torch.no_grad()
    def scored(self, model: PreTrainedModel) -> PairLogProbs:
        """As `log_probs`, for any number of pairs and without a graph; on the CPU."""
        return self._joined(*in_batches(model, [*self.chosen, *self.rejected]))

    def _joined(self, sums: Tensor, tokens: Tensor) -> PairLogProbs:
        reference = self.reference.to(sums.device)
        return PairLogProbs(
            *sums.view(2, -1), reference[:, 0], reference[:, 1], *tokens.view(2, -1)
        )


@dataclass(frozen=True)
class Trial:
    """What all runs of one seed share.

    Attributes:
        objectives: Names, in the order of the columns of the pairs.
        train: Training pairs, in the order of their use.
        held_out: Pairs of papers that nothing was trained on.
        curve: Some of the held-out pairs, which a run is measured on along the way.
        text: Human text that nothing was trained on.
        questions: Multiple choice: the options of all questions, `OPTIONS` in a row with the same
            prompt, the right one first.
        new_policy: Makes a policy equal to the reference model; the same one at every call.
        bf16: Train under bfloat16 autocast. The reference's log-probabilities and every evaluation
            are in float32 all the same; rounding then adds noise to Delta in training, 0.25 nats
            (root mean square) for SmolLM2, where training moves it by 10.
    """

    objectives: tuple[str, ...]
    train: EncodedPairs
    held_out: EncodedPairs
    curve: EncodedPairs
    text: Sequence[Text]
    questions: Sequence[Text]
    new_policy: Callable[[], PreTrainedModel]
    bf16: bool = False


@dataclass(frozen=True)
class Recipe:
    """Everything about a run but the data and the model.

    Attributes:
        method: One of `TRAINED`, or of the candidates of `benchmarks.beyond`.
        weights: Weight per objective.
        lr: Learning rate of AdamW.
        batch_size: Pairs per step.
        beta: Of the DPO and MODPO losses, and of every evaluation.
        amopo_beta: Of the AMoPO losses, whose rewards are means over tokens.
        c: Radius of CAGrad and CAGrad-Clip.
        curve_every: Steps between two measurements on the way; None for none.
    """

    method: str
    weights: Mapping[str, float]
    lr: float
    batch_size: int
    beta: float = 0.1
    amopo_beta: float = 1.0
    c: float | None = None
    curve_every: int | None = None


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
        return [modpo_loss(log_probs, sign, margins, weights, k, beta=recipe.beta)]
    return preference_losses(log_probs, pairs.signs, beta=recipe.beta)


def optimizer_for(recipe: Recipe, inner: torch.optim.Optimizer) -> MultiObjectiveOptimizer:
    """The optimizer of the library that combines the gradients as the method does."""
    weights = list(recipe.weights.values())
    if recipe.method in ("cagrad", "raco"):
        assert recipe.c is not None
        return (CAGrad if recipe.method == "cagrad" else CAGradClip)(inner, weights, recipe.c)
    if recipe.method in CANDIDATES:
        assert recipe.c is not None
        return candidate(recipe.method, inner, weights, recipe.c)
    if recipe.method == "mgda":
        return MGDA(inner, weights)
    return LinearScalarization(inner, [1.0] if recipe.method == "modpo" else weights)


def train(trial: Trial, recipe: Recipe) -> tuple[PreTrainedModel, dict[str, Any]]:
    """Trains a policy in one pass over the training pairs.

    Returns:
        The policy, and ``steps``, ``seconds`` (without what measuring took), and means over steps:
        ``hurting_steps``: share whose combined gradient, followed downhill, raises a loss to first
        order, (H alpha)_i < 0; ``conflicting_steps``: share with some <g_i, g_j> < 0; ``cosine``
        between the losses' gradients; ``vertex_share``: p is a vertex, so that clipping cannot
        turn the correction; ``clip_angle``: 1 - cos of the angle by which it did. None where a
        method has no such number. ``curve``: [step, losses] per measurement on the way.
    """
    policy = trial.new_policy()
    parameters = list(trainable(policy).values())
    inner = torch.optim.AdamW(parameters, lr=recipe.lr, weight_decay=0.0)
    optimizer = optimizer_for(recipe, inner)
    device = parameters[0].device.type
    reports, curve = [], [[0, _curve(policy, trial, recipe)]] if recipe.curve_every else []
    seconds = 0.0
    for step, batch in enumerate(trial.train.batches(recipe.batch_size), start=1):
        start = time.perf_counter()
        amp = torch.autocast(device, torch.bfloat16) if trial.bf16 else contextlib.nullcontext()
        with amp:
            found = losses(recipe, batch.log_probs(policy), batch)
        if any(loss is not None for loss in found):
            optimizer.zero_grad()
            optimizer.backward(found)
            torch.nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
            reports.append(optimizer.report)
        seconds += time.perf_counter() - start
        if recipe.curve_every and step % recipe.curve_every == 0:
            curve.append([step, _curve(policy, trial, recipe)])
    return policy, {**_summary(recipe, reports), "seconds": seconds, "curve": curve}


def _curve(policy: PreTrainedModel, trial: Trial, recipe: Recipe) -> list[float]:
    log_probs = trial.curve.scored(policy)
    found = preference_losses(log_probs, trial.curve.signs, beta=recipe.beta)
    return [math.nan if loss is None else round(loss.item(), 5) for loss in found]


def _summary(recipe: Recipe, reports: Sequence[Any]) -> dict[str, Any]:
    def mean(values: Sequence[float]) -> float | None:
        known = [float(value) for value in values if not math.isnan(value)]
        return statistics.fmean(known) if known else None

    found: dict[str, Any] = {"steps": len(reports)}
    if recipe.method == "modpo":  # one loss: nothing to hurt, nothing in conflict
        return found | dict.fromkeys(("hurting_steps", "conflicting_steps", "cosine"))
    m = len(recipe.weights)
    rows, columns = torch.triu_indices(m, m, offset=1)
    found["hurting_steps"] = mean([r.hurting for r in reports])
    found["conflicting_steps"] = mean([r.conflicting for r in reports])
    found["cosine"] = mean([x for r in reports for x in r.cosines[rows, columns].tolist()])
    if recipe.method in SURGERY or (reports and reports[0].p is not None):
        found["vertex_share"] = mean([bool((r.p > 1 - 1e-9).any()) for r in reports])  # NaN: absent
        found["clip_angle"] = mean([r.clip_angle for r in reports])
    return found


def evaluate(
    policy: PreTrainedModel, trial: Trial, beta: float
) -> tuple[dict[str, dict[str, float]], list[float]]:
    """Scores a policy on the held-out pairs, whatever it was trained on.

    Returns:
        Per objective the DPO ``loss``, the mean ``margin`` beta s_i Delta, the ``accuracy`` (share
        of pairs with s_i Delta > 0, where Delta = 0 counts half) and the number ``labelled``; and
        Delta of every pair, in nats, rounded to 0.01.
    """
    pairs = trial.held_out
    log_probs = pairs.scored(policy)
    found = preference_losses(log_probs, pairs.signs, beta=beta)
    scores = {}
    for name, loss, sign in zip(trial.objectives, found, pairs.signs.T, strict=True):
        margins = reward_margins(log_probs, sign, beta=beta)
        scores[name] = {
            "loss": math.nan if loss is None else loss.item(),
            "margin": margins.mean().item(),
            "accuracy": ((1 + margins.sign()) / 2).mean().item(),
            "labelled": len(margins),
        }
    chosen, rejected = log_probs.log_ratios()
    return scores, [round(delta, 2) for delta in (chosen - rejected).tolist()]


def capability(policy: PreTrainedModel, trial: Trial) -> dict[str, float]:
    """What alignment may cost: measures that it did not train on.

    Returns:
        ``nats_per_token``: cross-entropy of the human text; ``choice_accuracy``: share of the
        questions whose right option has the highest mean log-probability per token.
    """
    sums, tokens = in_batches(policy, trial.text)
    found = {"nats_per_token": -(sums.sum() / tokens.sum()).item()}
    sums, tokens = in_batches(policy, trial.questions)
    best = (sums / tokens).view(-1, OPTIONS).argmax(dim=1)
    found["choice_accuracy"] = (best == 0).float().mean().item()
    return found
