"""Several processes that hold the whole model each: the steps of one process on the joint batch."""

from __future__ import annotations

import contextlib
import copy
import pickle
import warnings
from functools import partial

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from raco_optim import MGDA, CAGradClip, LinearScalarization, MultiObjectiveOptimizer
from raco_optim.distributed import replicated
from tests.oracles import exact_minimum
from tests.ranks import WEIGHTS, OneBuffer, Ranks, copies, equal, losses_of, relative, slices

STEPS = 10


class Model(nn.Module):
    """A trunk with three heads."""

    def __init__(self) -> None:
        super().__init__()
        self.trunk = nn.Sequential(nn.Linear(6, 17), nn.Tanh(), nn.Linear(17, 9), nn.Tanh())
        self.heads = nn.ModuleDict({name: nn.Linear(9, 2) for name in WEIGHTS})

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        return self.read(self.trunk(x))

    def read(self, z: Tensor) -> dict[str, Tensor]:
        return {name: head(z) for name, head in self.heads.items()}


class Uneven(Model):
    """With a part for each process, and one that no process uses."""

    def __init__(self) -> None:
        super().__init__()
        self.own = nn.ModuleList(nn.Linear(6, 2) for _ in range(4))
        self.unused = nn.Linear(6, 2)

    def forward(self, x: Tensor, rank: int = 0) -> dict[str, Tensor]:
        own = self.own[rank](x)
        return {name: out + own for name, out in super().forward(x).items()}


class Odd(nn.Module):
    """Two dtypes, unusual strides, a scalar and an empty tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.trunk = nn.Conv2d(2, 4, (2, 1)).to(memory_format=torch.channels_last)
        self.transposed = nn.Parameter(torch.randn(5, 4).T)
        self.scalar = nn.Parameter(torch.tensor(1.5))
        self.empty = nn.Parameter(torch.empty(0, 3))
        self.head = nn.Linear(5, 2, dtype=torch.float64)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        z = self.trunk(x.view(-1, 2, 3, 1)).mean((2, 3)) @ self.transposed
        out = self.head(z.double()) + self.empty.sum()
        return {"a": out, "b": out * self.scalar, "c": z[:, :2]}


def batches(number: int = STEPS, size: int = 8) -> list[list[Tensor]]:
    generator = torch.Generator().manual_seed(1)
    return [
        [torch.randn(size, 6, generator=generator), torch.randn(size, 2, generator=generator)]
        for _ in range(number)
    ]


# --- The micro-batches of a process in step t: mappings from names to losses ---------------------


def whole(model, t, rank, number):
    x, y = slices(batches()[t], rank, number)
    return [losses_of(model(x), y)]


def in_no_sync(model, t, rank, number):
    with contextlib.nullcontext() if isinstance(model, Model) else model.no_sync():
        return whole(model, t, rank, number)


def callables(model, t, rank, number):
    x, y = slices(batches()[t], rank, number)
    return [{name: lambda name=name: losses_of(model(x), y)[name] for name in WEIGHTS}]


def micro_batches(model, t, rank, number, k=2):
    for x, y in zip(*(z.chunk(k) for z in slices(batches()[t], rank, number)), strict=True):
        yield {name: loss / k for name, loss in losses_of(model(x), y).items()}


def uneven_micro_batches(model, t, rank, number):
    return micro_batches(model, t, rank, number, 1 + rank % 2)


def reordered(model, t, rank, number):
    (losses,) = whole(model, t, rank, number)
    return [dict(sorted(losses.items(), reverse=(rank + t) % 2 == 0))]


def absent_here(model, t, rank, number):
    (losses,) = whole(model, t, rank, number)
    return [losses | {"b": None}] if rank == 1 else [losses]


def absent_in_turn(model, t, rank, number):
    (losses,) = whole(model, t, rank, number)
    return [losses | {"abc"[(t + rank) % 3]: None}]


def absent_everywhere(model, t, rank, number):
    (losses,) = whole(model, t, rank, number)
    return [losses | {"c": None}] if t % 2 else [losses]


def idle_in_turn(model, t, rank, number):
    (losses,) = whole(model, t, rank, number)
    return [dict.fromkeys(losses) if rank == t % number else losses]


def own_part(model, t, rank, number):
    x, y = slices(batches()[t], rank, number)
    return [losses_of(model(x, rank), y)]


def joint(feed, model, t, number):
    """The losses of one process that has the batches of all; an absent one counts as zero."""
    found: dict[str, list[Tensor]] = {name: [] for name in WEIGHTS}
    for rank in range(number):
        for losses in feed(model, t, rank, number):
            for name, loss in losses.items():
                if loss is not None:
                    found[name].append(loss if isinstance(loss, Tensor) else loss())
    return {name: sum(losses) / number if losses else None for name, losses in found.items()}


def with_representation(model, t, rank, number):
    x, y = slices(batches()[t], rank, number)
    z = model.trunk(x)
    return [losses_of(model.read(z), y) | {"representation": z}]


def of_scalars(model, t, rank, number, k=1, passed=True):
    """Losses of one scalar per example."""
    for x, y in zip(*(z.chunk(k) for z in slices(batches()[t], rank, number)), strict=True):
        s = sum((out - y).square().sum(1) for out in model(x).values())
        losses = {"a": s.mean() / k, "b": (3 - s).sigmoid().mean() / k, "c": s.cos().mean() / k}
        yield losses | ({"scalars": s} if passed else {})


# --- Training ------------------------------------------------------------------------------------

ddp = DistributedDataParallel
ddp_with_unused = partial(ddp, find_unused_parameters=True)
ddp_static = partial(ddp, static_graph=True)
ddp_views = partial(ddp, gradient_as_bucket_view=True)


def unwrapped(model):
    return model


def compiled(model):
    return torch.compile(ddp(model), backend="aot_eager")


def clipped(model, /, **settings):
    return CAGradClip(torch.optim.AdamW(model.parameters(), lr=1e-2), WEIGHTS, c=0.4, **settings)


def with_heads(model, **settings):
    return clipped(model, shared_parameters=model.trunk.parameters(), **settings)


every_third = partial(clipped, gram_every=3)
ghost = partial(clipped, gradients="ghost")
by_representation = partial(with_heads, gradients="representation")


def min_norm(model):
    return MGDA(torch.optim.AdamW(model.parameters(), lr=1e-2))


def of_a_layer(model):
    return clipped(model, gradients=model.trunk[2].parameters())


def per_example(model):
    return clipped(model, gradients="per_example", model=model)


def two_inner(model):
    """SGD for the trunk and AdamW for the heads, one with weight decay and one without."""
    trunk = torch.optim.SGD(model.trunk.parameters(), lr=0.05, momentum=0.9, weight_decay=0.1)
    heads = torch.optim.AdamW(model.heads.parameters(), lr=1e-2, weight_decay=0.0)
    return CAGradClip([trunk, heads], WEIGHTS, shared_parameters=model.trunk.parameters())


def fused(model):
    adamw = torch.optim.AdamW(model.parameters(), lr=1e-2, fused=True)
    return CAGradClip(adamw, WEIGHTS, shared_parameters=model.trunk.parameters())


def run(rank, number, feed, wrap=unwrapped, method=clipped, kind=Model):
    """Trains; returns parameters, reports, and for which parameters .grad is None.

    As rank None, one process takes the batches of all.
    """
    torch.manual_seed(0)
    model = kind()
    opt = method(model)
    seen = model if rank is None else wrap(model)
    reports = []
    for t in range(STEPS):
        opt.zero_grad()
        mine = [joint(feed, model, t, number)] if rank is None else feed(seen, t, rank, number)
        mine = list(mine)
        for k, losses in enumerate(mine):
            options = {key: losses.pop(key) for key in set(losses) & {"representation", "scalars"}}
            opt.backward(losses, accumulate=k < len(mine) - 1, **options)
        opt.step()
        reports.append(opt.report)
    return copies(model.parameters()), reports, [p.grad is None for p in model.parameters()]


def same_bits(a, b) -> bool:
    return (a is None and b is None) or torch.equal(a.nan_to_num(7.0), b.nan_to_num(7.0))


def check(results, expected) -> None:
    """All processes have the same bits; they differ from one process by rounding alone."""
    (truth, witnesses, unreached), (first, reports, _) = expected, results[0]
    for found, mine, missing in results:
        assert equal(found, first)
        assert missing == unreached
        for report, theirs in zip(mine, reports, strict=True):
            for name in ("gram", "p", "p_clipped", "coefficients", "losses"):
                assert same_bits(getattr(report, name), getattr(theirs, name)), name
            assert report.absent == theirs.absent
    assert relative(first, truth) < 1e-5
    for report, witness in zip(reports, witnesses, strict=True):
        assert torch.allclose(report.gram, witness.gram, rtol=1e-3)
        assert torch.equal(report.gram, report.gram.T)
        assert torch.allclose(report.losses, witness.losses, rtol=1e-3, equal_nan=True)
        assert report.absent == witness.absent


CASES = {
    "a plain module": (whole, unwrapped, clipped),
    "a plain module with heads": (whole, unwrapped, with_heads),
    "DDP": (whole, ddp, clipped),
    "DDP with heads": (whole, ddp, with_heads),
    "find_unused_parameters": (whole, ddp_with_unused, with_heads),
    "static_graph": (whole, ddp_static, clipped),
    "gradient_as_bucket_view": (whole, ddp_views, clipped),
    "torch.compile": (whole, compiled, clipped),
    "no_sync": (in_no_sync, ddp, clipped),
    "callables": (callables, ddp, clipped),
    "callables, static_graph": (callables, ddp_static, with_heads),
    "callables, find_unused_parameters": (callables, ddp_with_unused, with_heads),
    "micro-batches": (micro_batches, ddp, with_heads),
    "micro-batches, static_graph": (micro_batches, ddp_static, clipped),
    "micro-batches, another number in each process": (uneven_micro_batches, ddp, clipped),
    "names in another order": (reordered, ddp, clipped),
    "an objective absent here": (absent_here, ddp, with_heads),
    "another one absent in each step": (absent_in_turn, ddp, clipped),
    "an objective absent everywhere": (absent_everywhere, ddp, clipped),
    "a process without any": (idle_in_turn, ddp, with_heads),
    "MGDA without weights": (whole, ddp, min_norm),
    "the Gram matrix of a layer": (whole, ddp, of_a_layer),
    "the Gram matrix of an earlier step": (whole, ddp, every_third),
    "the same, an objective absent everywhere": (absent_everywhere, ddp, every_third),
    "several inner optimizers": (whole, ddp, two_inner),
    "several inner optimizers, micro-batches": (micro_batches, ddp, two_inner),
}


@pytest.mark.parametrize("case", CASES)
def test_equals_one_process_on_the_joint_batch(two_ranks: Ranks, case: str) -> None:
    feed, wrap, method = CASES[case]
    check(two_ranks.run(run, 2, feed, wrap, method), run(None, 2, feed, method=method))


@pytest.mark.parametrize(
    "case", ["DDP with heads", "another one absent in each step", "the Gram matrix of a layer"]
)
def test_so_do_four(four_ranks: Ranks, case: str) -> None:
    feed, wrap, method = CASES[case]
    check(four_ranks.run(run, 4, feed, wrap, method), run(None, 4, feed, method=method))


def test_a_representation_is_that_of_the_joint_batch(two_ranks: Ranks) -> None:
    settings = with_representation, unwrapped, by_representation
    check(two_ranks.run(run, 2, *settings), run(0, 1, *settings))


@pytest.mark.parametrize("parts", [1, 2])
def test_per_example_gradients_are_those_of_the_joint_batch(two_ranks: Ranks, parts: int) -> None:
    results = two_ranks.run(run, 2, partial(of_scalars, k=parts), ddp, per_example)
    check(results, run(0, 1, partial(of_scalars, passed=False)))
    assert {report.gradients for _, reports, _ in results for report in reports} == {"per_example"}


def test_ghost_is_dense(two_ranks: Ranks) -> None:
    exact, ghosts = (two_ranks.run(run, 2, whole, ddp, method) for method in (clipped, ghost))
    assert equal(exact[0][0], ghosts[0][0])
    check(ghosts, run(None, 2, whole))


# --- Parameters ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("wrap", "method"), [(unwrapped, with_heads), (ddp, clipped), (ddp_with_unused, with_heads)]
)
def test_parameters_that_one_process_or_none_reaches(four_ranks: Ranks, wrap, method) -> None:
    results = four_ranks.run(run, 4, own_part, wrap, method, Uneven)
    check(results, run(None, 4, own_part, method=method, kind=Uneven))
    torch.manual_seed(0)
    unused, missing = list(Uneven().unused.parameters()), results[0][2]
    assert equal(results[0][0][-2:], unused), "weight decay did not move them"
    assert missing == [False] * (len(missing) - 2) + [True] * 2


def in_buckets(rank, size, *settings):
    before = replicated._BUCKET
    replicated._BUCKET = size or before
    try:
        return run(rank, 2, whole, unwrapped, *settings)
    finally:
        replicated._BUCKET = before


@pytest.mark.parametrize(("kind", "size"), [(Model, 64), (Odd, 64), (Odd, None)])
def test_parameters_of_any_form_in_buckets_of_any_size(two_ranks: Ranks, kind, size) -> None:
    expected = run(None, 2, whole, method=with_heads, kind=kind)
    check(two_ranks.run(in_buckets, size, fused, kind), expected)


# --- Numbers from a formula ----------------------------------------------------------------------


def gram_matrices(rank, number, mode):
    """H of losses that are linear in x: their gradients are rows of a random matrix."""
    group = dist.new_group(range(number))
    if number < 4:
        dist.new_group(range(number, 4))  # all are in as many groups, so names of groups agree
    found = []
    for draw in range(12 if rank < number else 0):
        generator = torch.Generator().manual_seed(100 * draw + rank)
        rows = torch.randn(4, 50, generator=generator)
        z = 1 * (x := nn.Parameter(torch.ones(50)))
        sgd = torch.optim.SGD([x], lr=0.1)
        opt = CAGradClip(sgd, [0.25] * 4, gradients=mode, process_group=group)
        opt.backward(list(rows @ z), representation=z if mode == "representation" else None)
        found.append(opt.report.gram)
    return found


@pytest.mark.parametrize("mode", ["dense", "representation"])
@pytest.mark.parametrize("number", [3, 4])
def test_gram_matrix_is_symmetric_to_the_bit(four_ranks: Ranks, number: int, mode: str) -> None:
    """An all-reduce over three processes or more adds each entry in another order."""
    for matrices in four_ranks.run(gram_matrices, number, mode):
        assert all(torch.equal(gram, gram.T) for gram in matrices)


# Which losses are there: by process and micro-batch.
PRESENT = {
    "one is absent everywhere": ("ac", "ac", "a", "c"),
    "one is there once": ("abc", "ac", "ac", "ac"),
    "each is somewhere": ("a", "", "b", "c"),
    "two are absent everywhere": ("b", "", "b", ""),
    "one process has none": ("ab", "b", "", ""),
}


def linear_losses(rank, micro_batch):
    """Gradients of the losses of a micro-batch, which are linear."""
    generator = torch.Generator().manual_seed(10 * rank + micro_batch)
    return torch.randn(3, 5, generator=generator, dtype=torch.float64)


def with_absent_losses(rank, present, method):
    x = nn.Parameter(torch.ones(5, dtype=torch.float64))
    weights = {"weights": WEIGHTS} if method is CAGradClip else {}
    opt = method(torch.optim.SGD([x], lr=1.0), **weights)
    for k in range(2):
        pairs = zip(WEIGHTS, linear_losses(rank, k), strict=True)
        losses = {name: row @ x if name in present[2 * rank + k] else None for name, row in pairs}
        opt.backward(losses, accumulate=k == 0)
    return x.grad, opt.report


@pytest.mark.parametrize("present", PRESENT.values(), ids=PRESENT)
@pytest.mark.parametrize("method", [CAGradClip, MGDA])
def test_absent_losses_leave_the_others_their_correction(two_ranks, present, method) -> None:
    """One that is there in one process and micro-batch is present; its mean counts zeros."""
    rows = np.zeros((3, 5))
    for place, there in enumerate(present):
        for i, name in enumerate(WEIGHTS):
            if name in there:
                rows[i] += linear_losses(*divmod(place, 2))[i].numpy() / 2
    index = [i for i, name in enumerate(WEIGHTS) if name in "".join(present)]
    gram, alpha, p_clipped = rows[index] @ rows[index].T, np.zeros(3), np.full(3, np.nan)
    if method is CAGradClip:
        given = np.array(list(WEIGHTS.values()))[index]
        w = given / given.sum()
        p = np.array(exact_minimum(gram, w, 0.4).p, dtype=float)
        p_clipped[index] = clip = np.minimum(p, w)
        radius = 0.4 * np.sqrt(w @ gram @ w) / np.sqrt(clip @ gram @ clip)
        alpha[index] = given.sum() * (w + radius * clip)
    else:
        uniform = np.full(len(index), 1 / len(index))
        # min |G_p| is min <G_p, g0> + s |G_p| for a radius so large that the rest does not count.
        alpha[index] = np.array(exact_minimum(gram, uniform, 1e9).p, dtype=float)
    for grad, report in two_ranks.run(with_absent_losses, present, method):
        assert report.absent == tuple(n for n in WEIGHTS if n not in "".join(present))
        np.testing.assert_allclose(report.coefficients, alpha, rtol=1e-6, atol=1e-7)
        np.testing.assert_allclose(grad, alpha @ rows, rtol=1e-6, atol=1e-7)
        if method is CAGradClip:
            np.testing.assert_allclose(report.p_clipped, p_clipped, rtol=1e-6, atol=1e-7)


def from_one_buffer(rank):
    x = nn.Parameter(torch.ones(5, dtype=torch.float64))
    opt = LinearScalarization(torch.optim.SGD([x], lr=1.0), [0.5, 0.3, 0.2])
    for k in range(3):
        losses = [partial(OneBuffer.apply, x, row) for row in linear_losses(rank, k)]
        opt.backward(losses, accumulate=k < 2)
    return x.grad


def test_kept_gradients_are_not_the_users_memory(two_ranks: Ranks) -> None:
    """With tensors, torch.autograd.grad itself leaves the memory with the user."""
    rows = sum(linear_losses(rank, k) for rank in range(2) for k in range(3)) / 2
    expected = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64) @ rows
    for found in two_ranks.run(from_one_buffer):
        assert torch.allclose(found, expected, rtol=1e-12)


def with_wider_gradients(rank):
    """Parameters of low precision with float32 gradients, and the gradients that hooks see."""
    torch.manual_seed(0)
    model = Model().to(torch.bfloat16)
    seen: list[Tensor] = []
    for p in model.parameters():
        p.grad_dtype = torch.float32
        p.register_post_accumulate_grad_hook(lambda p: seen.append(p.grad.clone()))
    x, y = (z.bfloat16() for z in batches()[0])
    parts = range(2) if rank is None else [rank]
    losses = [losses_of(model(x.chunk(2)[k]), y.chunk(2)[k]) for k in parts]
    if rank is None:
        sum(WEIGHTS[name] * part[name] / 2 for part in losses for name in part).backward()
    else:
        LinearScalarization(torch.optim.SGD(model.parameters(), 0.1), WEIGHTS).backward(losses[0])
    return [p.grad for p in model.parameters()], seen


@pytest.mark.skipif(not hasattr(Tensor, "grad_dtype"), reason="torch < 2.10")
def test_gradients_have_the_dtype_of_backward_and_hooks_run_once(two_ranks: Ranks) -> None:
    expected, _ = with_wider_gradients(None)
    for found, seen in two_ranks.run(with_wider_gradients):
        assert [g.dtype for g in found] == [g.dtype for g in expected] == [torch.float32] * 10
        assert relative(found, expected) < 1e-2  # as far apart as sums of bfloat16 are
        assert len(seen) == len(found)
        assert equal(seen, found)


def with_parameters_that_no_optimizer_holds(rank):
    model = Model()
    opt = CAGradClip(torch.optim.SGD(model.trunk.parameters(), lr=0.1), WEIGHTS)
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        for _ in range(2):
            opt.backward(losses_of(model(batches()[0][0]), batches()[0][1]))
    return [str(warning.message) for warning in found if warning.category is UserWarning]


def test_every_process_warns_once_of_parameters_that_no_optimizer_holds(two_ranks: Ranks) -> None:
    for messages in two_ranks.run(with_parameters_that_no_optimizer_holds):
        assert len(messages) == 1
        assert "the losses depend on 6 parameters, with 60 numbers" in messages[0]


class Remembers:
    """A rule with a state that draws at random: a running mean of H."""

    def __init__(self):
        self.mean = None

    def __call__(self, gram):
        self.mean = gram.clone() if self.mean is None else 0.9 * self.mean + 0.1 * gram
        return self.mean.diagonal().rsqrt() * (1 + torch.rand(len(gram), dtype=torch.float64))


def with_a_stateful_rule(rank, resumed):
    """Each process draws numbers of its own; the first one's count."""
    torch.manual_seed(0)
    model = Model()
    opt = None
    for t in range(6):
        if opt is None or (t == 3 and resumed):
            state = [opt and opt.state_dict()]
            dist.broadcast_object_list(state)  # as read from a file that the first one wrote
            adamw = torch.optim.AdamW(model.parameters(), lr=1e-2)
            opt = MultiObjectiveOptimizer(adamw, Remembers(), weights=WEIGHTS)
            if state[0]:
                opt.load_state_dict(state[0])
        x, y = slices(batches()[t], rank, 2)
        torch.manual_seed(10 * t + rank)
        opt.zero_grad()
        opt.backward(losses_of(model(x), y))
        opt.step()
    return copies(model.parameters())


def test_a_stateful_rule_that_draws_at_random_draws_for_all_and_resumes(two_ranks: Ranks) -> None:
    runs = [two_ranks.run(with_a_stateful_rule, resumed) for resumed in (False, True)]
    for parameters in [*runs[0], *runs[1]]:
        assert equal(parameters, runs[0][0])


# --- DDP's own backward pass ---------------------------------------------------------------------


def weighted_sum(rank, method):
    """Trains with DDP's own backward pass of the weighted loss, or with a method that is that."""
    torch.manual_seed(0)
    model = Model()
    wrapped = ddp(model)
    opt = method(torch.optim.AdamW(model.parameters(), lr=1e-2))
    for batch in batches():
        x, y = slices(batch, rank, 2)
        losses = losses_of(wrapped(x), y)
        opt.zero_grad()
        if method is unwrapped:
            sum(WEIGHTS[name] * loss for name, loss in losses.items()).backward()
        else:
            opt.backward(losses)
        opt.step()
    return copies(model.parameters())


def test_weighted_sum_is_that_of_ddp(two_ranks: Ranks) -> None:
    expected, *_ = two_ranks.run(weighted_sum, unwrapped)
    for method in (
        partial(LinearScalarization, weights=WEIGHTS),
        partial(CAGradClip, weights=WEIGHTS, c=0.0),
    ):
        found = two_ranks.run(weighted_sum, method)
        assert relative(found[0], expected) < 1e-5
        assert equal(found[0], found[1])


def beside_ddp(rank, set_to_none):
    """Adds to the gradient that DDP's own backward pass left, in a view of its bucket or not."""
    torch.manual_seed(0)
    model = Model()
    wrapped = model if rank is None else ddp_views(model)
    opt = clipped(model)
    for t in range(6):
        x, y = batches()[t] if rank is None else slices(batches()[t], rank, 2)
        opt.zero_grad(set_to_none=set_to_none)
        sum(losses_of(wrapped(x), y).values()).backward()
        opt.backward(losses_of(wrapped(x), y))
        opt.step()
    return copies(p.grad for p in model.parameters()), copies(model.parameters())


@pytest.mark.parametrize("set_to_none", [True, False])
def test_adds_to_the_gradient_that_ddp_averaged(two_ranks: Ranks, set_to_none: bool) -> None:
    gradients, parameters = beside_ddp(None, set_to_none)
    results = two_ranks.run(beside_ddp, set_to_none)
    for grad, found in results:
        assert relative(grad, gradients) < 1e-5
        assert relative(found, parameters) < 1e-5
        assert equal(found, results[0][1])


# --- Groups --------------------------------------------------------------------------------------


def in_groups(rank, size, first=None):
    """Each group trains a model of its own, on batches of its own."""
    alone = rank is None
    group = None if alone else dist.new_subgroups(group_size=size)[0]
    first = first if alone else rank - rank % size
    torch.manual_seed(first)
    model = Model()
    opt = clipped(model, process_group=group)
    for t in range(STEPS):
        batch = batches()[(t + first) % STEPS]
        x, y = batch if alone else slices(batch, rank - first, size)
        opt.zero_grad()
        opt.backward(losses_of(model(x), y))
        opt.step()
    return copies(model.parameters())


@pytest.mark.parametrize("size", [1, 2])
def test_groups_train_models_of_their_own(four_ranks: Ranks, size: int) -> None:
    results = four_ranks.run(in_groups, size)
    for first in range(0, 4, size):
        expected = in_groups(None, size, first)
        for found in results[first : first + size]:
            assert equal(found, results[first])
            assert relative(found, expected) < 1e-5


def copied_with_a_group(rank):
    opt = clipped(Model(), process_group=dist.new_subgroups(group_size=1)[0])
    assert copy.deepcopy(opt)._core.group.group is opt._core.group.group
    return pickle.dumps(opt)


def test_a_group_is_copied_along_but_not_pickled(two_ranks: Ranks) -> None:
    for found in two_ranks.outcomes(copied_with_a_group):
        assert isinstance(found.error, TypeError)
        assert "Save its state_dict() instead" in str(found.error)


# --- The rest of a training loop -----------------------------------------------------------------


def with_lbfgs(rank, number):
    torch.manual_seed(0)
    model = Model().double()
    opt = CAGradClip(torch.optim.LBFGS(model.parameters(), lr=0.05, max_iter=5), WEIGHTS)
    for batch in batches(8):
        x, y = (z.double() for z in slices(batch, rank, number))

        def closure(x=x, y=y):
            opt.zero_grad()
            return losses_of(model(x), y)

        opt.step(closure)
    return copies(model.parameters())


def test_lbfgs_evaluates_the_joint_losses(two_ranks: Ranks) -> None:
    results = two_ranks.run(with_lbfgs, 2)
    for found in results:
        assert equal(found, results[0])
        assert relative(found, with_lbfgs(0, 1)) < 1e-7


def renewed(rank, number, kind):
    """Trains with a schedule; model and optimizer are replaced by copies in the middle."""
    torch.manual_seed(0)
    model = Model()
    opt = clipped(model, gram_every=2)
    scheduler = torch.optim.lr_scheduler.ExponentialLR(opt, 0.9)
    wrap = ddp if number > 1 else unwrapped
    wrapped = wrap(model)
    for t in range(8):
        x, y = slices(batches()[t], rank, number)
        opt.zero_grad()
        opt.backward(losses_of(wrapped(x), y))
        opt.step()
        scheduler.step()
        if t == 3 and kind is not None:
            if kind == "copied":
                model, opt = copy.deepcopy((model, opt))
            elif kind == "pickled":
                model, opt = pickle.loads(pickle.dumps((model, opt)))
            else:
                state, model = copy.deepcopy(opt.state_dict()), copy.deepcopy(model)
                opt = clipped(model, gram_every=2)
                opt.load_state_dict(state)
            wrapped = wrap(model)
            schedule = scheduler.state_dict()
            scheduler = torch.optim.lr_scheduler.ExponentialLR(opt, 0.9, last_epoch=4)
            scheduler.load_state_dict(schedule)
            opt.param_groups[0]["lr"] = scheduler.get_last_lr()[0]
    return copies(model.parameters()), opt.param_groups[0]["lr"]


def test_schedules_and_copies_go_on_as_if_uninterrupted(two_ranks: Ranks) -> None:
    expected, rate = renewed(0, 1, None)
    uninterrupted, _ = two_ranks.run(renewed, 2, None)[0]
    assert relative(uninterrupted, expected) < 1e-5
    for kind in ("copied", "pickled", "resumed"):
        for found, found_rate in two_ranks.run(renewed, 2, kind):
            assert found_rate == rate
            assert equal(found, uninterrupted)
