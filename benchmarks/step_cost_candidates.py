"""The candidates: each fills ``.grad`` from one batch, its own way, and steps one AdamW.

All share the parameters and the AdamW of the case, so that none is favoured by where its memory
lies, and the largest case fits into memory. Those with state of their own (hooks, persistent
buffers) have it for themselves.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torchjd.aggregation import CAGrad, CAGradWeighting
from torchjd.autogram import Engine
from torchjd.autojac import backward, jac_to_grad

from benchmarks.step_cost_models import Batch, MultiTask
from raco_optim import CAGradClip

C = 0.4
GRAM_EVERY = 4
# Small, so that hundreds of steps leave the case what it was.
LEARNING_RATE = 1e-5

FLOOR, WEIGHTED_SUM, DENSE, GHOST = "floor", "weighted_sum", "dense", "ghost"
APPROXIMATIONS = ("representation", "last_layer", "gram_every")
TORCHJD = ("torchjd_autojac", "torchjd_autojac_gram", "torchjd_autogram")
NAMES = (FLOOR, WEIGHTED_SUM, DENSE, GHOST, *APPROXIMATIONS, *TORCHJD)


@dataclass
class Candidate:
    """A way to fill ``.grad``.

    Attributes:
        fill: Fills ``.grad`` from a batch.
        step: Steps.
        parameters: What is trained.
        cycle: Number of steps after which its cost repeats.
        optimizer: Ours, if it is.
    """

    fill: Callable[[Batch], None]
    step: Callable[[], object]
    parameters: Sequence[Tensor]
    cycle: int = 1
    optimizer: CAGradClip | None = None

    def zero_grad(self) -> None:
        """Frees ``.grad``."""
        for p in self.parameters:
            p.grad = None

    def __call__(self, batch: Batch) -> None:
        """Performs one whole step."""
        self.zero_grad()
        self.fill(batch)
        self.step()


class Problem:
    """A model with its AdamW, and the candidates for its step."""

    def __init__(self, model: MultiTask, learning_rate: float = LEARNING_RATE) -> None:
        self.model = model
        self.m = len(model.heads)
        self.parameters = list(model.parameters())
        self.adamw = torch.optim.AdamW(self.parameters, lr=learning_rate)

    def candidate(self, name: str) -> Candidate:
        """Makes one of `NAMES`."""
        made = {
            FLOOR: self._floor,
            WEIGHTED_SUM: self._weighted_sum,
            DENSE: self._ours,
            GHOST: lambda: self._ours(gradients="ghost"),
            "representation": self._representation,
            "last_layer": lambda: self._ours(gradients=self.model.last_layer()),
            "gram_every": lambda: self._ours(cycle=GRAM_EVERY, gram_every=GRAM_EVERY),
            "torchjd_autojac": lambda: self._autojac(per_parameter_gram=False),
            "torchjd_autojac_gram": lambda: self._autojac(per_parameter_gram=True),
            "torchjd_autogram": self._autogram,
        }
        return made[name]()

    def _plain(self, fill: Callable[[Batch], None]) -> Candidate:
        return Candidate(fill, self.adamw.step, self.parameters)

    def _floor(self) -> Candidate:
        def fill(batch: Batch) -> None:
            losses, _ = self.model(*batch)
            for i, loss in enumerate(losses):
                last = i == self.m - 1
                found = torch.autograd.grad(
                    loss, self.parameters, retain_graph=not last, allow_unused=True
                )
                if last:
                    for p, g in zip(self.parameters, found, strict=True):
                        p.grad = g
                del found

        return self._plain(fill)

    def _weighted_sum(self) -> Candidate:
        def fill(batch: Batch) -> None:
            losses, _ = self.model(*batch)
            torch.autograd.backward(torch.stack(losses).mean())

        return self._plain(fill)

    def _ours(self, cycle: int = 1, **settings: Any) -> Candidate:  # noqa: ANN401
        optimizer = CAGradClip(self.adamw, [1 / self.m] * self.m, c=C, **settings)

        def fill(batch: Batch) -> None:
            losses, _ = self.model(*batch)
            optimizer.backward(losses)

        return Candidate(fill, optimizer.step, self.parameters, cycle, optimizer)

    def _representation(self) -> Candidate:
        made = self._ours(gradients="representation")
        optimizer: Any = made.optimizer

        def fill(batch: Batch) -> None:
            losses, z = self.model(*batch)
            optimizer.backward(losses, representation=z)

        made.fill = fill
        return made

    def _autojac(self, *, per_parameter_gram: bool) -> Candidate:
        aggregator = CAGrad(C)

        def fill(batch: Batch) -> None:
            losses, _ = self.model(*batch)
            backward(losses)
            jac_to_grad(
                self.parameters, aggregator, optimize_gramian_computation=per_parameter_gram
            )

        return self._plain(fill)

    def _autogram(self) -> Candidate:
        model = self.model.twin()
        # The losses are means over the batch. With `batch_dim` the engine would return the Gram
        # matrix of m times as many losses as there are examples, 20 to 80 times as slowly here.
        engine = Engine(model, batch_dim=None)
        weighting = CAGradWeighting(C)

        def fill(batch: Batch) -> None:
            losses, _ = model(*batch)
            stacked = torch.stack(losses)
            gram = engine.compute_gramian(stacked)
            torch.autograd.backward(stacked, weighting(gram))

        return self._plain(fill)
