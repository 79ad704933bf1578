"""The paper's claims, one by one, beside what was measured here.

The numbers of the paper are scores that other language models gave to 4 to 9 billion parameter
models; none of them can be repeated here. What can be tested is their order, and it counts as
reproduced if the 95 % interval of the difference lies wholly on the paper's side.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import numpy as np

from benchmarks.alignment.analysis import Estimate
from benchmarks.alignment.sampling import OPTIONS
from benchmarks.alignment.summary import Summary

REPRODUCED = "reproduced"
NO_DIFFERENCE = "not reproduced: no difference that the data can tell"
OPPOSITE = "not reproduced: the opposite"
UNTESTABLE = "not testable here"


@dataclass(frozen=True)
class Claim:
    """A claim and what became of it.

    Attributes:
        claim: What the paper says, in words.
        seed: Its numbers.
        measured: What was measured, with an interval.
        verdict: One of the four above.
    """

    claim: str
    seed: str
    measured: str
    verdict: str


def judged(claim: str, seed: str, what: str, difference: Estimate, better: int) -> Claim:
    """A claim about one difference, which should be on the side `better`, +1 or -1."""
    if not np.isfinite(difference.value):
        return Claim(claim, seed, "not run", UNTESTABLE)
    if not np.isfinite(difference.low):
        text = f"{what} {difference.value:+.3f}, too few seeds for an interval"
        return Claim(claim, seed, text, UNTESTABLE)
    text = f"{what} {difference.text(3, sign=True)}"
    verdict = {1: REPRODUCED, 0: NO_DIFFERENCE, -1: OPPOSITE}[difference.side() * better]
    return Claim(claim, seed, text, verdict)


def claims(summary: Summary) -> list[Claim]:
    """All claims of the paper, in its order."""
    found = []
    for other, name, numbers in (
        ("linear", "weighted DPO", "0.18 against 0.41"),
        ("modpo", "MODPO", "0.18 against 0.32"),
        ("amopo", "AMoPO", "0.18 against 0.28"),
    ):
        found.append(_closer(summary, other, f"RACO is closer to the front than {name}", numbers))
    volume = summary.hypervolume("accuracy", "raco") - summary.hypervolume("accuracy", "linear")
    claim = "RACO offers a superior front: a larger hypervolume than that of weighted DPO"
    found.append(judged(claim, "-", "hypervolume in accuracy", Estimate.of(volume), 1))
    found += _both(summary, "linear", "weighted DPO", "7.6 / 7.9 against 6.8 / 7.2")
    found += _both(summary, "amopo", "AMoPO", "7.6 / 7.9 against 7.3 / 7.6")
    found += _taxes(summary)
    found.append(
        _closer(
            summary, "cagrad", "Clipping brings CAGrad closer to the front", "0.18 against 0.27"
        )
    )
    found += _both(summary, "cagrad", "CAGrad without clipping", "7.6 / 7.9 against 7.4 / 7.5")
    claim = "CAGrad contributes most: without clipping it is closer to the front than weighted DPO"
    found.append(_closer(summary, "linear", claim, "0.27 against 0.41", method="cagrad"))
    found.append(
        _closer(summary, "mgda", "RACO is closer to the front than MGDA", "0.18 against 0.36")
    )
    found += _speed(summary)
    found.append(
        Claim(
            "The scores themselves, on Qwen3, Llama 3 and Gemma 3 of 3 to 9 B parameters",
            "6.8 to 7.9 of 10; MMLU 62.4 to 67.9; safety 84.2 to 89.5",
            "",
            UNTESTABLE,
        )
    )
    return found


def _closer(
    summary: Summary, other: str, claim: str, numbers: str, *, method: str = "raco"
) -> Claim:
    """Closer in accuracy; in losses, which not all methods train on, for information."""
    accuracy, loss = (
        Estimate.of((summary.at_weights(x, method) - summary.at_weights(x, other)).mean(0))
        for x in (summary.distance["accuracy"], summary.distance["loss"])
    )
    found = judged(claim, numbers, "distance in accuracy", accuracy, -1)
    if found.verdict == UNTESTABLE:
        return found
    measured = f"{found.measured}, in losses {loss.text(3, sign=True)}"
    return dataclasses.replace(found, measured=measured)


def _both(summary: Summary, other: str, name: str, numbers: str) -> list[Claim]:
    """Better in every objective, at the same weights on average."""
    errors = summary.metrics["accuracy"]
    gains = summary.at_weights(errors, other) - summary.at_weights(errors, "raco")
    estimates = [Estimate.of(gain) for gain in gains.mean(0).T]
    claim = f"RACO beats {name} in every objective"
    if not all(np.isfinite(estimate.value) for estimate in estimates):
        return [Claim(claim, numbers, "not run", UNTESTABLE)]
    sides = [estimate.side() for estimate in estimates]
    text = ", ".join(
        f"{objective} {estimate.text(3, sign=True)}"
        for objective, estimate in zip(summary.objectives, estimates, strict=True)
    )
    if min(sides) > 0:
        verdict = REPRODUCED
    elif max(sides) < 0:
        verdict = OPPOSITE
    elif min(sides) < 0 < max(sides):
        verdict = "not reproduced: one objective gains what the other loses"
    else:
        verdict = NO_DIFFERENCE if not any(sides) else "not reproduced in every objective"
    return [Claim(claim, numbers, f"accuracy: {text}", verdict)]


def _taxes(summary: Summary) -> list[Claim]:
    """Each by two measures; the second says nothing where the untrained model guesses."""
    before = summary.grid.numbers(("extra", "capability", "choice_accuracy"))
    guess = float(np.nanmean(before[summary.grid.row("initial", ())]))
    found = []
    for method, other, claim, numbers in (
        ("linear", "single", "Several objectives cost less capability than one", "-3.5 % / -8.3 %"),
        ("raco", "single", "RACO costs less capability than one objective", "-1.4 % / -8.3 %"),
        ("raco", "linear", "RACO costs less capability than weighted DPO", "-1.4 % / -3.5 %"),
        ("raco", "amopo", "RACO costs less capability than AMoPO", "-1.4 % / -2.6 %"),
    ):
        nats, choices = (
            Estimate.over_seeds(summary.tax(x, method) - summary.tax(x, other))
            for x in ("nats_per_token", "choice_accuracy")
        )
        found.append(judged(claim, numbers, "nats per token of human text", nats, -1))
        claim = f"{claim} (multiple choice)"
        if guess < 1 / OPTIONS + 0.1:
            text = f"untrained, the model is right on {guess:.2f} of the questions: it guesses"
            found.append(Claim(claim, numbers, text, UNTESTABLE))
        else:
            found.append(judged(claim, numbers, "accuracy", choices, 1))
    return found


def _speed(summary: Summary) -> list[Claim]:
    reach = summary.reach()
    if reach is None:
        return []
    text = "; ".join(
        f"{space.replace('_', ' ')}: median over weights {values['raco']['median']:.2f}, "
        f"{min(values['raco'].values()):.2f} to {max(values['raco'].values()):.2f}"
        for space, values in reach.items()
    )
    median = reach["distance"]["raco"]["median"]
    near = np.isfinite(median) and median <= 0.85
    verdict = REPRODUCED if near else OPPOSITE if median > 1.05 else NO_DIFFERENCE
    return [
        Claim(
            "Clipping gets CAGrad to the same distance in fewer steps (two objectives)",
            "about 25 % faster: a ratio of 0.75",
            f"steps over those of CAGrad, {text}",
            verdict,
        )
    ]
