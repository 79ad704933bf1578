"""The two models: a trunk that all targets share, and a linear head for each."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from benchmarks.studies.qm9.data import TARGETS, Molecules


class Multitask(nn.Module):
    """A trunk with one head per target; `heads` are not shared."""

    heads: nn.ModuleList

    def shared_parameters(self) -> list[nn.Parameter]:
        """The parameters of the trunk."""
        return [p for name, p in self.named_parameters() if not name.startswith("heads.")]

    def features(self, batch: Molecules, rows: Tensor) -> Tensor:
        """Returns the trunk's output, ``[N, width]``."""
        raise NotImplementedError

    def predictions(self, batch: Molecules, rows: Tensor) -> list[Tensor]:
        """Returns the standardised predictions, 11 of ``[N]``: no graph leads to another head."""
        features = self.features(batch, rows)
        return [head(features)[:, 0] for head in self.heads]

    def forward(self, batch: Molecules, rows: Tensor) -> Tensor:
        """Returns the standardised predictions, ``[N, 11]``."""
        return torch.stack(self.predictions(batch, rows), 1)


class HistogramMLP(Multitask):
    """Two hidden layers on the distance histograms."""

    def __init__(self, width: int = 128) -> None:
        super().__init__()
        self.trunk = nn.Sequential(
            nn.Linear(365, width), nn.SiLU(), nn.Linear(width, width), nn.SiLU()
        )
        self.heads = nn.ModuleList(nn.Linear(width, 1) for _ in TARGETS)

    def features(self, batch: Molecules, rows: Tensor) -> Tensor:
        """Returns the trunk's output, ``[N, width]``."""
        return self.trunk(batch.histogram[rows])


class MessagePassing(Multitask):
    """A small network of the kind of SchNet: continuous filters between the heavy atoms."""

    def __init__(self, width: int = 32, layers: int = 2) -> None:
        super().__init__()
        self.embedding = nn.Linear(6, width)
        self.register_buffer("centres", torch.linspace(1, 7, 16))
        self.filters = nn.ModuleList(_two_layers(16, width) for _ in range(layers))
        self.inputs = nn.ModuleList(nn.Linear(width, width, bias=False) for _ in range(layers))
        self.updates = nn.ModuleList(_two_layers(width, width) for _ in range(layers))
        self.readout = nn.Sequential(nn.Linear(width, 64), nn.SiLU())
        self.heads = nn.ModuleList(nn.Linear(64, 1) for _ in TARGETS)

    def features(self, batch: Molecules, rows: Tensor) -> Tensor:
        """Returns the trunk's output, ``[N, 64]``."""
        elements, distances = batch.elements[rows], batch.distances[rows]
        there = (elements > 0).float()
        kinds = nn.functional.one_hot(elements, 5).float()
        h = self.embedding(torch.cat([kinds, batch.hydrogens[rows][..., None]], -1))
        h = h * there[..., None]
        pairs = there[:, :, None] * there[:, None] * (1 - torch.eye(elements.shape[1]))
        basis = torch.exp(-((distances[..., None] - self.centres) ** 2) / 0.3)
        for filter_, input_, update in zip(self.filters, self.inputs, self.updates, strict=True):
            messages = filter_(basis) * pairs[..., None] * input_(h)[:, None]
            h = h + update(messages.sum(2)) * there[..., None]
        return (self.readout(h) * there[..., None]).sum(1) / 5


def _two_layers(before: int, width: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(before, width), nn.SiLU(), nn.Linear(width, width))


MODELS = {"mlp": HistogramMLP, "schnet": MessagePassing}
