"""Several processes that hold the whole model each: the steps of one process on the joint batch."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from raco_optim import MGDA, CAGradClip
from tests.ranks import Ranks, slices

STEPS = 20
WEIGHTS = {"a": 0.5, "b": 0.3, "c": 0.2}


class Model(nn.Module):
    """A trunk with three heads."""

    def __init__(self) -> None:
        super().__init__()
        self.trunk = nn.Sequential(nn.Linear(6, 17), nn.Tanh(), nn.Linear(17, 9), nn.Tanh())
        self.heads = nn.ModuleDict({name: nn.Linear(9, 2) for name in WEIGHTS})

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        z = self.trunk(x)
        return {name: head(z) for name, head in self.heads.items()}


def losses_of(outputs: dict[str, Tensor], targets: Tensor) -> dict[str, Tensor]:
    scales = {"a": 1.0, "b": 3.0, "c": -2.0}
    return {
        name: (out - scales[name] * targets).square().mean() for name, out in outputs.items()
    }


def batches(number: int = STEPS, size: int = 8) -> list[list[Tensor]]:
    generator = torch.Generator().manual_seed(1)
    return [
        [torch.randn(size, 6, generator=generator), torch.randn(size, 2, generator=generator)]
        for _ in range(number)
    ]


def train(rank: int | None, number: int, settings: dict, ddp: bool = True, heads: bool = False):
    torch.manual_seed(0)
    model = Model()
    wrapped = model if rank is None or not ddp else DistributedDataParallel(model)
    adamw = torch.optim.AdamW(model.parameters(), lr=1e-2)
    shared = model.trunk.parameters() if heads else None
    opt = CAGradClip(adamw, WEIGHTS, c=0.4, shared_parameters=shared, **settings)
    reports = []
    for batch in batches():
        x, y = batch if rank is None else slices(batch, rank, number)
        opt.zero_grad()
        opt.backward(losses_of(wrapped(x), y))
        opt.step()
        reports.append(opt.report)
    return [p.detach().clone() for p in model.parameters()], reports


def relative(a, b) -> float:
    difference = sum(float((x - y).square().sum()) for x, y in zip(a, b, strict=True))
    return (difference / sum(float(y.square().sum()) for y in b)) ** 0.5


@pytest.mark.parametrize("heads", [False, True])
@pytest.mark.parametrize("ddp", [True, False])
def test_equals_one_process_on_the_joint_batch(two_ranks: Ranks, ddp: bool, heads: bool) -> None:
    expected, reports = train(None, 1, {}, heads=heads)
    results = two_ranks.run(train, 2, {}, ddp, heads)
    for found, _ in results:
        assert relative(found, expected) < 1e-5
        assert all(torch.equal(x, y) for x, y in zip(found, results[0][0], strict=True))
    for mine, theirs in zip(results[0][1], reports, strict=True):
        assert torch.allclose(mine.gram, theirs.gram, rtol=1e-3)
        assert torch.allclose(mine.losses, theirs.losses, rtol=1e-3)
