"""A fault in one process is an error in all of them that names it, and changes nothing."""

from __future__ import annotations

import contextlib
import copy
import gc
import os
import signal
import weakref
from collections.abc import Iterator
from functools import partial
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch import nn

from raco_optim import (
    MGDA,
    CAGradClip,
    LinearScalarization,
    MultiObjectiveOptimizer,
    min_norm_point,
)
from raco_optim.distributed.agreement import raise_together
from tests.problems_nn import infinite, said
from tests.ranks import WEIGHTS, Ranks, equal, losses_of, relative, slices
from tests.test_replicated import Model, batches

BAD = 1  # the rank in which it goes wrong


@pytest.fixture(scope="module")
def two_ranks() -> Iterator[Ranks]:
    """Of their own: a failure may leave a group out of step."""
    with Ranks(2, seconds=20) as ranks:
        yield ranks


def sgd(*parameters):
    return torch.optim.SGD(parameters, 0.1)


def clipped(model, **settings):
    adamw = torch.optim.AdamW(model.parameters(), lr=1e-2)
    return CAGradClip(adamw, WEIGHTS, c=0.4, **settings)


# --- Faults: each gets what a training loop has at hand, and calls `backward` --------------------

FAULTS = {}  # name -> fault, the error in the process at fault, and its text


def says(text, kind=ValueError):
    def register(fault):
        FAULTS[fault.__name__] = fault, kind, text
        return fault

    return register


@says("loss 'b' is NaN or Inf on rank 1. ", FloatingPointError)
def nan_loss(opt, model, losses, rank):
    opt.backward(losses | {"b": losses["b"] * float("nan")} if rank == BAD else losses)


@says("loss 'b' is NaN or Inf on rank 1. ", FloatingPointError)
def another_infinite_loss_in_each(opt, model, losses, rank):
    name = "cb"[rank]
    opt.backward(losses | {name: losses[name] / 0})


@says("the gradient of loss 'b' is NaN or Inf", FloatingPointError)
def infinite_gradient(opt, model, losses, rank):
    opt.backward(losses | {"b": infinite(losses["b"])} if rank == BAD else losses)


@says("rank 1: ZeroDivisionError: division by zero", ZeroDivisionError)
def raises_in_a_callable(opt, model, losses, rank):
    x, y = batches()[1]

    def b():
        return losses_of(model(x), y)["b"] if rank != BAD else 1 / 0

    opt.backward({"a": lambda: losses_of(model(x), y)["a"], "b": b, "c": losses["c"]})


@says("rank 1: ZeroDivisionError: division by zero", ZeroDivisionError)
def raises_in_the_one_pass(opt, model, losses, rank):
    """It serves all losses; the gradients of the first are sent after it."""
    torch.manual_seed(0)
    net = nn.Linear(3, 1)
    z = net(torch.ones(4, 3))[:, 0]
    if rank == BAD:
        z.register_hook(lambda _: 1 / 0)
    theirs = CAGradClip(sgd(*net.parameters()), [0.5, 0.5], gradients="per_example", model=net)
    theirs.backward([z.sum(), z.square().sum()], scalars=z)


@says("rank 1: ZeroDivisionError: division by zero", ZeroDivisionError)
def raises_in_the_rule(opt, model, losses, rank):
    def rule(gram):
        return gram.diagonal() / (1 / 0 if rank == BAD else 1.0)

    MultiObjectiveOptimizer(opt.optimizer, rule).backward(losses)


@says("The backward pass of loss 'b' raised this.", RuntimeError)
def raises_in_the_pass(opt, model, losses, rank):
    if rank == BAD:
        torch.autograd.grad(losses["b"], model.heads["b"].weight)  # frees the graph
    opt.backward(losses)


@says("loss 'c' must depend on a parameter of the optimizer")
def reaches_nothing(opt, model, losses, rank):
    other = nn.Parameter(torch.ones(())) * 2
    opt.backward(losses | {"c": other} if rank == BAD else losses)


@says("got the names ['a', 'b']")
def too_few(opt, model, losses, rank):
    opt.backward({name: losses[name] for name in "abc"[: 3 - (rank == BAD)]})


@says("`losses` must hold at least one loss; got None for all of them.")
def all_absent(opt, model, losses, rank):
    opt.backward(dict.fromkeys(losses))


@says("`losses` (None if absent) must be the same in all processes")
def other_absent(opt, model, losses, rank):
    absent = losses | {"c": None} if rank == BAD else losses
    CAGradClip(opt.optimizer, WEIGHTS, gram_every=2).backward(absent)


@says("`losses` (None if absent) must be the same in all processes")
def other_number(opt, model, losses, rank):
    MGDA(opt.optimizer).backward(list(losses.values())[rank:])


@says("whether the Gram matrix is due must be the same in all")
def resumed_in_one_process(opt, model, losses, rank):
    mine, other = (CAGradClip(opt.optimizer, WEIGHTS, gram_every=3) for _ in range(2))
    gradients = [p.grad.clone() for p in model.parameters()]
    mine.backward(losses_of(model(batches()[1][0]), batches()[1][1]))
    for p, g in zip(model.parameters(), gradients, strict=True):
        p.grad.copy_(g)
    if rank == BAD:
        other.load_state_dict(mine.state_dict())
    other.backward(losses)


@says("the parameters must be the same in all processes; got '10 with 341")
def frozen(opt, model, losses, rank):
    model.trunk[0].bias.requires_grad_(rank != BAD)
    try:
        opt.backward(losses)
    finally:
        model.trunk[0].bias.requires_grad_(True)


@says("wrap it in DistributedDataParallel before building the optimizer")
def other_values(opt, model, losses, rank):
    """Of a new optimizer: its first backward compares the values, also if that fails."""
    theirs = CAGradClip(opt.optimizer, WEIGHTS)
    before = model.trunk[0].bias.detach().clone()
    model.trunk[0].bias.data[0] += 1e-7 * rank
    try:
        with pytest.raises((ValueError, RuntimeError)):
            too_few(theirs, model, losses, rank)
        theirs.backward(losses)
    finally:
        model.trunk[0].bias.data.copy_(before)


@says("pass the processes of one model as")
def other_values_after_micro_batches(opt, model, losses, rank):
    theirs = CAGradClip(sgd(x := nn.Parameter(torch.ones(3) * rank)), [1.0])
    for _ in range(rank):
        theirs.backward([x.sum()], accumulate=True)
    theirs.backward([x.sum()])


@says("contains this process; got one that does not", TypeError)
def outside_of_the_group(opt, model, losses, rank):
    groups = [dist.new_group([number]) for number in range(2)]
    if rank == BAD:
        CAGradClip(opt.optimizer, WEIGHTS, process_group=groups[1 - BAD]).backward(losses)
    raise TypeError("contains this process; got one that does not")  # there is nothing wrong here


def other_attribute(name, value):
    """A setting that one process changes."""

    def fault(opt, model, losses, rank):
        before = getattr(opt, name)
        if rank == BAD:
            setattr(opt, name, value)
        try:
            opt.backward(losses)
        finally:
            setattr(opt, name, before)

    return fault


def built_with(name, setting):
    """A setting that differs, of a new optimizer: a pair, or a function of model and rank."""

    def fault(opt, model, losses, rank):
        mine = setting(model, rank) if callable(setting) else setting[rank]
        CAGradClip(opt.optimizer, WEIGHTS, **{name: mine}).backward(losses)

    return fault


def of_parameters(here, there):
    """Parameters that differ, of an optimizer of their own."""

    def fault(opt, model, losses, rank):
        x = nn.Parameter(torch.ones(**(there if rank == BAD else here)))
        CAGradClip(sgd(x), [0.5, 0.5]).backward([x.sum(), x.prod()])

    return fault


other_radius = other_attribute("c", 0.5)
THREE = {"size": (3,)}
SETTINGS = {
    "`weights` must be the same in all processes; got {'a': 0.5,": other_attribute(
        "weights", {"a": 0.25, "b": 0.25, "c": 0.5}
    ),
    "`c` must be the same in all processes; got 0.4 on rank 0, 0.5 on": other_radius,
    "`gradients` must be the same in all processes; got 'dense' on": built_with(
        "gradients", ["dense", "ghost"]
    ),
    "parameters in `gradients` must be the same in all processes; got": built_with(
        "gradients", lambda model, rank: model.trunk[2 * rank].parameters()
    ),
    "`gram_every` must be the same in all processes; got 1 on": built_with("gram_every", [1, 2]),
    "`nonfinite` must be the same in all processes; got 'raise' on": built_with(
        "nonfinite", ["raise", "skip"]
    ),
    "`shared_parameters` must be the same in all processes; got 'all'": built_with(
        "shared_parameters", lambda model, rank: model.trunk.parameters() if rank else None
    ),
    "got parameters on cpu and a group of cuda:gloo. ": built_with(
        "process_group", lambda model, rank: dist.new_group(backend="cuda:gloo")
    ),
    "torch.float32 on cpu' on rank 0, '1 with 3 numbers, torch.float32": of_parameters(
        THREE, THREE | {"device": "meta"}
    ),
    "torch.float32 on cpu' on rank 0, '1 with 3 numbers, torch.float64": of_parameters(
        THREE, THREE | {"dtype": torch.float64}
    ),
    "the values of the parameters must be the same in all processes": of_parameters(
        {"size": (2, 3)}, {"size": (3, 2)}
    ),
}
FAULTS |= {text: (fault, ValueError, text) for text, fault in SETTINGS.items()}


def state_of(opt, model):
    """Copies of everything that a failed backward must leave alone."""
    parameters = [p.detach().clone() for p in model.parameters()]
    gradients = [p.grad.clone() for p in model.parameters()]
    inner = [x for p in model.parameters() for x in opt.state[p].values()]
    return parameters + gradients + copy.deepcopy(inner), opt.report.skipped


def interrupted(rank, number, name, nonfinite="raise"):
    """A step, a fault, a step; returns the error, what the fault changed, and the parameters."""
    torch.manual_seed(0)
    model = Model()
    opt = clipped(model, nonfinite=nonfinite)
    raised, kept = None, True
    for t in range(3):
        x, y = slices(batches()[t], rank or 0, number)
        losses = losses_of(model(x), y)
        if t != 1:
            opt.zero_grad()
            opt.backward(losses)
            opt.step()
        elif rank is not None:
            before, skipped = state_of(opt, model)
            try:
                FAULTS[name][0](opt, model, dict(losses), rank)
            except Exception as error:
                raised = type(error), said(error)
            after, skipped_now = state_of(opt, model)
            kept = equal(before, after) and skipped == skipped_now
    return raised, kept, [p.detach() for p in model.parameters()]


@pytest.fixture(scope="module")
def uninterrupted():
    """The parameters of one process without a fault."""
    return interrupted(None, 1, None)[2]


@pytest.mark.parametrize("name", FAULTS)
def test_an_error_in_one_process_is_one_in_all(two_ranks: Ranks, name, uninterrupted) -> None:
    _, kind, text = FAULTS[name]
    results = two_ranks.run(interrupted, 2, name)
    kinds = [raised[0] for raised, _, _ in results]
    assert kinds[BAD] is kind
    assert kinds[1 - BAD] in (kind, RuntimeError)
    for rank, (raised, kept, found) in enumerate(results):
        assert kept
        assert equal(found, results[0][2])
        assert relative(found, uninterrupted) < 1e-5
        of_its_own = rank == BAD and kind is ZeroDivisionError
        assert ("division by zero" if of_its_own else text) in raised[1]
    if kinds[1 - BAD] is RuntimeError and kind is not RuntimeError:
        assert "another process failed; nothing was changed here. rank 1: " in results[0][0][1]


def left_out(rank, name):
    """As `interrupted`, with nonfinite="skip": the step is left out in all processes."""
    torch.manual_seed(0)
    model = Model()
    opt = clipped(model, nonfinite="skip")
    for t in range(3):
        losses = losses_of(model((batch := slices(batches()[t], rank, 2))[0]), batch[1])
        opt.zero_grad()
        if t == 1:
            FAULTS[name][0](opt, model, losses, rank)
            assert all(p.grad is None for p in model.parameters())
        else:
            opt.backward(losses)
        opt.step()
    return [p.detach() for p in model.parameters()], opt.report.skipped


@pytest.mark.parametrize("name", ["nan_loss", "infinite_gradient"])
def test_a_skipped_step_is_skipped_in_all(two_ranks: Ranks, name, uninterrupted) -> None:
    results = two_ranks.run(left_out, name)
    for found, skipped in results:
        assert skipped == 1
        assert equal(found, results[0][0])
        assert relative(found, uninterrupted) < 1e-5


def in_the_second_pair(rank):
    """Ranks 2 and 3, a group of their own, fail; the others train on."""
    model = Model()
    for p in model.parameters():
        nn.init.ones_(p)
    opt = clipped(model, process_group=dist.new_subgroups(group_size=2)[0])
    raised = []
    for fault in (nan_loss, raises_in_a_callable, other_radius, too_few):
        losses = losses_of(model(batches()[0][0]), batches()[0][1])
        try:
            if rank < 2:
                opt.backward(losses)
            else:
                fault(opt, model, losses, rank - 2)
        except Exception as error:
            raised.append(str(error))
    return raised


def test_errors_name_the_ranks_of_the_launcher(four_ranks: Ranks) -> None:
    first, second, third, _ = four_ranks.run(in_the_second_pair)
    assert first == second == []
    nan, in_callable, radius, few = third
    assert "loss 'b' is NaN or Inf on rank 3. " in nan
    assert "rank 3: ZeroDivisionError: division by zero" in in_callable
    assert "got 0.4 on rank 2, 0.5 on rank 3. " in radius
    assert "rank 3: ValueError: `losses` must be" in few


def mended(rank, what):
    """A call with something that differs between processes, and two without."""
    rows = (1 + rank) * torch.tensor([[1.0, 2.0, 3.0, 4.0], [0.0, 1.0, 0.0, -1.0]])
    x = nn.Parameter(torch.ones(4))
    opt = CAGradClip(sgd(x), [0.5, 0.5], c=0.0)
    if what == "values":  # which the first call compares
        x.data += rank
    else:
        opt.backward(rows @ x)
    if what == "radius":
        opt.c = 0.1 * rank
    elif what == "copied" and rank == BAD:
        opt = copy.deepcopy(opt)  # which has compared no values yet
    (x,) = opt.param_groups[0]["params"]
    raised, grads = [], []
    for t in range(3):
        opt.zero_grad()
        try:
            opt.backward(rows @ x)
        except ValueError as error:
            raised.append((t, str(error)))
        grads.append(x.grad)
        opt.c = 0.0
        x.data.fill_(1.0)
    return raised, grads


@pytest.mark.parametrize(
    ("what", "text"), [("radius", "`c` must"), ("values", "the values of"), ("copied", None)]
)
def test_the_next_call_succeeds_once_the_fault_is_mended(two_ranks: Ranks, what, text) -> None:
    expected = 1.5 * 0.5 * torch.tensor([1.0, 3.0, 3.0, 3.0])
    for raised, (first, *others) in two_ranks.run(mended, what):
        assert [t for t, _ in raised] == ([] if text is None else [0])
        assert all(message.startswith(text) for _, message in raised)
        assert (first is None) == (text is not None)
        for grad in others if text else [first, *others]:
            assert torch.equal(grad, expected)


def not_mended(rank, copied):
    """Other values are refused in every call; a copy in one process makes all compare again."""
    x = nn.Parameter(torch.ones(4) * (1 if copied else rank))
    opt = CAGradClip(sgd(x), [0.5, 0.5], c=0.0)
    if copied:
        opt.backward([x.sum(), x[0]])
        opt = copy.deepcopy(opt) if rank == BAD else opt
        (x,) = opt.param_groups[0]["params"]
        opt.backward([x.sum(), x[0]])
        x.data += rank
    else:
        with pytest.raises(ValueError, match="the values of the parameters"):
            opt.backward([x.sum(), x[0]])
    opt.backward([x.sum(), x[0]])


@pytest.mark.parametrize("copied", [False, True])
def test_other_values_are_refused_again(two_ranks: Ranks, copied) -> None:
    for found in two_ranks.outcomes(not_mended, copied):
        assert isinstance(found.error, ValueError)
        assert "the values of the parameters must be the same" in str(found.error)


def broadcasts(rank):
    """Whether the coefficients of a rule were sent."""
    x = nn.Parameter(torch.zeros(4))
    sent = []
    for method in (
        MGDA,
        partial(LinearScalarization, weights=[0.5, 0.5]),
        partial(CAGradClip, weights=[0.5, 0.5]),
        partial(MultiObjectiveOptimizer, rule=lambda gram: min_norm_point(gram).p),
    ):
        opt = method(sgd(x))
        group, name = opt._core.group, "broadcast_from_first"
        with mock.patch.object(group, name, wraps=getattr(group, name)) as broadcast:
            opt.backward([x.sum(), 2 * x[0]])
        sent.append(broadcast.called)
    return sent


def test_rules_of_the_library_send_no_coefficients(two_ranks: Ranks) -> None:
    assert two_ranks.run(broadcasts) == [[False] * 3 + [True]] * 2


class Held:
    """Stands for the graph that a callable holds."""


def is_freed(rank):
    torch.manual_seed(0)
    model = Model()
    opt = clipped(model)
    held = Held()
    left = weakref.ref(held)

    def b(held=held):
        return 1 / 0 if rank == BAD else losses_of(model(batches()[0][0]), batches()[0][1])["b"]

    gc.collect()
    gc.disable()  # memory of an accelerator is to be free at once
    try:
        with pytest.raises((ZeroDivisionError, RuntimeError)):
            opt.backward({"a": None, "b": b, "c": None})
        del b, held
        return left() is None
    finally:
        gc.enable()


def test_an_error_that_was_caught_keeps_no_graph(two_ranks: Ranks) -> None:
    assert two_ranks.run(is_freed) == [True, True]


# --- A process that is gone ----------------------------------------------------------------------

SIGNALS = {"killed": signal.SIGKILL, "stopped": signal.SIGSTOP}


def left_alone(rank, number, how, in_a_pass):
    """A step; then one process ends, and the others hear of it in the next backward."""
    torch.manual_seed(0)
    model = Model()
    opt = clipped(model)
    x, y = slices(batches()[0], rank, number)
    opt.backward(losses_of(model(x), y))
    opt.step()
    before, _ = state_of(opt, model)
    losses = losses_of(model(x), y)
    if rank == BAD and how == "finished":
        return None

    def b():
        if rank == BAD:
            os.kill(os.getpid(), SIGNALS[how])
        return losses_of(model(x), y)["b"]

    if in_a_pass:
        losses = {"a": lambda: losses_of(model(x), y)["a"], "b": b, "c": losses["c"]}
    else:
        b()
    try:
        opt.backward(losses)
    except RuntimeError as error:
        after, _ = state_of(opt, model)
        dist.destroy_process_group()  # as at the end of the process, which lets others know
        return equal(before, after), str(error)


GONE = [
    (2, "killed", False),
    (4, "killed", True),
    (2, "stopped", False),
    (2, "stopped", True),
    (2, "finished", False),
]


def test_a_process_that_is_gone_ends_the_others() -> None:
    with contextlib.ExitStack() as stack:
        groups = [stack.enter_context(Ranks(n, 60 if k == "killed" else 5)) for n, k, _ in GONE]
        for ranks, case in zip(groups, GONE, strict=True):
            ranks.start(left_alone, *case)
        for ranks, (number, how, in_a_pass) in zip(groups, GONE, strict=True):
            for rank in set(range(number)) - {BAD}:
                unchanged, message = ranks.result(rank)
                assert unchanged, (number, how, in_a_pass)
                assert f"rank {rank} lost contact with the other processes" in message
                assert "Restart from the last checkpoint" in message
            if how == "killed":
                ranks.processes[BAD].join()
                assert ranks.processes[BAD].exitcode == -signal.SIGKILL
            ranks.processes[BAD].kill()


class Silent:
    """A group for `raise_together` that loses every message."""

    def maximum(self, numbers: list[int]) -> list[int]:
        raise RuntimeError("lost contact")


def test_a_message_that_does_not_arrive_is_an_error_but_hides_no_other() -> None:
    with pytest.raises(RuntimeError, match="lost contact"), raise_together(Silent()):
        pass
    with pytest.raises(KeyError, match="mine"), raise_together(Silent()):
        raise KeyError("mine")
