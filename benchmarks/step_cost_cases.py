"""The models of the step benchmark, and the ways to fill ``.grad`` that it compares.

All candidates of a case share its parameters and its AdamW: none is favoured by where its memory
lies, and the largest case fits into memory.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from raco_optim import CAGradClip

C = 0.4
GRAM_EVERY = 4
OUTPUTS = 16  # of a head: the heads weigh nothing beside a trunk
VOCABULARY, IMAGE = 256, 32
# Small, so that hundreds of steps leave the case what it was.
LEARNING_RATE = 1e-5

FLOOR, WEIGHTED_SUM, DENSE, GHOST = "floor", "weighted_sum", "dense", "ghost"
APPROXIMATIONS = ("representation", "last_layer", "gram_every")
TORCHJD = ("torchjd_autojac", "torchjd_autogram")
NAMES = (FLOOR, WEIGHTED_SUM, DENSE, GHOST, *APPROXIMATIONS, *TORCHJD)

Batch = tuple[Tensor, list[Tensor]]


@dataclass(frozen=True)
class Case:
    """A trunk with m linear heads, and its batch."""

    kind: str  # "MLP", "ResNet" or "transformer"
    width: int  # of the hidden layers, or of the last convolutions
    depth: int  # layers, residual blocks at the smallest size, or transformer blocks
    batch: int
    losses: tuple[int, ...] = (2, 4, 8)  # the values of m
    tokens: int = 1  # of an example
    without: tuple[str, ...] = ()  # candidates that are left out to save time
    errors: bool = False  # whether to compare the approximations with the exact step


class Residual(nn.Module):
    """A residual block of two convolutions, normalised beforehand."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for _ in range(2):
            convolution = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
            layers += [nn.GroupNorm(8, channels), nn.ReLU(), convolution]
        self.inside = nn.Sequential(*layers)

    def forward(self, x: Tensor) -> Tensor:  # noqa: D102
        return x + self.inside(x)


class MultiTask(nn.Module):
    """A trunk with one linear head a loss, each the mean square to its targets."""

    def __init__(self, trunk: nn.Sequential, features: int, m: int) -> None:
        super().__init__()
        self.trunk = trunk
        self.heads = nn.ModuleList(nn.Linear(features, OUTPUTS) for _ in range(m))

    def forward(self, x: Tensor, targets: list[Tensor]) -> tuple[list[Tensor], Tensor]:
        """Returns the losses, and the trunk's output, which they share."""
        z = self.trunk(x)
        pairs = zip(self.heads, targets, strict=True)
        return [F.mse_loss(head(z), target) for head, target in pairs], z

    def twin(self) -> MultiTask:
        """Returns a model with the same parameters, for one that puts hooks on its modules."""
        return copy.deepcopy(self, {id(p): p for p in self.parameters()})


def make(
    case: Case, m: int, seed: int, device: str = "cpu", dtype: torch.dtype = torch.float32
) -> tuple[MultiTask, Batch]:
    """Returns the model of a case with m losses, and a batch."""
    torch.manual_seed(seed)
    with torch.device(device):
        model = MultiTask(nn.Sequential(*_trunk(case)), case.width, m).to(dtype)
    return model, draw(case, m, device, dtype)


def draw(case: Case, m: int, device: str = "cpu", dtype: torch.dtype = torch.float32) -> Batch:
    """Returns a batch from torch's random numbers."""
    rows: tuple[int, ...] = (case.batch,)
    with torch.device(device):
        if case.kind == "MLP":
            x = torch.randn(case.batch, case.width)
        elif case.kind == "ResNet":
            x = torch.randn(case.batch, 3, IMAGE, IMAGE)
        else:
            rows = (case.batch, case.tokens)
            x = torch.randint(VOCABULARY, rows)
        # Of unlike scales, from 1/2 to 2: with equal ones alpha would be nearly the weights.
        scales = [2 ** (2 * i / (m - 1) - 1) for i in range(m)]
        targets = [scale * torch.randn(*rows, OUTPUTS).to(dtype) for scale in scales]
    return (x.to(dtype) if x.is_floating_point() else x), targets


def _trunk(case: Case) -> list[nn.Module]:
    width = case.width
    if case.kind == "MLP":
        layers = [x for _ in range(case.depth) for x in (nn.Linear(width, width), nn.ReLU())]
        for layer in layers[::2]:
            # At this depth torch's default lets the gradients vanish below solvers' thresholds.
            nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
        return layers[:-1]
    if case.kind == "ResNet":
        quarter = width // 4
        down = [nn.Conv2d(3, quarter, 5, stride=4, padding=2), Residual(quarter)]
        blocks = [Residual(width) for _ in range(case.depth)]
        last = nn.Conv2d(quarter, width, 3, stride=2, padding=1)
        return [*down, last, *blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten()]
    blocks = [
        nn.TransformerEncoderLayer(
            width, max(1, width // 64), 4 * width, 0.0, batch_first=True, norm_first=True
        )
        for _ in range(case.depth)
    ]
    return [nn.Embedding(VOCABULARY, width), *blocks, nn.LayerNorm(width)]


@dataclass
class Candidate:
    """A way to fill ``.grad`` from a batch, and AdamW's step."""

    fill: Callable[[Batch], object]
    adamw: torch.optim.AdamW
    cycle: int = 1  # number of steps after which the cost repeats
    optimizer: CAGradClip | None = None  # ours, if it is
    parameters: list[Tensor] = field(init=False)

    def __post_init__(self) -> None:
        self.parameters = [p for group in self.adamw.param_groups for p in group["params"]]

    def zero_grad(self) -> None:
        """Frees ``.grad``."""
        for p in self.parameters:
            p.grad = None

    def __call__(self, batch: Batch) -> None:
        """Performs one whole step."""
        self.zero_grad()
        self.fill(batch)
        self.adamw.step()


def candidate(name: str, model: MultiTask, adamw: torch.optim.AdamW) -> Candidate:
    """Makes one of `NAMES`."""
    m = len(model.heads)
    parameters: list[Tensor] = list(model.parameters())
    if name == FLOOR:
        return Candidate(_floor(model, parameters), adamw)
    if name == WEIGHTED_SUM:
        return Candidate(lambda batch: torch.stack(model(*batch)[0]).mean().backward(), adamw)
    if name in TORCHJD:
        return Candidate(_torchjd(name, model, parameters), adamw)
    last = [x for x in model.trunk.modules() if isinstance(x, nn.Linear | nn.Conv2d)][-1]
    modes: dict[str, dict[str, Any]] = {
        DENSE: {},
        GHOST: {"gradients": GHOST},
        "representation": {"gradients": "representation"},
        "last_layer": {"gradients": last.parameters()},
        "gram_every": {"gram_every": GRAM_EVERY},
    }
    settings = modes[name]
    optimizer = CAGradClip(adamw, [1 / m] * m, c=C, **settings)

    def fill(batch: Batch) -> None:
        losses, z = model(*batch)
        optimizer.backward(losses, representation=z if name == "representation" else None)

    return Candidate(fill, adamw, settings.get("gram_every", 1), optimizer)


def _floor(model: MultiTask, parameters: list[Tensor]) -> Callable[[Batch], object]:
    """m backward passes, and a ``.grad`` for each parameter that any loss reaches."""
    last: list[list[int]] = []  # per loss, the parameters that it is the last to reach

    def fill(batch: Batch) -> None:
        if not last:  # the first step, which is not timed
            reached = []
            for loss in model(*batch)[0]:
                found = torch.autograd.grad(loss, parameters, retain_graph=True, allow_unused=True)
                reached.append({j for j, g in enumerate(found) if g is not None})
            for i, mine in enumerate(reached):
                last.append(sorted(mine.difference(*reached[i + 1 :])))
            del found
        losses, _ = model(*batch)
        for i, loss in enumerate(losses):
            keep = i < len(losses) - 1
            found = torch.autograd.grad(loss, parameters, retain_graph=keep, allow_unused=True)
            for j in last[i]:
                parameters[j].grad = found[j]
            del found

    return fill


def _torchjd(name: str, model: MultiTask, parameters: list[Tensor]) -> Callable[[Batch], object]:
    from torchjd.aggregation import CAGrad, CAGradWeighting
    from torchjd.autogram import Engine
    from torchjd.autojac import backward, jac_to_grad

    aggregator, weighting = CAGrad(C), CAGradWeighting(C)
    if name == "torchjd_autojac":

        def autojac(batch: Batch) -> None:
            backward(model(*batch)[0])
            # A Gram matrix per parameter: its default is slower and larger wherever tried.
            jac_to_grad(parameters, aggregator, optimize_gramian_computation=True)

        return autojac
    twin = model.twin()
    # The losses are means over the batch. With `batch_dim` the engine would return the Gram matrix
    # of m times as many losses as there are examples, 20 to 80 times as slowly here.
    engine = Engine(twin, batch_dim=None)

    def autogram(batch: Batch) -> None:
        stacked = torch.stack(twin(*batch)[0])
        torch.autograd.backward(stacked, weighting(engine.compute_gramian(stacked)))

    return autogram
