"""Models of which every process holds a part: FSDP2, HSDP, tensor parallelism."""

from __future__ import annotations

import pytest
import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from raco_optim import CAGradClip
from tests.ranks import Ranks, slices
from tests.test_replicated import WEIGHTS, Model, batches, losses_of, relative
from tests.test_replicated import train as train_replicated


def train(rank: int, number: int, shape: tuple[int, ...], heads: bool = False):
    torch.manual_seed(0)
    model = Model()
    names = ("replicate", "shard")[-len(shape) :]
    mesh = init_device_mesh("cpu", shape, mesh_dim_names=names)
    for part in (*model.trunk, *model.heads.values()):
        if list(part.parameters()):
            fully_shard(part, mesh=mesh)
    fully_shard(model, mesh=mesh)
    shared = model.trunk.parameters() if heads else None
    adamw = torch.optim.AdamW(model.parameters(), lr=1e-2)
    opt = CAGradClip(adamw, WEIGHTS, c=0.4, shared_parameters=shared)
    reports = []
    for batch in batches():
        x, y = slices(batch, rank, number)
        opt.zero_grad()
        opt.backward(losses_of(model(x), y))
        opt.step()
        reports.append(opt.report)
    return [p.full_tensor().detach() for p in model.parameters()], reports


@pytest.mark.parametrize("heads", [False, True])
def test_equals_one_process_on_the_joint_batch(two_ranks: Ranks, heads: bool) -> None:
    expected, reports = train_replicated(None, 1, {}, heads=heads)
    results = two_ranks.run(train, 2, (2,), heads)
    for found, _ in results:
        assert relative(found, expected) < 1e-5
        assert all(torch.equal(x, y) for x, y in zip(found, results[0][0], strict=True))
    for mine, theirs in zip(results[0][1], reports, strict=True):
        assert torch.allclose(mine.gram, theirs.gram, rtol=1e-3)
        assert torch.allclose(mine.losses, theirs.losses, rtol=1e-3)


@pytest.mark.parametrize("shape", [(4,), (2, 2)])
def test_four(four_ranks: Ranks, shape) -> None:
    expected, reports = train_replicated(None, 1, {})
    results = four_ranks.run(train, 4, shape)
    for found, _ in results:
        assert relative(found, expected) < 1e-5
