"""One run: a model, a method, a seed; validation chooses the step whose weights are tested."""

from __future__ import annotations

import copy
import time
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from benchmarks.studies.qm9.data import QM9, TARGETS, Molecules
from benchmarks.studies.qm9.methods import METHODS
from benchmarks.studies.qm9.models import MODELS, Multitask

SOURCES = (("mu", "alpha", "homo"), ("lumo", "r2", "zpve"), ("U0", "U", "H"), ("G", "cv"))


@dataclass(frozen=True)
class Run:
    """Name of a run.

    Of ``"random"`` labels 70 % are removed at random, and batches have 8 molecules, so that losses
    are absent. With ``"source"`` each molecule has the labels of one group of `SOURCES`, and a
    batch is drawn from one group.
    """

    model: str  # a key of `MODELS`
    method: str  # a key of `METHODS`, or "single:TARGET" for a model of one target
    rate: float  # of Adam at the start of its cosine schedule
    seed: int  # of the initial weights, the batches and the random rules
    labels: str = "all"  # or "random", or "source"
    absent: str = "none"  # an absent loss is None; "zero": it is a loss of value zero


@dataclass(frozen=True)
class Length:
    """Length of all runs."""

    steps: int = 4_000
    batch: int = 128
    evaluations: int = 16


@dataclass
class Observed:
    """Cosines and norms of the gradients of the trunk, every 20th step."""

    least_cosine: list[float] = field(default_factory=list)
    conflicting: list[float] = field(default_factory=list)
    norm_ratio: list[float] = field(default_factory=list)

    def add(self, gram: Tensor) -> None:
        """Adds the statistics of one Gram matrix."""
        norms = gram.diagonal().sqrt()
        cosines = (gram / norms[:, None] / norms)[tuple(np.triu_indices(len(gram), 1))]
        self.least_cosine.append(float(cosines.min()))
        self.conflicting.append(float((cosines < 0).double().mean()))
        self.norm_ratio.append(float(norms.max() / norms.min()))

    def summary(self) -> dict[str, float]:
        """Means over the steps; the median for the ratio of norms."""
        if not self.least_cosine:
            return {}
        return {
            "steps_with_conflict": float(np.mean(np.array(self.least_cosine) < 0)),
            "conflicting_pairs": float(np.mean(self.conflicting)),
            "least_cosine": float(np.mean(self.least_cosine)),
            "norm_ratio": float(np.median(self.norm_ratio)),
        }


def train(run: Run, data: QM9, length: Length, reference: list[float] | None) -> dict[str, Any]:
    """Trains and returns the record of a run.

    By the reference, the validation errors of the single-task models, the evaluation of least Delta
    m is chosen; it is None for a single-task run.
    """
    start = time.process_time()
    torch.manual_seed(run.seed)
    model: Multitask = MODELS[run.model]()
    single = run.method.removeprefix("single:") if run.method.startswith("single:") else None
    column = TARGETS.index(single) if single else None
    method = METHODS["equal" if single else run.method]
    scalar = method.scalar(len(TARGETS)) if method.scalar else nn.Identity()
    inner = torch.optim.Adam([*model.parameters(), *scalar.parameters()], run.rate)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(inner, length.steps)
    weights = [1 / len(TARGETS)] * len(TARGETS)
    opt = method.make(inner, weights, model.shared_parameters()) if method.make else None
    sampler = Batches(run, len(data.train), length.batch)
    observed, best, kept = Observed(), float("inf"), copy.deepcopy(model.state_dict())
    every = length.steps // length.evaluations
    for step in range(1, length.steps + 1):
        rows, labelled = sampler.draw()
        columns = (data.train.targets[rows].T, (labelled / labelled.sum(0).clamp(min=1)).T)
        losses = [
            ((prediction - target).square() * share).sum()
            for prediction, target, share in zip(
                model.predictions(data.train, rows), *columns, strict=True
            )
        ]
        there = labelled.any(0)
        inner.zero_grad()
        if column is not None:
            losses[column].backward()
        elif opt is None:
            scalar(torch.stack(losses)).backward()
        else:
            listed = [
                (loss.log() if method.logarithm else loss)
                if present or run.absent == "zero"
                else None
                for loss, present in zip(losses, there.tolist(), strict=True)
            ]
            opt.backward(listed)
            if step % 20 == 0 and all(x is not None for x in listed):
                observed.add(opt.last_step.gram)
        inner.step()
        schedule.step()
        if step % every == 0:
            errors = mean_absolute_errors(model, data.validation)
            score = delta_m(errors, reference) if column is None else errors[column]
            if score < best:
                best, kept = score, copy.deepcopy(model.state_dict())
    model.load_state_dict(kept)
    return {
        "validation": mean_absolute_errors(model, data.validation),
        "test": mean_absolute_errors(model, data.test),
        "gradients": observed.summary(),
        "seconds": round(time.process_time() - start, 2),
    }


class Batches:
    """Draws rows and which of their labels are known."""

    def __init__(self, run: Run, count: int, batch: int) -> None:
        self.labels, self.count = run.labels, count
        self.batch = 8 if run.labels == "random" else batch
        self.generator = torch.Generator().manual_seed(run.seed)
        # What is removed is a property of the data: the same for all seeds.
        fixed = torch.Generator().manual_seed(0)
        self.known = torch.rand(count, len(TARGETS), generator=fixed) < 0.3
        self.source = torch.randint(len(SOURCES), (count,), generator=fixed)
        self.members = [torch.nonzero(self.source == k)[:, 0] for k in range(len(SOURCES))]

    def draw(self) -> tuple[Tensor, Tensor]:
        """Returns rows, ``[B]``, and which labels are known, ``[B, 11]``."""
        if self.labels == "source":
            group = int(torch.randint(len(SOURCES), (), generator=self.generator))
            members = self.members[group]
            rows = members[torch.randint(len(members), (self.batch,), generator=self.generator)]
            known = torch.tensor([target in SOURCES[group] for target in TARGETS])
            return rows, known.expand(self.batch, -1)
        rows = torch.randint(self.count, (self.batch,), generator=self.generator)
        if self.labels == "random":
            return rows, self.known[rows]
        return rows, torch.ones(self.batch, len(TARGETS), dtype=torch.bool)


@torch.no_grad()
def mean_absolute_errors(model: Multitask, part: Molecules) -> list[float]:
    """Mean absolute errors by target, in standard deviations of the training set."""
    rows = torch.arange(len(part)).split(1000)
    error = torch.cat([(model(part, r) - part.targets[r]).abs() for r in rows])
    return error.double().mean(0).tolist()


def delta_m(errors: list[float], reference: list[float]) -> float:
    """Delta m in percent: the mean relative increase of the errors over single-task models."""
    return 100 * float(np.mean(np.array(errors) / np.array(reference) - 1))
