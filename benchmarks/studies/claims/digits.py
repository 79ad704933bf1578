"""Overlaid digits, the set of `benchmarks.studies.multitask`: c, many objectives, noise in p."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from benchmarks.studies.claims.toys import weights_of
from benchmarks.studies.multitask.data import Data, Sizes, Split, Task, digits
from benchmarks.studies.multitask.methods import METHODS
from benchmarks.studies.multitask.training import Recipe, Run, evaluate, losses
from raco_optim import Rule, gram_matrix, per_loss_gradients
from raco_optim.rules import CAGradRule

LR = 5e-3
NAMES = ("linear", "cagrad", "raco")


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


def _tested(run: Run, weights: Sequence[float]) -> dict[str, Any]:
    found = evaluate(run.model, run.data.tasks, run.data.test)
    test = [task["loss"] for task in found.values()]
    return {"losses": test, "weighted": sum(w * x for w, x in zip(weights, test, strict=True))}


def radius(seeds: Sequence[int], radii: Sequence[float]) -> Iterator[dict[str, Any]]:
    """Two tasks at weights .2/.8, one learning rate, over c; c = 0 is the weighted sum."""
    weights = (0.2, 0.8)
    for seed in seeds:
        data = digits(seed, Sizes())
        for name in NAMES:
            for c in (0.0,) if name == "linear" else radii:
                run = Run(data, METHODS[name], weights, seed, LR, c, Recipe())
                run.train()
                yield {"seed": seed, "rule": name, "c": c, **_tested(run, weights)}


def many_tasks(
    seeds: Sequence[int], counts: Sequence[int], radii: Sequence[float], steps: int
) -> Iterator[dict[str, Any]]:
    """Test losses after runs of a fixed length with many tasks."""
    recipe = Recipe(steps=steps, every=steps, patience=2)
    for seed in seeds:
        data = digits(seed, Sizes())
        for m in counts:
            tasks = binary_tasks(data, m)
            for kind, weights in weights_of(m).items():
                for name in NAMES:
                    for c in (0.0,) if name == "linear" else radii:
                        run = Run(tasks, METHODS[name], weights, seed, LR, c, recipe)
                        for _ in range(steps):
                            run.step()
                        row = {"seed": seed, "m": m, "weights": kind, "rule": name, "c": c}
                        yield {"on": "digits", **row, **_tested(run, weights)}


def noise(
    seeds: Sequence[int],
    batches: Sequence[int],
    radii: Sequence[float],
    *,
    draws: int,
    checkpoints: Sequence[int] = (50, 300),
) -> Iterator[dict[str, Any]]:
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
            run = Run(tasks, METHODS["linear"], weights, seed, LR, None, Recipe())
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
                            row = {"seed": seed, "m": m, "batch": size, "rule": name, "c": c}
                            yield {**row, **_moved(exact, grams, weights, CAGradRule(c, clip))}


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
        "angle": float((1 - inner / norms).mean()),
    }
