"""Metrics of a training: sums over the batches of all processes, logged as means."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from raco_optim.alignment import PairLogProbs
from raco_optim.distributed.group import Group
from raco_optim.report import StepReport

# TRL's metrics that are means over pairs, and those that are means over tokens.
OF_PAIRS = (
    *("rewards/chosen", "rewards/rejected", "rewards/accuracies", "rewards/margins"),
    *("logps/chosen", "logps/rejected"),
)
OF_TOKENS = ("logits/chosen", "logits/rejected", "entropy", "mean_token_accuracy")
_OF_OBJECTIVES = 5  # sums per objective
_LOWER = {"loss": True, "margin": False, "accuracy": False}


def lower_is_better(metric: str, objectives: Sequence[str] | Mapping[str, float]) -> bool | None:
    """Returns whether a metric of an objective should be low; None for any other metric."""
    for kind, lower in _LOWER.items():
        for name in objectives:
            key = f"{kind}/{name}"
            if metric == key or metric.endswith(f"_{key}"):
                return lower
    return None


def evaluation_metrics(
    objectives: Sequence[str], sets: Sequence[str], *, auxiliary: bool
) -> list[str]:
    """Returns the metrics of an evaluation, without ``eval_``, by which to choose a model."""
    own = ["loss", *(f"{kind}/{name}" for name in objectives for kind in _LOWER)]
    own += [*OF_PAIRS, *OF_TOKENS, *(["aux_loss"] if auxiliary else [])]
    return [f"{one}_{key}" for one in sets for key in own] if sets else own


def objective_sums(
    losses: Sequence[Tensor | None],
    margins: Sequence[Tensor],
    weights: Sequence[Tensor],
    divisors: Tensor,
) -> Tensor:
    """Sums the metrics of each objective over the labelled pairs of a batch.

    Args:
        losses: m losses, each a weighted sum over labelled pairs divided by its divisor; None if
            the method does not compute it.
        margins: m vectors of reward margins of the labelled pairs.
        weights: m vectors of weights of the same pairs.
        divisors: ``[m]``.

    Returns:
        ``[m, 5]``, on the device of the margins: weighted sums of the losses, the margins and
        the correct pairs (a margin of 0 counts half), the total weight and the number of pairs.
    """
    zero = margins[0].new_zeros((), dtype=torch.float64)
    rows = []
    for loss, margin, weight, divisor in zip(losses, margins, weights, divisors, strict=True):
        margin, weight = margin.detach().double(), weight.to(margin.device, torch.float64)
        unknown = zero + (math.nan if len(margin) else 0.0)  # MODPO has one loss only
        rows.append(
            torch.stack(
                [
                    unknown if loss is None else loss.detach() * divisor,
                    (weight * margin).sum(),
                    (weight * (1 + margin.sign()) / 2).sum(),
                    weight.sum(),
                    zero + len(margin),
                ]
            )
        )
    return torch.stack(rows)


def common_sums(
    outputs: Any,  # noqa: ANN401  # of a model with TRL's fused head
    inputs: Mapping[str, Tensor],
    log_probs: PairLogProbs,
    *,
    beta: float,
    pairs: int,
) -> Tensor:
    """Sums TRL's metrics over a batch.

    Args:
        outputs: The model's output for the batch.
        inputs: The batch.
        log_probs: Log-probabilities of its B pairs.
        beta: Scale of the rewards.
        pairs: Number of pairs that count, from the first one.

    Returns:
        ``[k]``: the sums of `OF_PAIRS` and `OF_TOKENS`, the numbers of pairs, chosen tokens,
        rejected tokens and input tokens, the auxiliary loss, and 1 if there is one.
    """
    with torch.no_grad():
        real = torch.zeros(len(log_probs.chosen), device=log_probs.chosen.device)
        real[:pairs] = 1
        mask = inputs["completion_mask"][:, 1:]
        length = mask.size(1)
        mask = (mask * real.repeat(2)[:, None]).double()

        def of(tokens: Tensor) -> tuple[Tensor, Tensor]:
            chosen, rejected = (tokens[:, -length:] * mask).sum(1).chunk(2)
            return chosen.sum(), rejected.sum()

        free = log_probs.ref_chosen is None
        r_chosen, r_rejected = log_probs.rewards(beta=beta, reference_free=free)
        by_pair = [
            *(r_chosen, r_rejected, r_chosen > r_rejected, r_chosen - r_rejected),
            *(log_probs.chosen, log_probs.rejected),
        ]
        logits, tokens = of(outputs.mean_logits), of(torch.ones_like(mask))
        auxiliary = getattr(outputs, "aux_loss", None)
        there = 0.0 if auxiliary is None else 1.0
        everything: list[Any] = [
            *((x.double() * real).sum() for x in by_pair),
            *(*logits, sum(of(outputs.entropy)), of(outputs.is_top1)[0]),
            *(float(pairs), *tokens, inputs["attention_mask"].sum()),
            *(0.0 if auxiliary is None else auxiliary, there),
        ]
        return torch.stack(
            [torch.as_tensor(x, dtype=torch.float64, device=real.device) for x in everything]
        )


def common_means(sums: Tensor) -> dict[str, float]:
    """Returns TRL's metrics from their sums, except the number of tokens."""
    values = sums.tolist()
    named = dict(zip((*OF_PAIRS, *OF_TOKENS), values, strict=False))
    pairs, chosen, rejected, _, auxiliary, batches = values[len(named) :]
    numbers = dict.fromkeys(OF_PAIRS, pairs)
    numbers |= dict(zip(OF_TOKENS, (chosen, rejected, chosen + rejected, chosen), strict=True))
    means = {key: value / numbers[key] for key, value in named.items() if numbers[key]}
    return means | ({"aux_loss": auxiliary / batches} if batches else {})


_COMMON = len(OF_PAIRS) + len(OF_TOKENS) + 6
_INPUT_TOKENS = -3


class Log:
    """Collects metrics over the pairs of all processes, for training and for evaluation.

    Args:
        weights: Weights of the objectives in evaluations.
        group: The processes; None for a single one.
        device: Device of the sums.
    """

    def __init__(
        self, weights: Mapping[str, float], group: Group | None, device: torch.device
    ) -> None:
        self._weights = dict(weights)
        self._group = group
        number = _OF_OBJECTIVES * len(weights) + _COMMON
        self._zero = torch.zeros(number, dtype=torch.float64, device=device)
        self._here = {True: self._zero, False: self._zero}
        self._everywhere: dict[bool, Tensor] = {}
        self._steps: dict[str, list[float]] = {}
        self._skipped = 0

    def begin(self, *, training: bool) -> None:
        """Starts a step or an evaluation; drops the sums of an unfinished one."""
        self._here[training] = self._zero

    def add(self, of_objectives: Tensor, common: Tensor, *, training: bool) -> None:
        """Adds `objective_sums` and `common_sums` of a batch of this process."""
        sums = torch.cat([x.to(self._zero.device).flatten() for x in (of_objectives, common)])
        self._here[training] = self._here[training] + sums

    def end(self, *, training: bool) -> None:
        """Ends a step or an evaluation; all processes must call it."""
        sums = self._here[training]
        if self._group is not None:
            sums = self._group.sum([sums], sums.device)[0].view_as(sums)
        earlier = self._everywhere.get(training)
        self._everywhere[training] = sums if earlier is None else earlier + sums
        self._here[training] = self._zero

    def add_step(self, report: StepReport) -> None:
        """Adds the report of a training step; drops the pairs of a skipped step."""
        self._skipped = report.skipped
        if report.skip:
            self.begin(training=True)
            return
        for key, value in step_values(report).items():
            if not math.isnan(value):
                self._steps.setdefault(key, []).append(value)

    def clear(self) -> None:
        """Drops training metrics that were not logged yet."""
        self._everywhere.pop(True, None)
        self._steps.clear()

    def write(
        self,
        logs: dict[str, float],
        history: Sequence[Mapping[str, float]],
        *,
        training: bool,
        auxiliary: float = 0.0,
    ) -> None:
        """Adds the means since the last call to `logs`.

        Args:
            logs: The values that the Trainer is about to log.
            history: All values it has logged, including those before a checkpoint.
            training: Whether these are values of the training.
            auxiliary: Factor of the auxiliary loss.
        """
        # "eval_", or "eval_<name>_" if there are several data sets.
        prefix = "" if training else next((k[:-4] for k in logs if k.endswith("_loss")), "eval_")
        tokens = next((x["num_tokens"] for x in reversed(history) if "num_tokens" in x), 0)
        if True in self._everywhere:
            tokens += int(self._everywhere[True][_INPUT_TOKENS])
        if training in self._everywhere:
            sums = self._everywhere.pop(training).cpu()
            means = objective_means(list(self._weights), sums[:-_COMMON])
            logs.update({prefix + key: value for key, value in means.items()})
            common = common_means(sums[-_COMMON:])
            common["num_tokens"] = tokens
            logs.update({prefix + key: value for key, value in common.items()})
            if not training:  # the mean over pairs; the Trainer's is a mean over batches
                logs[f"{prefix}loss"] = auxiliary * common.get("aux_loss", 0.0) + math.fsum(
                    w * means.get(f"loss/{name}", math.nan)
                    for name, w in self._weights.items()
                    if w
                )
        if training:
            logs.update({key: math.fsum(x) / len(x) for key, x in self._steps.items()})
            self._steps.clear()
            if self._skipped:
                logs["skipped"] = self._skipped


def objective_means(names: Sequence[str], sums: Tensor) -> dict[str, float]:
    """Returns the number of labelled pairs per objective and, if there are any, the means."""
    means = {}
    for name, row in zip(names, sums.view(-1, _OF_OBJECTIVES).tolist(), strict=True):
        loss, margin, right, weight, pairs = row
        if weight:
            if not math.isnan(loss):
                means[f"loss/{name}"] = loss / weight
            means[f"margin/{name}"] = margin / weight
            means[f"accuracy/{name}"] = right / weight
        means[f"labelled/{name}"] = pairs
    return means


def step_values(report: StepReport) -> dict[str, float]:
    """Returns the numbers of a report by name; NaN where undefined, no absent objectives."""
    found = {
        "clip_angle": report.clip_angle,
        "gap": math.nan if report.gap is None else float(report.gap),
        "hurting": float(report.hurting),
        "conflicting": float(report.conflicting),
    }
    cosines = report.cosines
    vectors = {
        "grad_norm": report.norms,
        "alpha": report.coefficients,
        "p": report.p,
        "p_clipped": report.p_clipped,
    }
    present = [(i, name) for i, name in enumerate(report.names) if name not in report.absent]
    for i, a in present:
        for key, vector in vectors.items():
            if vector is not None:
                found[f"{key}/{a}"] = float(vector[i])
        for j, b in present:
            if j < i:
                found[f"cosine/{b}/{a}"] = float(cosines[j, i])
    return found
