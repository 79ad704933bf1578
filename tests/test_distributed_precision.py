"""Low precision and extreme scales in several processes, against float64."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn
from torch.amp import GradScaler
from torch.nn.parallel import DistributedDataParallel

from raco_optim import CAGradClip
from tests.ranks import WEIGHTS, Ranks, copies, equal, losses_of, slices
from tests.test_replicated import Model, batches

# Kind -> the largest error of the Gram matrix, relative to |g_i| |g_j|.
KINDS = {
    "float32": 1e-6,
    "float32, large": 1e-6,
    "bfloat16 parameters": 1e-4,
    "float16 parameters": 1e-4,
    "bfloat16 autocast": 1e-4,
    "scaled by 1e15": 1e-6,
    "scaled by 1e-15": 1e-6,
}


def one_backward(rank, number, kind):
    """This process's own gradients, ``[m, n]``, the report and the combined gradient, ``[n]``."""
    torch.manual_seed(0)
    if kind == "float32, large":  # large enough for the Gram matrix's way through float32
        model: nn.Module = nn.Sequential(nn.Linear(6, 300), nn.Linear(300, 600), nn.Linear(600, 6))
    else:
        model = Model()
    dtype = {"b": torch.bfloat16, "f": torch.float16}[kind[0]] if "parameters" in kind else None
    model.to(dtype)
    scale = float(kind.split()[-1]) if kind.startswith("scaled") else 1.0
    opt = CAGradClip(torch.optim.SGD(model.parameters(), lr=0.1), WEIGHTS)
    x, y = (z.to(dtype) for z in slices(batches(1)[0], rank, number))
    with torch.autocast("cpu", torch.bfloat16, enabled="autocast" in kind):
        out = model(x)
        if isinstance(out, Tensor):
            out = dict(zip(WEIGHTS, out.split(2, dim=1), strict=True))
        losses = {name: scale * loss for name, loss in losses_of(out, y).items()}
    own = [
        torch.autograd.grad(loss, model.parameters(), retain_graph=True, materialize_grads=True)
        for loss in losses.values()
    ]
    opt.backward(losses)
    rows = torch.stack([torch.cat([g.reshape(-1) for g in row]) for row in own])
    return rows, opt.report, torch.cat([p.grad.reshape(-1) for p in model.parameters()])


@pytest.mark.parametrize("kind", KINDS)
def test_gram_matrix_and_combination_are_those_in_float64(four_ranks: Ranks, kind: str) -> None:
    results = four_ranks.run(one_backward, 4, kind)
    own = torch.stack([rows.double() for rows, _, _ in results])
    mean = own.mean(0)
    gram, norms = mean @ mean.T, mean.norm(dim=1)
    _, first, one = results[0]
    alpha = first.coefficients
    # Four numbers are added in float32, then three; the sum is rounded to the parameters' dtype.
    rounding = 8 * 2.0**-24 * (alpha @ own.abs().mean(0))
    rounding += torch.finfo(one.dtype).eps * (alpha @ mean).abs()
    for _, report, combined in results:
        assert equal([report.gram, report.p, combined], [first.gram, first.p, one])
        assert float(((report.gram - gram) / norms / norms[:, None]).abs().max()) < KINDS[kind]
        assert bool(((combined.double() - alpha @ mean).abs() <= rounding).all())


def low_precision(rank, number, dtype):
    """Trains parameters of low precision, in buckets of two dtypes."""
    torch.manual_seed(0)
    model = Model()
    model.trunk.to(dtype)
    opt = CAGradClip(torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9), WEIGHTS)
    wrapped = DistributedDataParallel(model.trunk)
    before = copies(model.parameters())
    for batch in batches():
        x, y = slices(batch, rank, number)
        opt.zero_grad()
        opt.backward(losses_of(model.read(wrapped(x.to(dtype)).float()), y))
        opt.step()
    after = copies(model.parameters())
    assert not any(torch.equal(p, q) for p, q in zip(before, after, strict=True))
    return [*after, opt.report.gram]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_processes_agree_to_the_bit_in_low_precision(two_ranks: Ranks, dtype) -> None:
    assert equal(*two_ranks.run(low_precision, 2, dtype))


def scaled(rank, number):
    """Float16 autocast; in step 1 the gradient of one loss overflows, in one process alone."""
    torch.manual_seed(0)
    model = Model()
    wrapped = DistributedDataParallel(model)
    adamw = torch.optim.AdamW(model.parameters(), lr=1e-2)
    opt = CAGradClip(adamw, WEIGHTS, nonfinite="propagate")
    scaler = GradScaler("cpu", init_scale=2.0**12)
    history = []
    for t in range(4):
        x, y = slices(batches()[t], rank, number)
        with torch.autocast("cpu", torch.float16):
            losses = losses_of(wrapped(x), y)
        if t == 1 and rank == 1:
            losses["b"] = losses["b"] * 1e6  # finite; its gradient is not, in float16
            assert losses["b"].isfinite()
        opt.zero_grad()
        opt.backward({name: scaler.scale(loss) for name, loss in losses.items()})
        scaler.unscale_(opt)
        norm = nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        scaler.step(opt)
        scaler.update()
        history.append((scaler.get_scale(), float(norm), copies(model.parameters())))
    return history


def test_an_overflow_in_one_process_skips_the_step_in_all(two_ranks: Ranks) -> None:
    results = two_ranks.run(scaled, 2)
    for history in results:
        scales, norms, parameters = zip(*history, strict=True)
        assert scales == (2.0**12, 2.0**11, 2.0**11, 2.0**11)
        assert [math.isfinite(norm) for norm in norms] == [True, False, True, True]
        assert equal(parameters[0], parameters[1]), "the step was left out"
        assert not equal(parameters[1], parameters[2]), "the next one moves"
        for found, theirs in zip(parameters, results[0], strict=True):
            assert equal(found, theirs[2])
