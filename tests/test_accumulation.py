"""Micro-batches: the gradients of each loss are summed first, and combined once."""

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
    bits,
    clipped_alpha,
    everything,
    flat_grad,
    inverse_norms,
    jacobian,
    network,
    two_losses,
)

DOUBLE = torch.float64
MICRO = 4


def wrapped(model, wrap=WRAPPERS["CAGradClip"]):
    return wrap(torch.optim.AdamW(model.parameters(), lr=0.05))


def micro_batches():
    return batch(0, 8 * MICRO, DOUBLE).chunk(MICRO)


@pytest.mark.parametrize("wrap", WRAPPERS.values(), ids=WRAPPERS)
@pytest.mark.parametrize("as_callables", [False, True], ids=["tensors", "callables"])
def test_four_micro_batches_equal_one_batch_of_four(wrap, as_callables):
    whole, parts = network(DOUBLE), network(DOUBLE)
    opt, micro_opt = wrapped(whole, wrap), wrapped(parts, wrap)
    for _ in range(3):
        opt.zero_grad()
        opt.backward(as_asked(opt, two_losses(whole, torch.cat(micro_batches()))))
        opt.step()
        micro_opt.zero_grad()
        for k, x in enumerate(micro_batches()):

            def mean(i, x=x):
                return two_losses(parts, x)[i] / MICRO

            losses = [lambda: mean(0), lambda: mean(1)] if as_callables else [mean(0), mean(1)]
            micro_opt.backward(as_asked(micro_opt, losses), accumulate=k < MICRO - 1)
        micro_opt.step()
        found, expected = micro_opt.report, opt.report
        torch.testing.assert_close(found.gram, expected.gram)
        torch.testing.assert_close(found.losses, expected.losses)
        torch.testing.assert_close(found.coefficients, expected.coefficients)
    torch.testing.assert_close(dict(parts.named_parameters()), dict(whole.named_parameters()))


def test_gram_is_that_of_the_sums_not_the_sum_of_combinations():
    model, weights = network(DOUBLE), [0.6, 0.4]
    opt = wrapped(model)
    rows = [jacobian(model, lambda x=x: two_losses(model, x)) for x in micro_batches()]
    J = sum(rows)
    for k, x in enumerate(micro_batches()):
        opt.backward(two_losses(model, x), accumulate=k < MICRO - 1)
    torch.testing.assert_close(opt.report.gram, J @ J.T)
    combined = clipped_alpha(J, weights, 0.4, "hard") @ J
    torch.testing.assert_close(flat_grad(model), combined, rtol=1e-9, atol=1e-9)
    one_by_one = sum(clipped_alpha(row, weights, 0.4, "hard") @ row for row in rows)
    assert (one_by_one - combined).norm() > 1e-3 * combined.norm()


def test_nothing_is_written_before_the_last_one_and_then_it_is_added():
    model = network(DOUBLE)
    opt = wrapped(model)
    opt.backward(two_losses(model, batch(5, dtype=DOUBLE)))
    before, first = everything(model, opt), flat_grad(model)
    opt.backward(two_losses(model, batch(0, dtype=DOUBLE)), accumulate=True)
    assert everything(model, opt) == before
    opt.backward(two_losses(model, batch(1, dtype=DOUBLE)))
    added = flat_grad(model) - first

    fresh = network(DOUBLE)
    other = wrapped(fresh)
    other.backward(two_losses(fresh, batch(0, dtype=DOUBLE)), accumulate=True)
    other.backward(two_losses(fresh, batch(1, dtype=DOUBLE)))
    torch.testing.assert_close(added, flat_grad(fresh))


@pytest.mark.parametrize("set_to_none", [True, False])
def test_step_refuses_and_zero_grad_drops_what_is_not_combined(set_to_none):
    model = network(DOUBLE)
    opt = wrapped(model)
    opt.backward(two_losses(model, batch(0, dtype=DOUBLE)), accumulate=True)
    before = everything(model, opt)
    with pytest.raises(RuntimeError, match=r"not combined.*`accumulate=True`.*`zero_grad`"):
        opt.step()
    assert everything(model, opt) == before
    opt.zero_grad(set_to_none=set_to_none)
    opt.backward(two_losses(model, batch(1, dtype=DOUBLE)))
    fresh = network(DOUBLE)
    wrapped(fresh).backward(two_losses(fresh, batch(1, dtype=DOUBLE)))
    assert torch.equal(flat_grad(model), flat_grad(fresh))
    opt.step()


@pytest.mark.parametrize(
    "make",
    [
        lambda inner: CAGradClip(inner, dict(zip(NAMES, [0.6, 0.4], strict=True))),
        lambda inner: MGDA(inner, dict(zip(NAMES, [0.6, 0.4], strict=True))),
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


@pytest.mark.parametrize("second", [{"quality": 0, "other": 0}, {"quality": 0}, [0, 0, 0]])
def test_other_names_or_numbers_in_a_later_micro_batch(second):
    x = nn.Parameter(torch.tensor([1.0, 2.0]))
    opt = MGDA(torch.optim.SGD([x], 0.1))
    opt.backward({"quality": x[0], "length": x[1]}, accumulate=True)
    later = (
        {name: x.sum() for name in second}
        if isinstance(second, dict)
        else [x.sum() for _ in second]
    )
    with pytest.raises(ValueError, match="`losses` must"):
        opt.backward(later)
    assert x.grad is None
    opt.backward({"quality": x[0], "length": x[1]})
    assert opt.report.losses.tolist() == [2, 4], "the first micro-batch is still there"


# Which micro-batches hold which objective; the last call always combines.
PATTERNS = [
    [(1, 1), (1, 0), (0, 1)],
    [(1, 0), (0, 1)],
    [(0, 1), (1, 0), (1, 1)],
    [(1, 1), (0, 0)],
    [(0, 0), (1, 1)],
    [(1, 0), (1, 0)],
    [(0, 0), (1, 0), (0, 0)],
]


@pytest.mark.parametrize("named", [False, True], ids=["list", "mapping"])
@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
def test_absent_losses_contribute_nothing(pattern, named):
    model = network(DOUBLE)
    opt = wrapped(model, WRAPPERS["named" if named else "CAGradClip"])
    values, J = torch.zeros(2, dtype=DOUBLE), torch.zeros(2, len(flat_grad(model)), dtype=DOUBLE)
    for k, present in enumerate(pattern):
        x = batch(k, dtype=DOUBLE)
        losses = two_losses(model, x)
        rows = jacobian(model, lambda x=x: two_losses(model, x))
        for i, here in enumerate(present):
            if here:
                values[i] += losses[i].detach()
                J[i] += rows[i]
            else:
                losses[i] = None
        opt.backward(as_asked(opt, losses), accumulate=k < len(pattern) - 1)
    weights, c = (torch.tensor([0.6, 0.4], dtype=DOUBLE), 0.7 if named else 0.4)
    absent = [i for i in range(2) if not any(present[i] for present in pattern)]
    there = [i for i in range(2) if i not in absent]
    total = weights[there].sum()
    alpha = total * clipped_alpha(J[there], (weights[there] / total).tolist(), c, "hard")
    torch.testing.assert_close(flat_grad(model), alpha @ J[there], rtol=1e-8, atol=1e-9)
    assert opt.report.absent == tuple(opt.report.names[i] for i in absent)
    values[absent] = math.nan
    torch.testing.assert_close(opt.report.losses, values, equal_nan=True)


def test_nothing_present_in_any_micro_batch_is_no_update():
    model = network(DOUBLE)
    opt = wrapped(model)
    before = bits(model.state_dict())
    opt.backward([None, None], accumulate=True)
    opt.backward([None, None])
    assert opt.report.absent == ("0", "1")
    opt.step()
    assert all(p.grad is None for p in model.parameters())
    assert bits(model.state_dict()) == before


def test_parameter_that_only_one_micro_batch_uses():
    x, y = nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(2))
    opt = CAGradClip(torch.optim.SGD([x, y], 0.1), [0.5, 0.5], c=0.0)
    opt.backward([x.sum(), x.prod()], accumulate=True)
    opt.backward([x.sum(), (x * y).sum()])
    assert y.grad.tolist() == [0.5, 0.5]
    assert x.grad.tolist() == [2, 2]


def test_parameter_group_added_between_micro_batches():
    x, y = nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(2))
    opt = CAGradClip(torch.optim.SGD([x], 0.1), [0.5, 0.5], c=0.0)
    opt.backward([x.sum(), y.sum() + x.sum()], accumulate=True)
    opt.add_param_group({"params": [y]})
    opt.backward([x.sum(), y.sum() + x.sum()])
    assert x.grad.tolist() == [2, 2]
    assert y.grad.tolist() == [0.5, 0.5], "counted from when it belonged to the optimizer"


def test_pending_gradients_are_not_the_users_memory():
    """A static input buffer is refilled for every micro-batch, as CUDA graphs ask for."""
    x, buffer = nn.Parameter(torch.zeros(2)), torch.zeros(2)
    opt = CAGradClip(torch.optim.SGD([x], 0.1), [0.5, 0.5], c=0.0)
    for k in range(4):
        buffer.fill_(float(k))
        buffered = Buffered.apply(x, buffer)
        opt.backward([buffered, None] if k % 2 else [None, buffered], accumulate=k < 3)
    assert x.grad.tolist() == [3, 3], "(0 + 2) / 2 + (1 + 3) / 2"
    assert buffer.tolist() == [3, 3]


@pytest.mark.parametrize("last", [False, True], ids=["of an earlier loss", "of the last loss"])
def test_nor_are_those_of_callables(last):
    """Each refills the buffer that is its gradient, and so does the next micro-batch."""
    x, buffer = nn.Parameter(torch.zeros(2)), torch.zeros(2)
    opt = CAGradClip(torch.optim.SGD([x], 0.1), [0.5, 0.5], c=0.0)

    def refilled(value):
        buffer.fill_(value)
        return Buffered.apply(x, buffer)

    for k in range(4):
        one = lambda k=k: refilled(float(1 + k))  # noqa: E731
        opt.backward([None, one] if last else [one, lambda: x.sum() * 0], accumulate=k < 3)
        buffer.fill_(1000.0)
    assert x.grad.tolist() == [5, 5], "(1 + 2 + 3 + 4) / 2"
    assert buffer.tolist() == [1000, 1000]


def test_pending_losses_are_not_the_users_memory():
    x = nn.Parameter(torch.ones(2))
    opt = CAGradClip(torch.optim.SGD([x], 0.1), [0.5, 0.5])
    first, second = x.sum(), x.prod()
    running = first.detach()
    opt.backward([first, second], accumulate=True)
    running += 1000  # a running mean, kept in place
    opt.backward([x.sum(), x.prod()])
    assert opt.report.losses.tolist() == [4, 2]


@pytest.mark.parametrize("bad", range(3))
def test_not_finite_in_one_micro_batch(bad):
    def losses(x, k):
        return [x.sum() * (math.nan if k == bad else 1), x.prod()]

    x = nn.Parameter(torch.ones(2))
    opt = CAGradClip(torch.optim.SGD([x], 0.1, momentum=0.9), [0.5, 0.5], nonfinite="skip")
    for k in range(3):
        opt.backward(losses(x, k), accumulate=k < 2)
    opt.step()
    assert x.tolist() == [1, 1]
    assert opt.report.skipped == 1
    assert not opt.state

    opt = CAGradClip(torch.optim.SGD([x], 0.1, momentum=0.9), [0.5, 0.5])
    with pytest.raises(FloatingPointError, match="loss '0'"):
        for k in range(3):
            opt.backward(losses(x, k), accumulate=k < 2)
    assert x.grad is None
    opt.zero_grad()
    opt.backward([x.sum(), x.prod()])
    opt.step()
    assert x[0] < 1
