"""What goes wrong in one process: an error in all of them that names it, and nothing is changed."""

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
from tests.ranks import Ranks, slices
from tests.test_replicated import WEIGHTS, Model, batches, equal, losses_of, relative

BAD = 1  # the process in which it goes wrong


@pytest.fixture(scope="module")
def two_ranks() -> Iterator[Ranks]:
    """Not those of other tests, which a group that a failure left out of step would take along."""
    with Ranks(2, seconds=20) as ranks:
        yield ranks


class InfiniteGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        return grad * float("inf")


# --- Faults: each is given what a training loop has at hand, and calls `backward` ----------------


def nan_loss(opt, model, losses, rank):
    opt.backward(losses | {"b": losses["b"] * float("nan")} if rank == BAD else losses)


def two_losses(opt, model, losses, rank):
    """Here the one, there the other."""
    name = "cb"[rank]
    opt.backward(losses | {name: losses[name] / 0})


def infinite_gradient(opt, model, losses, rank):
    opt.backward(losses | {"b": InfiniteGradient.apply(losses["b"])} if rank == BAD else losses)


def raises_in_a_callable(opt, model, losses, rank):
    x, y = batches()[1]

    def b():
        return losses_of(model(x), y)["b"] if rank != BAD else 1 / 0

    opt.backward({"a": lambda: losses_of(model(x), y)["a"], "b": b, "c": losses["c"]})


def raises_in_the_pass(opt, model, losses, rank):
    if rank == BAD:
        torch.autograd.grad(losses["b"], model.heads["b"].weight)  # frees the graph
    opt.backward(losses)


def reaches_nothing(opt, model, losses, rank):
    other = nn.Parameter(torch.ones(()))
    opt.backward(losses | {"c": other * 2} if rank == BAD else losses)


def too_few(opt, model, losses, rank):
    if rank == BAD:
        losses.pop("c")
    opt.backward(losses)


def all_absent(opt, model, losses, rank):
    opt.backward(dict.fromkeys(losses))


def raises_in_the_one_pass(opt, model, losses, rank):
    """It serves all losses, and the first of them is sent after it."""
    torch.manual_seed(0)
    net = nn.Linear(3, 1)
    z = net(torch.ones(4, 3))[:, 0]
    if rank == BAD:
        z.register_hook(lambda _: 1 / 0)
    inner = torch.optim.SGD(net.parameters(), 0.1)
    theirs = CAGradClip(inner, [0.5, 0.5], gradients="per_example", model=net)
    theirs.backward([z.sum(), z.square().sum()], scalars=z)


def other_weights(opt, model, losses, rank):
    before = opt.weights
    if rank == BAD:
        opt.weights = {"a": 0.25, "b": 0.25, "c": 0.5}
    try:
        opt.backward(losses)
    finally:
        opt.weights = before


def other_radius(opt, model, losses, rank):
    opt.c = 0.4 + 0.1 * rank
    try:
        opt.backward(losses)
    finally:
        opt.c = 0.4


def again(opt, losses, **settings):
    CAGradClip(opt.optimizer, WEIGHTS, **settings).backward(losses)


def other_mode(opt, model, losses, rank):
    again(opt, losses, gradients="ghost" if rank == BAD else "dense")


def other_schedule(opt, model, losses, rank):
    again(opt, losses, gram_every=1 + rank)


def other_shared(opt, model, losses, rank):
    again(opt, losses, shared_parameters=model.trunk.parameters() if rank == BAD else None)


def other_layer(opt, model, losses, rank):
    again(opt, losses, gradients=model.trunk[2 * rank].parameters())


def resumed_here_alone(opt, model, losses, rank):
    mine, other = (CAGradClip(opt.optimizer, WEIGHTS, gram_every=3) for _ in range(2))
    gradients = [p.grad.clone() for p in model.parameters()]
    mine.backward(losses_of(model(batches()[1][0]), batches()[1][1]))
    for p, g in zip(model.parameters(), gradients, strict=True):
        p.grad.copy_(g)
    if rank == BAD:
        other.load_state_dict(mine.state_dict())
    other.backward(losses)


def fails_in_the_rule(opt, model, losses, rank):
    def rule(gram):
        return gram.diagonal() / (1 / 0 if rank == BAD else 1.0)

    MultiObjectiveOptimizer(opt.optimizer, rule).backward(losses)


def other_handling(opt, model, losses, rank):
    again(opt, losses, nonfinite="skip" if rank == BAD else "raise")


def other_absent(opt, model, losses, rank):
    again(opt, losses | {"c": None} if rank == BAD else losses, gram_every=2)


def other_number(opt, model, losses, rank):
    MGDA(opt.optimizer).backward(list(losses.values())[rank:])


def frozen(opt, model, losses, rank):
    model.trunk[0].bias.requires_grad_(rank != BAD)
    try:
        opt.backward(losses)
    finally:
        model.trunk[0].bias.requires_grad_(True)


def other_values(opt, model, losses, rank):
    """In a new optimizer: the values are compared by its first backward, also if that fails."""
    theirs = CAGradClip(opt.optimizer, WEIGHTS)
    with torch.no_grad():
        kept = model.trunk[0].bias.clone()
        model.trunk[0].bias[0] += 1e-7 * rank
    try:
        with pytest.raises((ValueError, RuntimeError)):
            too_few(theirs, model, dict(losses), rank)
        theirs.backward(losses)
    finally:
        with torch.no_grad():
            model.trunk[0].bias.copy_(kept)


def other_values_after_micro_batches(opt, model, losses, rank):
    theirs = CAGradClip(torch.optim.SGD([x := nn.Parameter(torch.ones(3) * rank)], 0.1), [1.0])
    for _ in range(rank):
        theirs.backward([x.sum()], accumulate=True)
    theirs.backward([x.sum()])


def other_device(opt, model, losses, rank):
    x = nn.Parameter(torch.ones(3, device="meta" if rank == BAD else "cpu"))
    CAGradClip(torch.optim.SGD([x], 0.1), [0.5, 0.5]).backward([x.sum(), x.prod()])


def other_dtype(opt, model, losses, rank):
    x = nn.Parameter(torch.ones(3, dtype=torch.float64 if rank == BAD else torch.float32))
    CAGradClip(torch.optim.SGD([x], 0.1), [0.5, 0.5]).backward([x.sum(), x.prod()])


def other_form(opt, model, losses, rank):
    x = nn.Parameter(torch.ones(3, 2) if rank == BAD else torch.ones(2, 3))
    CAGradClip(torch.optim.SGD([x], 0.1), [0.5, 0.5]).backward([x.sum(), x.prod()])


def not_sent_from_here(opt, model, losses, rank):
    group = dist.new_group(backend="cuda:gloo")
    again(opt, losses, process_group=group)


def outside_of_the_group(opt, model, losses, rank):
    group = dist.new_group([1 - BAD])
    if rank == BAD:
        again(opt, losses, process_group=group)
    raise TypeError("contains this process; got one that does not")  # there is nothing wrong here


# Fault -> the error everywhere, or here and elsewhere, and what it says.
FAULTS = {
    nan_loss: (FloatingPointError, "loss 'b' is NaN or Inf on rank 1. "),
    two_losses: (FloatingPointError, "loss 'b' is NaN or Inf on rank 1. "),
    infinite_gradient: (FloatingPointError, "the gradient of loss 'b' is NaN or Inf"),
    raises_in_a_callable: (ZeroDivisionError, "rank 1: ZeroDivisionError: division by zero"),
    raises_in_the_one_pass: (ZeroDivisionError, "rank 1: ZeroDivisionError: division by zero"),
    raises_in_the_pass: (RuntimeError, "The backward pass of loss 'b' raised this."),
    reaches_nothing: (ValueError, "loss 'c' must depend on a parameter of the optimizer"),
    too_few: (ValueError, "got the names ['a', 'b']"),
    all_absent: (ValueError, "`losses` must hold at least one loss; got None for all of them."),
    other_weights: (ValueError, "`weights` must be the same in all processes; got {'a': 0.5,"),
    other_radius: (ValueError, "`c` must be the same in all processes; got 0.4 on rank 0, 0.5 on"),
    other_mode: (ValueError, "`gradients` must be the same in all processes; got 'dense' on"),
    other_schedule: (ValueError, "`gram_every` must be the same in all processes; got 1 on"),
    other_shared: (ValueError, "`shared_parameters` must be the same in all processes; got 'all'"),
    other_layer: (ValueError, "parameters in `gradients` must be the same in all processes; got"),
    resumed_here_alone: (ValueError, "whether the Gram matrix is due must be the same in all"),
    fails_in_the_rule: (ZeroDivisionError, "rank 1: ZeroDivisionError: division by zero"),
    other_handling: (ValueError, "`nonfinite` must be the same in all processes; got 'raise' on"),
    other_absent: (ValueError, "`losses` (None if absent) must be the same in all processes"),
    other_number: (ValueError, "`losses` (None if absent) must be the same in all processes"),
    frozen: (ValueError, "the parameters must be the same in all processes; got '10 with 341"),
    other_values: (ValueError, "wrap it in DistributedDataParallel before building the optimizer"),
    other_values_after_micro_batches: (ValueError, "pass the processes of one model as"),
    other_device: (ValueError, "torch.float32 on cpu' on rank 0, '1 with 3 numbers, torch.float32"),
    other_dtype: (ValueError, "torch.float32 on cpu' on rank 0, '1 with 3 numbers, torch.float64"),
    other_form: (ValueError, "the values of the parameters must be the same in all processes"),
    not_sent_from_here: (ValueError, "got parameters on cpu and a group of cuda:gloo. "),
    outside_of_the_group: (TypeError, "contains this process; got one that does not"),
}


def state_of(opt, model):
    """Copies of everything that a failed backward must leave alone."""
    parameters = [p.detach().clone() for p in model.parameters()]
    gradients = [p.grad.clone() for p in model.parameters()]
    inner = [x for p in model.parameters() for x in opt.state[p].values()]
    return parameters + gradients + copy.deepcopy(inner), opt.report.skipped


def interrupted(rank, number, fault):
    """A step, a fault, a step; returns what was raised, whether nothing changed, and the end."""
    torch.manual_seed(0)
    model = Model()
    opt = CAGradClip(torch.optim.AdamW(model.parameters(), lr=1e-2), WEIGHTS, c=0.4)
    raised, kept = None, True
    for t in range(3):
        x, y = batches()[t] if rank is None else slices(batches()[t], rank, number)
        losses = losses_of(model(x), y)
        if t == 1 and rank is not None:
            before, skipped = state_of(opt, model)
            try:
                fault(opt, model, dict(losses), rank)
            except Exception as error:
                raised = type(error), " ".join([str(error), *getattr(error, "__notes__", [])])
            after, skipped_now = state_of(opt, model)
            kept = equal(before, after) and skipped == skipped_now
        elif t != 1:
            opt.zero_grad()
            opt.backward(losses)
            opt.step()
    return raised, kept, [p.detach() for p in model.parameters()]


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.__name__)
def test_error_in_one_process_is_one_in_all(two_ranks: Ranks, fault) -> None:
    kind, text = FAULTS[fault]
    results = two_ranks.run(interrupted, 2, fault)
    expected = interrupted(None, 1, None)[2]
    kinds = [raised[0] for raised, _, _ in results]
    assert kinds[BAD] is kind
    assert kinds[1 - BAD] in (kind, RuntimeError)
    for rank, (raised, kept, found) in enumerate(results):
        assert kept
        assert equal(found, results[0][2])
        assert relative(found, expected) < 1e-5
        if rank == BAD and kind is ZeroDivisionError:
            assert "division by zero" in raised[1]
        else:
            assert text in raised[1]
    if kinds[1 - BAD] is RuntimeError and kind is not RuntimeError:
        assert "another process failed; nothing was changed here. rank 1: " in results[0][0][1]


def in_the_second_pair(rank):
    """What the processes 2 and 3 raise, a group of their own; the others train on."""
    model = Model()
    for p in model.parameters():
        nn.init.ones_(p)
    group = dist.new_subgroups(group_size=2)[0]
    adamw = torch.optim.AdamW(model.parameters(), lr=1e-2)
    opt = CAGradClip(adamw, WEIGHTS, c=0.4, process_group=group)
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


def test_processes_are_called_as_the_launcher_calls_them(four_ranks: Ranks) -> None:
    first, second, third, _ = four_ranks.run(in_the_second_pair)
    assert first == second == []
    nan, in_callable, radius, few = third
    assert "loss 'b' is NaN or Inf on rank 3. " in nan
    assert "rank 3: ZeroDivisionError: division by zero" in in_callable
    assert "got 0.4 on rank 2, 0.5 on rank 3. " in radius
    assert "rank 3: ValueError: `losses` must be" in few


def mended(rank, what):
    """Calls with something that differs, what differed put right, and the next call."""
    rows = (1 + rank) * torch.tensor([[1.0, 2.0, 3.0, 4.0], [0.0, 1.0, 0.0, -1.0]])
    opt = CAGradClip(torch.optim.SGD([nn.Parameter(torch.ones(4))], 0.1), [0.5, 0.5], c=0.0)
    if what == "values":  # which the first call compares
        opt.param_groups[0]["params"][0].data += rank
    else:
        opt.backward(rows @ opt.param_groups[0]["params"][0])
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
def test_once_it_is_mended_the_next_call_succeeds(two_ranks: Ranks, what, text) -> None:
    expected = 1.5 * 0.5 * torch.tensor([1.0, 3.0, 3.0, 3.0])
    for raised, (first, *others) in two_ranks.run(mended, what):
        assert [t for t, _ in raised] == ([] if text is None else [0])
        assert all(message.startswith(text) for _, message in raised)
        assert (first is None) == (text is not None)
        for grad in others if text else [first, *others]:
            assert torch.equal(grad, expected)


def not_mended(rank):
    x = nn.Parameter(torch.ones(4) * rank)
    opt = CAGradClip(torch.optim.SGD([x], 0.1), [0.5, 0.5])
    with pytest.raises(ValueError, match="the values of the parameters"):
        opt.backward([x.sum(), x[0]])
    opt.backward([x.sum(), x[0]])


def test_what_is_not_mended_is_refused_again(two_ranks: Ranks) -> None:
    for found in two_ranks.outcomes(not_mended):
        assert isinstance(found.error, ValueError)
        assert "the values of the parameters must be the same" in str(found.error)


def copied_and_moved(rank):
    """A copy in one process makes all of them compare the values again."""
    x = nn.Parameter(torch.ones(4))
    opt = CAGradClip(torch.optim.SGD([x], 0.1), [0.5, 0.5], c=0.0)
    opt.backward([x.sum(), x[0]])
    opt = copy.deepcopy(opt) if rank == BAD else opt
    (x,) = opt.param_groups[0]["params"]
    opt.backward([x.sum(), x[0]])
    x.data += rank
    opt.backward([x.sum(), x[0]])


def test_values_are_compared_again_after_a_copy(two_ranks: Ranks) -> None:
    for found in two_ranks.outcomes(copied_and_moved):
        assert isinstance(found.error, ValueError)
        assert "the values of the parameters must be the same" in str(found.error)


def drawn_at_random(rank):
    torch.manual_seed(rank)
    x = nn.Parameter(torch.zeros(4))

    def rule(gram):
        return torch.rand(len(gram), dtype=torch.float64)

    opt = MultiObjectiveOptimizer(torch.optim.SGD([x], lr=1.0), rule)
    opt.backward([x.sum(), 2 * x.sum()])
    return x.grad, opt.report.coefficients


def test_a_rule_that_draws_at_random_draws_once_for_all(two_ranks: Ranks) -> None:
    (grad, alpha), (other, theirs) = two_ranks.run(drawn_at_random)
    assert torch.equal(alpha, theirs)
    assert torch.equal(grad, other)
    assert torch.allclose(grad.double(), (alpha[0] + 2 * alpha[1]).expand(4))


def asked_for_the_first_ones_coefficients(rank):
    x = nn.Parameter(torch.zeros(4))
    asked = []
    for method in (
        MGDA,
        partial(LinearScalarization, weights=[0.5, 0.5]),
        partial(CAGradClip, weights=[0.5, 0.5]),
        partial(MultiObjectiveOptimizer, rule=lambda gram: min_norm_point(gram).p),
    ):
        opt = method(torch.optim.SGD([x]))
        group = opt._core.group
        with mock.patch.object(
            group, "broadcast_from_first", wraps=group.broadcast_from_first
        ) as broadcast:
            opt.backward([x.sum(), 2 * x[0]])
        asked.append(broadcast.called)
    return asked


def test_rules_of_the_library_send_no_coefficients(two_ranks: Ranks) -> None:
    assert two_ranks.run(asked_for_the_first_ones_coefficients) == [[False] * 3 + [True]] * 2


class Held:
    """Stands for the graph that a callable holds."""


def what_is_left(rank):
    torch.manual_seed(0)
    model = Model()
    opt = CAGradClip(torch.optim.AdamW(model.parameters(), lr=1e-2), WEIGHTS, c=0.4)
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
    assert two_ranks.run(what_is_left) == [True, True]


def leaves_out(rank, number, fault):
    """A step with nonfinite="skip" while something is NaN in one process."""
    torch.manual_seed(0)
    model = Model()
    opt = CAGradClip(torch.optim.AdamW(model.parameters(), lr=1e-2), WEIGHTS, nonfinite="skip")
    for t in range(3):
        x, y = batches()[t] if rank is None else slices(batches()[t], rank, number)
        losses = losses_of(model(x), y)
        opt.zero_grad()
        if t == 1 and rank is not None:
            fault(opt, model, losses, rank)
            assert all(p.grad is None for p in model.parameters())
        elif t != 1:
            opt.backward(losses)
        opt.step()
    return [p.detach() for p in model.parameters()], opt.report.skipped


@pytest.mark.parametrize("fault", [nan_loss, infinite_gradient], ids=lambda fault: fault.__name__)
def test_what_is_not_finite_in_one_process_is_left_out_in_all(two_ranks: Ranks, fault) -> None:
    expected, _ = leaves_out(None, 1, None)
    results = two_ranks.run(leaves_out, 2, fault)
    for found, skipped in results:
        assert skipped == 1
        assert equal(found, results[0][0])
        assert relative(found, expected) < 1e-5


# --- A process that is gone ----------------------------------------------------------------------


def end(how):
    if how == "killed":
        os.kill(os.getpid(), signal.SIGKILL)
    os.kill(os.getpid(), signal.SIGSTOP)


def left_alone(rank, number, how, when):
    """A step; then one process ends, and the others are to hear of it in the next backward."""
    torch.manual_seed(0)
    model = Model()
    opt = CAGradClip(torch.optim.AdamW(model.parameters(), lr=1e-2), WEIGHTS)
    x, y = slices(batches()[0], rank, number)
    opt.backward(losses_of(model(x), y))
    opt.step()
    before, _ = state_of(opt, model)

    def b():
        if rank == BAD:
            end(how)
        return losses_of(model(x), y)["b"]

    losses = losses_of(model(x), y)
    if when == "in a pass":
        losses = {"a": lambda: losses_of(model(x), y)["a"], "b": b, "c": losses["c"]}
    elif how == "finished":
        if rank == BAD:
            return None
    elif rank == BAD:
        end(how)
    try:
        opt.backward(losses)
    except RuntimeError as error:
        after, _ = state_of(opt, model)
        dist.destroy_process_group()  # as at the end of the process, which lets others know
        return equal(before, after), str(error)


def check_all_heard_of_it(results):
    for rank, result in enumerate(results):
        if rank != BAD:
            unchanged, message = result
            assert unchanged
            assert f"rank {rank} lost contact with the other processes" in message
            assert "Restart from the last checkpoint" in message


@pytest.mark.parametrize("number", [2, 4])
@pytest.mark.parametrize("when", ["between steps", "in a pass"])
def test_a_killed_process_ends_the_others(number: int, when: str) -> None:
    with Ranks(number) as ranks:
        check_all_heard_of_it(ranks.outcomes(left_alone, number, "killed", when))
        ranks.processes[BAD].join()
        assert ranks.processes[BAD].exitcode == -signal.SIGKILL


def test_a_process_that_does_not_come_in_time_ends_the_others() -> None:
    cases = [("stopped", "between steps"), ("stopped", "in a pass"), ("finished", "between steps")]
    with contextlib.ExitStack() as stack:
        groups = [stack.enter_context(Ranks(2, seconds=5)) for _ in cases]
        for ranks, (how, when) in zip(groups, cases, strict=True):
            ranks.start(left_alone, 2, how, when)
        for ranks in groups:
            check_all_heard_of_it([ranks.result(1 - BAD), None])
            ranks.processes[BAD].kill()


class OneOfTwo:
    """What `raise_together` needs of a group; the message arrives or not."""

    compared = False

    def __init__(self, arrives: bool) -> None:
        self.arrives = arrives

    def maximum(self, numbers: list[int]) -> list[int]:
        if not self.arrives:
            raise RuntimeError("lost contact")
        return numbers


def test_a_message_that_does_not_arrive_is_an_error_but_hides_no_other() -> None:
    with pytest.raises(RuntimeError, match="lost contact"), raise_together(OneOfTwo(False)):
        pass
    with pytest.raises(KeyError, match="mine"), raise_together(OneOfTwo(False)):
        raise KeyError("mine")


def test_values_count_as_compared_once_they_were() -> None:
    group = OneOfTwo(True)
    for settings, compared in (
        ({}, False),
        ({"the values of the parameters": 1}, True),
        ({}, True),
    ):
        with raise_together(group, settings):
            pass
        assert group.compared is compared
