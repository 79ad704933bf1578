"""Micro-batches: the gradients of each loss are summed first, and combined once.

`test_random_steps` holds the sums to formulas: with absent losses, heads, frozen parameters and
parameters that some micro-batches do not use.
"""

import math

import pytest
import torch
from torch import nn

from raco_optim import MGDA, CAGradClip, MultiObjectiveOptimizer
from tests.problems_nn import (
    NAMES,
    WRAPPERS,
    Buffered,
    as_asked,
    batch,
    everything,
    flat_grad,
    inverse_norms,
    network,
    two_losses,
)

DOUBLE = torch.float64
MICRO = 4


def wrapped(model, wrap=WRAPPERS["CAGradClip"]):
    return wrap(torch.optim.AdamW(model.parameters(), lr=0.05))


def losses_of(model, t):
    return two_losses(model, batch(t, dtype=DOUBLE))


def of_sgd(*parameters, **options):
    return CAGradClip(torch.optim.SGD(parameters, 0.1), [0.5, 0.5], **options)


@pytest.mark.parametrize("wrap", WRAPPERS.values(), ids=WRAPPERS)
@pytest.mark.parametrize("as_callables", [False, True], ids=["tensors", "callables"])
def test_four_micro_batches_equal_one_batch_of_four(wrap, as_callables):
    whole, parts = network(DOUBLE), network(DOUBLE)
    opt, micro_opt = wrapped(whole, wrap), wrapped(parts, wrap)
    x = batch(0, 8 * MICRO, DOUBLE)
    for _ in range(3):
        opt.zero_grad()
        opt.backward(as_asked(opt, two_losses(whole, x)))
        opt.step()
        micro_opt.zero_grad()
        for k, part in enumerate(x.chunk(MICRO)):

            def mean(i, part=part):
                return two_losses(parts, part)[i] / MICRO

            losses = [lambda: mean(0), lambda: mean(1)] if as_callables else [mean(0), mean(1)]
            micro_opt.backward(as_asked(micro_opt, losses), accumulate=k < MICRO - 1)
        micro_opt.step()
        for name in ("gram", "losses", "coefficients"):
            torch.testing.assert_close(getattr(micro_opt.report, name), getattr(opt.report, name))
    torch.testing.assert_close(dict(parts.named_parameters()), dict(whole.named_parameters()))


def test_nothing_is_written_before_the_last_one_and_then_it_is_added():
    model, fresh = network(DOUBLE), network(DOUBLE)
    opt, other = wrapped(model), wrapped(fresh)
    opt.backward(losses_of(model, 5))
    before, first = everything(model, opt), flat_grad(model)
    for o, m in ((opt, model), (other, fresh)):
        o.backward(losses_of(m, 0), accumulate=True)
        if o is opt:
            assert everything(model, opt) == before
        o.backward(losses_of(m, 1))
    torch.testing.assert_close(flat_grad(model) - first, flat_grad(fresh))


@pytest.mark.parametrize("set_to_none", [True, False])
def test_step_refuses_and_zero_grad_drops_gradients_that_are_not_combined(set_to_none):
    model, fresh = network(DOUBLE), network(DOUBLE)
    opt = wrapped(model)
    opt.backward(losses_of(model, 0), accumulate=True)
    before = everything(model, opt)
    with pytest.raises(RuntimeError, match=r"not combined.*`accumulate=True`.*`zero_grad`"):
        opt.step()
    assert everything(model, opt) == before
    opt.zero_grad(set_to_none=set_to_none)
    opt.backward(losses_of(model, 1))
    wrapped(fresh).backward(losses_of(fresh, 1))
    assert torch.equal(flat_grad(model), flat_grad(fresh))
    opt.step()


NAMED = dict(zip(NAMES, [0.6, 0.4], strict=True))


@pytest.mark.parametrize(
    "make",
    [
        lambda inner: CAGradClip(inner, NAMED),
        lambda inner: MGDA(inner, NAMED),
        MGDA,  # no weights: the first micro-batch gives the names
        lambda inner: MultiObjectiveOptimizer(inner, inverse_norms),
    ],
    ids=["CAGradClip", "MGDA", "MGDA without weights", "rule without weights"],
)
def test_names_are_matched_whatever_their_order(make):
    grads = []
    for flip in (False, True):
        x = nn.Parameter(torch.tensor([1.0, 2.0], dtype=DOUBLE))
        opt = make(torch.optim.SGD([x], 0.1))
        for k in range(2):
            losses = {NAMES[0]: (x[0] + k * x[1]).square(), NAMES[1]: (3 * x[1]).exp()}
            if flip and k:
                losses = dict(reversed(losses.items()))
            opt.backward(losses, accumulate=k == 0)
        assert opt.report.names == NAMES
        grads.append(x.grad)
    torch.testing.assert_close(*grads)


def test_other_names_or_numbers_in_a_later_micro_batch():
    x = nn.Parameter(torch.tensor([1.0, 2.0]))
    opt = MGDA(torch.optim.SGD([x], 0.1))
    opt.backward({"quality": x[0], "length": x[1]}, accumulate=True)
    for later in ({"quality": x[0], "other": x[1]}, {"quality": x[0]}, [x.sum()] * 3):
        with pytest.raises(ValueError, match="`losses` must"):
            opt.backward(later)
        assert x.grad is None
    opt.backward({"quality": x[0], "length": x[1]})
    assert opt.report.losses.tolist() == [2, 4], "the first micro-batch is still there"


def test_parameter_group_added_between_micro_batches():
    x, y = nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(2))
    opt = of_sgd(x, c=0.0)
    opt.backward([x.sum(), y.sum() + x.sum()], accumulate=True)
    opt.add_param_group({"params": [y]})
    opt.backward([x.sum(), y.sum() + x.sum()])
    assert x.grad.tolist() == [2, 2]
    assert y.grad.tolist() == [0.5, 0.5], "counted from when it belonged to the optimizer"


@pytest.mark.parametrize("form", ["tensor", "first callable", "last callable"])
def test_pending_gradients_are_not_the_users_memory(form):
    """A static buffer is refilled for every micro-batch, as CUDA graphs ask for."""
    x, buffer = nn.Parameter(torch.zeros(2)), torch.zeros(2)
    opt = of_sgd(x, c=0.0)

    def refilled(value):
        buffer.fill_(value)
        return Buffered.apply(x, buffer)

    for k in range(4):
        one = lambda k=k: refilled(float(1 + k))  # noqa: E731
        losses = {
            "tensor": lambda one=one, k=k: [one(), None] if k % 2 else [None, one()],
            "first callable": lambda one=one: [one, lambda: x.sum() * 0],
            "last callable": lambda one=one: [None, one],
        }[form]()
        opt.backward(losses, accumulate=k < 3)
        buffer.fill_(1000.0)
    assert x.grad.tolist() == [5, 5], "(1 + 2 + 3 + 4) / 2"
    assert buffer.tolist() == [1000, 1000]


def test_pending_losses_are_not_the_users_memory():
    x = nn.Parameter(torch.ones(2))
    opt = of_sgd(x)
    first, second = x.sum(), x.prod()
    running = first.detach()
    opt.backward([first, second], accumulate=True)
    running += 1000  # a running mean, kept in place
    opt.backward([x.sum(), x.prod()])
    assert opt.report.losses.tolist() == [4, 2]


@pytest.mark.parametrize("bad", range(3))
def test_not_finite_in_one_micro_batch(bad):
    def backward(opt):
        for k in range(3):
            opt.backward([x.sum() * (math.nan if k == bad else 1), x.prod()], accumulate=k < 2)

    x = nn.Parameter(torch.ones(2))
    opt = CAGradClip(torch.optim.SGD([x], 0.1, momentum=0.9), [0.5, 0.5], nonfinite="skip")
    backward(opt)
    opt.step()
    assert x.tolist() == [1, 1]
    assert opt.report.skipped == 1
    assert not opt.state

    opt = of_sgd(x)
    with pytest.raises(FloatingPointError, match="loss '0'"):
        backward(opt)
    assert x.grad is None
    opt.zero_grad()
    opt.backward([x.sum(), x.prod()])
    opt.step()
    assert x[0] < 1
