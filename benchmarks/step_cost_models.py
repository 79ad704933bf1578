"""Trunks with m heads on them, the batches they see, and the cases that are measured."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

OUTPUTS = 16  # of a head: the heads weigh nothing beside a trunk
BATCHES = 4  # different ones, for the errors of approximations
VOCABULARY = 256
IMAGE = 32  # pixels a side


@dataclass(frozen=True)
class Case:
    """A trunk, its batch, and the numbers of losses to measure.

    Attributes:
        kind: ``"mlp"``, ``"conv"`` or ``"transformer"``.
        title: What a picture calls it.
        width: Of the hidden layers; of the last convolutions.
        depth: Number of linear layers, of residual blocks at 4x4 pixels, of transformer blocks.
        batch: Number of examples.
        tokens: Of an example.
        losses: The values of m.
        small_batch: Whether rows (examples times tokens) are few against the width, which is where
            a Gram matrix without gradients is to pay.
        errors: Whether to train for the errors of the approximations, which takes a while.
        without: Candidates that are left out to save time.
    """

    kind: str
    title: str
    width: int
    depth: int
    batch: int
    tokens: int = 1
    losses: tuple[int, ...] = (2, 4, 8)
    small_batch: bool = False
    errors: bool = False
    without: tuple[str, ...] = ()


class ConvBlock(nn.Module):
    """A residual block of two 3x3 convolutions, normalised beforehand."""

    def __init__(self, channels: int, out: int, stride: int) -> None:
        super().__init__()
        self.normed = nn.GroupNorm(8, channels)
        self.first = nn.Conv2d(channels, out, 3, stride, 1, bias=False)
        self.normed_again = nn.GroupNorm(8, out)
        self.second = nn.Conv2d(out, out, 3, 1, 1, bias=False)
        same = stride == 1 and channels == out
        self.shortcut = nn.Identity() if same else nn.Conv2d(channels, out, 1, stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:  # noqa: D102
        y = self.first(F.relu(self.normed(x)))
        return cast(Tensor, self.shortcut(x) + self.second(F.relu(self.normed_again(y))))


class TransformerBlock(nn.Module):
    """Causal self-attention and a feed-forward layer, each residual and normalised beforehand."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.normed = nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)
        self.feed_forward = nn.Sequential(
            nn.LayerNorm(width), nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width)
        )

    def forward(self, x: Tensor) -> Tensor:  # noqa: D102
        split = self.qkv(self.normed(x)).unflatten(-1, (3, self.heads, -1))
        q, k, v = split.permute(2, 0, 3, 1, 4)
        attended = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(attended.transpose(1, 2).flatten(-2))
        return cast(Tensor, x + self.feed_forward(x))


class Embedding(nn.Module):
    """Embeddings of tokens and of their positions."""

    def __init__(self, tokens: int, width: int) -> None:
        super().__init__()
        self.token = nn.Embedding(VOCABULARY, width)
        self.position = nn.Embedding(tokens, width)

    def forward(self, ids: Tensor) -> Tensor:  # noqa: D102
        positions = torch.arange(ids.shape[1], device=ids.device).expand_as(ids)
        return cast(Tensor, self.token(ids) + self.position(positions))


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

    def last_layer(self) -> list[nn.Parameter]:
        """Returns the parameters of the trunk's last linear layer or convolution."""
        layers = [x for x in self.trunk.modules() if isinstance(x, nn.Linear | nn.Conv2d)]
        return list(layers[-1].parameters())


Batch = tuple[Tensor, list[Tensor]]


def make(case: Case, m: int, seed: int) -> tuple[MultiTask, list[Batch]]:
    """Returns the model of a case with m losses, and its batches."""
    torch.manual_seed(seed)
    if case.kind == "mlp":
        layers = [layer for _ in range(case.depth) for layer in (_linear(case.width), nn.ReLU())]
        trunk = nn.Sequential(*layers[:-1])
    elif case.kind == "conv":
        quarter, eighth = case.width // 4, case.width // 8
        trunk = nn.Sequential(
            nn.Conv2d(3, eighth, 3, 2, 1, bias=False),
            ConvBlock(eighth, eighth, 1),
            ConvBlock(eighth, quarter, 2),
            ConvBlock(quarter, case.width, 2),
            *(ConvBlock(case.width, case.width, 1) for _ in range(case.depth - 1)),
            nn.GroupNorm(8, case.width),
            nn.ReLU(),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
        )
    else:
        heads = max(1, case.width // 64)
        trunk = nn.Sequential(
            Embedding(case.tokens, case.width),
            *(TransformerBlock(case.width, heads) for _ in range(case.depth)),
            nn.LayerNorm(case.width),
        )
    model = MultiTask(trunk, case.width, m)
    return model, [_batch(case, m) for _ in range(BATCHES)]


def _linear(width: int) -> nn.Linear:
    layer = nn.Linear(width, width)
    # As deep as it is, torch's default would let the gradients vanish below the thresholds that
    # some solvers have.
    nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
    return layer


def _batch(case: Case, m: int) -> Batch:
    rows: tuple[int, ...] = (case.batch,)
    if case.kind == "mlp":
        x = torch.randn(case.batch, case.width)
    elif case.kind == "conv":
        x = torch.randn(case.batch, 3, IMAGE, IMAGE)
    else:
        rows = (case.batch, case.tokens)
        x = torch.randint(VOCABULARY, rows)
    # Of unlike scales, from 1/2 to 2: with equal ones the coefficients would be nearly the weights.
    scales = [2 ** (2 * i / (m - 1) - 1) for i in range(m)]
    return x, [scale * torch.randn(*rows, OUTPUTS) for scale in scales]
