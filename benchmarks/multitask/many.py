"""What the claims need of the digits beside the study: radius, many objectives, noise in p."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from benchmarks.multitask.data import Data, Sizes, Split, Task, digits
from benchmarks.multitask.methods import METHODS, Method
from benchmarks.multitask.training import Recipe, Run, evaluate, losses
from raco_optim import CAGradClip, Rule, gram_matrix, per_loss_gradients
from raco_optim.rules import CAGradRule

LR = 5e-3
SOFT = Method(
    "CAGrad-Clip, soft",
    lambda inner, w, shared, c: CAGradClip(inner, w, c, clip="soft", shared_parameters=shared),
)
RULES = {"linear": METHODS["linear"], "cagrad": METHODS["cagrad"], "raco": METHODS["raco"]}
WITH_SOFT = {**RULES, "soft": SOFT}


def binary_tasks(data: Data, m: int) -> Data:
    """The same images with m yes-or-no tasks: is this digit at the top left (then bottom right)?

    m = 5 asks for the digits 0 to 4 at the top left, 10 for all of them, 20 for both places.
    """
    asked = [(place, digit) for place in range(2) for digit in range(10)][:m]

    def split(part: Split) -> Split:
        targets = tuple((part.targets[place] == digit).float() for place, digit in asked)
        return dataclasses.replace(part, targets=targets)

    tasks = tuple(
        Task(f"{('top', 'bottom')[place]} {digit}", "yes or no") for place, digit in asked
    )
    return Data(tasks, split(data.train), split(data.val), split(data.test))


def radius(seeds: Sequence[int], radii: Sequence[float], recipe: Recipe) -> Iterator[dict]:
    """Runs on the digits at weights .2/.8, one learning rate, over c; c = 0 is the weighted sum."""
    weights = (0.2, 0.8)
    for seed in seeds:
        data = digits(seed, Sizes())
        for name, method in WITH_SOFT.items():
            for c in (0.0,) if name == "linear" else radii:
                run = Run(data, method, weights, seed, LR, c, recipe)
                training = run.train()
                test = [
                    task["loss"] for task in evaluate(run.model, data.tasks, data.test).values()
                ]
                yield {
                    "seed": seed,
                    "rule": name,
                    "c": c,
                    "losses": test,
                    "weighted": sum(w * x for w, x in zip(weights, test, strict=True)),
                    "curve": [
                        sum(w * x for w, x in zip(weights, row, strict=True))
                        for row in training["curve"]
                    ],
                }


def objectives(
    seeds: Sequence[int],
    counts: Sequence[int],
    radii: Sequence[float],
    steps: int,
    methods: Mapping[str, Method] = WITH_SOFT,
) -> Iterator[dict]:
    """Runs of a fixed length with many tasks, equal weights and half of it on the first task."""
    recipe = Recipe(steps=steps, every=steps, patience=2)
    for seed in seeds:
        data = digits(seed, Sizes())
        for m in counts:
            tasks = binary_tasks(data, m)
            heavy = [0.5, *[0.5 / (m - 1)] * (m - 1)]
            for kind, weights in (("equal", [1 / m] * m), ("half on one", heavy)):
                for name, method in methods.items():
                    for c in (0.0,) if name == "linear" else radii:
                        run = Run(tasks, method, weights, seed, LR, c, recipe)
                        yield {
                            "seed": seed,
                            "m": m,
                            "weights": kind,
                            "rule": name,
                            "c": c,
                            **_followed(run, weights, steps),
                        }


def _followed(run: Run, weights: Sequence[float], steps: int) -> dict[str, float]:
    """Trains; test losses, and what p was like on the way."""
    active, turned, hurting = [], [], []
    for _ in range(steps):
        run.step()
        report = run.optimizer.report
        hurting.append(report.hurting)
        if report.p is not None:
            active.append(int((report.p > 1e-6).sum()))
            turned.append(0.0 if math.isnan(report.clip_angle) else report.clip_angle)
    found = evaluate(run.model, run.data.tasks, run.data.test)
    test = [task["loss"] for task in found.values()]
    return {
        "weighted": sum(w * x for w, x in zip(weights, test, strict=True)),
        "first": test[0],
        "worst": max(test),
        "active": sum(active) / len(active) if active else math.nan,
        "clip_angle": sum(turned) / len(turned) if turned else math.nan,
        "hurting": sum(hurting) / steps,
    }


def noise(
    seeds: Sequence[int],
    batches: Sequence[int],
    radii: Sequence[float],
    *,
    draws: int,
    checkpoints: Sequence[int] = (50, 300),
) -> Iterator[dict]:
    """How p and the update move when gradients come from a batch instead of all training data.

    Two tasks at weights .3/.7, and ten with equal weights, at several points of a training run of
    the weighted sum. Coefficients from a batch are applied to the gradients of all data, so that
    only their own noise is seen: 1 - cos of the angle to the update with the coefficients of all
    data. p is compared by its total variation.
    """
    for seed in seeds:
        data = digits(seed, Sizes())
        for m, tasks in ((2, data), (10, binary_tasks(data, 10))):
            weights = [0.3, 0.7] if m == 2 else [1 / m] * m
            run = Run(tasks, RULES["linear"], weights, seed, LR, None, Recipe())
            generator = torch.Generator().manual_seed(seed)
            done = 0
            for checkpoint in checkpoints:
                for _ in range(checkpoint - done):
                    run.step()
                done = checkpoint
                exact = _gram(run, torch.arange(len(data.train.inputs)))
                for size in batches:
                    grams = [
                        _gram(run, torch.randint(4000, (size,), generator=generator))
                        for _ in range(draws)
                    ]
                    for name, clip in (("cagrad", "none"), ("raco", "hard")):
                        for c in radii:
                            yield {
                                "seed": seed,
                                "m": m,
                                "step": checkpoint,
                                "batch": size,
                                "rule": name,
                                "c": c,
                                **_moved(exact, grams, weights, CAGradRule(c, clip)),
                            }


def _gram(run: Run, rows: Tensor) -> Tensor:
    train = run.data.train
    outputs = run.model(train.inputs[rows])
    found = losses(outputs, run.data.tasks, [target[rows] for target in train.targets])
    return gram_matrix(per_loss_gradients(found, list(run.model.trunk.parameters())))


def _moved(
    exact: Tensor, grams: Sequence[Tensor], weights: Sequence[float], rule: Rule
) -> dict[str, float]:
    base = rule(exact, weights)
    mixings = [rule(gram, weights) for gram in grams]
    p = torch.stack([mixing.p for mixing in mixings])
    alpha = torch.stack([mixing.coefficients for mixing in mixings])
    inner = alpha @ exact @ base.coefficients
    norms = (alpha @ exact * alpha).sum(1).sqrt() * (
        base.coefficients @ exact @ base.coefficients
    ).sqrt()
    return {
        "variation": float((p - base.p).abs().sum(1).mean() / 2),
        "bias": float((p.mean(0) - base.p).abs().sum() / 2),
        "vertex": float((p.amax(1) > 1 - 1e-6).double().mean()),
        "vertex_exact": float(base.p.amax() > 1 - 1e-6),
        "angle": float((1 - inner / norms).mean()),
    }


def all_rows(iterator: Iterator[dict[str, Any]]) -> list[dict[str, Any]]:
    """Rows with numbers rounded for a file that people read."""
    return [{k: _rounded(v) for k, v in row.items()} for row in iterator]


def _rounded(value: Any) -> Any:  # noqa: ANN401  # what JSON can hold
    if isinstance(value, float):
        return None if math.isnan(value) else float(f"{value:.6g}")
    return [_rounded(x) for x in value] if isinstance(value, list) else value
