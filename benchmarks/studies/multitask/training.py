"""One run: a network on a set, trained by a method at some weights."""

from __future__ import annotations

import copy
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from scipy.stats import rankdata
from torch import Tensor, nn
from torch.nn import functional

from benchmarks.studies.multitask.data import Data, Split, Task
from benchmarks.studies.multitask.methods import Method
from raco_optim import MultiObjectiveOptimizer


@dataclass(frozen=True)
class Recipe:
    """How long and how wide.

    Attributes:
        width: Width of both layers of the trunk.
        batch_size: Examples in a batch.
        steps: Steps at most.
        every: Steps between validations.
        patience: Validations without a new best after which a run ends.
    """

    width: int = 32
    batch_size: int = 64
    steps: int = 1500
    every: int = 20
    patience: int = 6


class Network(nn.Module):
    """A trunk that all tasks share and a linear head for each."""

    def __init__(self, inputs: int, tasks: Sequence[Task], width: int) -> None:
        super().__init__()
        self.trunk = nn.Sequential(
            nn.Linear(inputs, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU()
        )
        self.heads = nn.ModuleList(nn.Linear(width, task.outputs) for task in tasks)

    def forward(self, inputs: Tensor) -> list[Tensor]:
        """Outputs of every head, ``[n]`` or ``[n, classes]``."""
        hidden = self.trunk(inputs)
        return [head(hidden).squeeze(-1) for head in self.heads]


def losses(
    outputs: Sequence[Tensor], tasks: Sequence[Task], targets: Sequence[Tensor]
) -> list[Tensor]:
    """Mean loss of every task."""
    of_kind = {
        "classes": functional.cross_entropy,
        "value": functional.mse_loss,
        "yes or no": functional.binary_cross_entropy_with_logits,
    }
    return [
        of_kind[task.kind](output, target)
        for output, task, target in zip(outputs, tasks, targets, strict=True)
    ]


def score(output: Tensor, task: Task, target: Tensor) -> float:
    """Accuracy, R^2 or area under the ROC curve."""
    if task.kind == "classes":
        return float((output.argmax(-1) == target).double().mean())
    if task.kind == "value":
        left = (output.double() - target.double()).square().mean()
        return 1 - float(left / target.double().var(unbiased=False))
    yes = target.numpy() > 0
    ranks = rankdata(output.numpy())  # ties share their rank
    n_yes, n_no = int(yes.sum()), int((~yes).sum())
    return float((ranks[yes].sum() - n_yes * (n_yes + 1) / 2) / (n_yes * n_no))


@torch.no_grad()
def evaluate(model: Network, tasks: Sequence[Task], split: Split) -> dict[str, dict[str, float]]:
    """Loss and score of every task."""
    outputs = model(split.inputs)
    found = losses(outputs, tasks, split.targets)
    return {
        task.name: {"loss": float(loss), "score": score(output, task, target)}
        for task, output, target, loss in zip(tasks, outputs, split.targets, found, strict=True)
    }


class Run:
    """A network, its optimizer and its batches.

    Args:
        data: The set.
        method: The method.
        weights: Weight of every task.
        seed: Seed of the initial parameters, of the batches and of what a method draws.
        lr: Learning rate of Adam.
        parameter: The method's own parameter.
        recipe: How long and how wide.
    """

    def __init__(
        self,
        data: Data,
        method: Method,
        weights: Sequence[float],
        seed: int,
        lr: float,
        parameter: float | None,
        recipe: Recipe,
    ) -> None:
        torch.manual_seed(seed)
        self.data, self.weights, self.recipe = data, list(weights), recipe
        self.model = Network(data.train.inputs.shape[1], data.tasks, recipe.width)
        self._batches = torch.Generator().manual_seed(seed)
        m, scaled = len(weights), method.scales(parameter)
        self._factors = [m * w for w in weights] if scaled else [1.0] * m
        self.optimizer: MultiObjectiveOptimizer = method.make(
            torch.optim.Adam(self.model.parameters(), lr=lr),
            [1 / m] * m if scaled else list(weights),
            list(self.model.trunk.parameters()),
            parameter,
        )

    def batch(self) -> list[Tensor]:
        """Losses of the next batch."""
        train = self.data.train
        shape = (self.recipe.batch_size,)
        rows = torch.randint(len(train.inputs), shape, generator=self._batches)
        outputs = self.model(train.inputs[rows])
        return losses(outputs, self.data.tasks, [target[rows] for target in train.targets])

    def step(self) -> None:
        """One training step."""
        scaled = [f * loss for f, loss in zip(self._factors, self.batch(), strict=True)]
        self.optimizer.zero_grad()
        self.optimizer.backward(scaled)
        self.optimizer.step()

    @torch.no_grad()
    def validation_losses(self) -> list[float]:
        """Loss of every task on the validation set."""
        val = self.data.val
        found = losses(self.model(val.inputs), self.data.tasks, val.targets)
        return [float(loss) for loss in found]

    def train(self) -> dict[str, Any]:
        """Trains with early stopping; the model has the best parameters afterwards.

        Returns:
            Steps and seconds, the step of the best validation, its weighted loss, the share of
            steps in which gradients conflicted, and all validation losses.
        """
        start = time.perf_counter()
        best, best_step, best_state, curve, conflicts = float("inf"), 0, None, [], 0
        for step in range(self.recipe.steps + 1):
            if step % self.recipe.every == 0:
                curve.append(self.validation_losses())
                value = sum(w * x for w, x in zip(self.weights, curve[-1], strict=True))
                if value < best:
                    best, best_step = value, step
                    best_state = copy.deepcopy(self.model.state_dict())
                if step - best_step >= self.recipe.patience * self.recipe.every:
                    break
            if step < self.recipe.steps:
                self.step()
                conflicts += self.optimizer.report.conflicting
        if best_state is None:
            raise FloatingPointError("no validation loss of the run was finite")
        self.model.load_state_dict(best_state)
        return {
            "steps": step,
            "seconds": time.perf_counter() - start,
            "best_step": best_step,
            "validation": best,
            "conflicting_steps": conflicts / max(step, 1),
            "curve": [[round(x, 6) for x in row] for row in curve],
        }
