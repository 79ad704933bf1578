"""A whole step against Algorithm 1 written out with plain backward passes and a 60-digit p."""

import contextlib

import numpy as np
import pytest
import torch
from torch import nn

from raco_optim import MGDA, CAGrad, CAGradClip, LinearScalarization
from raco_optim.rules import cagrad
from tests.problems_nn import (
    INNER,
    as_asked,
    batch,
    bits,
    clipped_alpha,
    flat_grad,
    jacobian,
    network,
    three_losses,
    train_step,
    two_losses,
)

DOUBLE = torch.float64
CLIPS, SOLVERS = ("hard", "soft", "none"), ("exact", "pgd", "slsqp")


def sgd(model):
    return torch.optim.SGD(model.parameters(), lr=0.1)


def flat(model):
    return nn.utils.parameters_to_vector(model.parameters()).detach().clone()


CASES = [
    (two_losses, [0.6, 0.4]),
    (two_losses, [0.1, 0.9]),
    (two_losses, [1.0, 0.0]),
    (three_losses, [0.2, 0.5, 0.3]),
    (three_losses, [0.0, 0.5, 0.5]),
]


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize(("losses", "weights"), CASES)
def test_one_step_is_algorithm_1(losses, weights, solver):
    x = batch(0, dtype=DOUBLE)
    for clip in CLIPS:
        model = network(DOUBLE)
        J = jacobian(model, lambda model=model: losses(model, x))
        alpha, before = clipped_alpha(J, weights, 0.4, clip), flat(model)
        opt = CAGradClip(sgd(model), weights, c=0.4, clip=clip, solver=solver)
        opt.backward(losses(model, x))
        torch.testing.assert_close(opt.report.coefficients, alpha, rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(flat_grad(model), alpha @ J, rtol=1e-6, atol=1e-6)
        opt.step()
        torch.testing.assert_close(flat(model), before - 0.1 * alpha @ J, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", sorted(INNER.keys() - {"LBFGS"}))
def test_trajectory_equals_the_inner_optimizer_on_hand_made_gradients(name):
    model, witness = network(DOUBLE), network(DOUBLE)
    opt = CAGradClip(INNER[name](model.parameters()), [0.3, 0.7], c=0.5)
    plain = INNER[name](witness.parameters())
    for t in range(5):
        x = batch(t, dtype=DOUBLE)
        train_step(opt, model, x)
        J = jacobian(witness, lambda x=x: two_losses(witness, x))
        combined = clipped_alpha(J, [0.3, 0.7], 0.5, "hard") @ J
        offset = 0
        for p in witness.parameters():
            p.grad = combined[offset : offset + p.numel()].view_as(p).clone()
            offset += p.numel()
        plain.step()
    for p, q in zip(model.parameters(), witness.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-9, atol=1e-9)


WITHOUT_RADIUS = {
    "CAGradClip": lambda inner: CAGradClip(inner, [0.25, 0.75], c=0.0),
    "CAGrad": lambda inner: CAGrad(inner, [0.25, 0.75], c=0.0),
    "LinearScalarization": lambda inner: LinearScalarization(inner, [0.25, 0.75]),
    "one loss": lambda inner: CAGradClip(inner, [1.0], c=0.0),
}


@pytest.mark.parametrize("method", WITHOUT_RADIUS)
@pytest.mark.parametrize("name", INNER)
def test_without_a_radius_it_is_the_weighted_sum(name, method):
    model, witness = network(DOUBLE), network(DOUBLE)
    opt = WITHOUT_RADIUS[method](INNER[name](model.parameters()))
    plain = INNER[name](witness.parameters())

    def weighted(model, x):
        first, second = two_losses(model, x)
        return 0.25 * first + 0.75 * second

    for t in range(4):
        x = batch(t, dtype=DOUBLE)

        def closure(x=x):
            opt.zero_grad()
            return [weighted(model, x)] if method == "one loss" else two_losses(model, x)

        def plain_closure(x=x):
            plain.zero_grad()
            loss = weighted(witness, x)
            loss.backward()
            return loss

        opt.step(closure)
        plain.step(plain_closure)
    torch.testing.assert_close(flat(model), flat(witness), rtol=1e-9, atol=1e-9)


def test_backward_adds_as_loss_backward_does():
    model = network()
    opt = CAGradClip(sgd(model), [0.6, 0.4])
    opt.backward(two_losses(model, batch(0)))
    first = flat_grad(model)
    opt.backward(two_losses(model, batch(0)))
    assert torch.equal(flat_grad(model), 2 * first)
    opt.zero_grad()
    opt.backward(two_losses(model, batch(1)))
    other = flat_grad(model)
    model(batch(0)).sum().backward()  # an ordinary backward adds to it just as well
    assert not torch.equal(flat_grad(model), other)


@pytest.mark.parametrize("method", [CAGradClip, MGDA])
@pytest.mark.parametrize("losses", [two_losses, three_losses])
def test_scale_of_the_losses_does_not_change_the_coefficients(losses, method):
    def coefficients(scale):
        model = network(DOUBLE)
        m = len(losses(model, batch(0, dtype=DOUBLE)))
        opt = method(sgd(model), [1 / m] * m)
        opt.backward([scale * loss for loss in losses(model, batch(0, dtype=DOUBLE))])
        return opt.report.coefficients

    alpha = coefficients(1.0)
    for power in (-60, -13, 1, 16, 53):
        assert torch.equal(coefficients(2.0**power), alpha), "a power of two rounds nothing"
    for scale in (1e-16, 1e-8, 1e-3, 1e3, 1e8, 1e16):
        torch.testing.assert_close(coefficients(scale), alpha, rtol=1e-9, atol=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("losses", [two_losses, three_losses])
def test_half_precision(losses, dtype):
    """The coefficients are those of a float64 computation on the same gradients; one rounding."""
    model, x = network(dtype), batch(0, dtype=dtype)
    weights = [0.6, 0.4] if losses is two_losses else [0.2, 0.5, 0.3]
    J = jacobian(model, lambda: losses(model, x))
    alpha = clipped_alpha(J, weights, 0.4, "hard")
    opt = CAGradClip(torch.optim.AdamW(model.parameters()), weights, c=0.4)
    opt.backward(losses(model, x))
    torch.testing.assert_close(opt.report.coefficients, alpha, rtol=1e-4, atol=1e-4)
    exact = opt.report.coefficients @ J
    one_rounding = (exact.to(dtype).double() - exact).abs()
    assert bool(((flat_grad(model) - exact).abs() <= one_rounding + 1e-6 * exact.abs()).all())
    opt.step()


def test_gradient_clipping_sees_the_combined_gradient():
    model = network(DOUBLE)
    opt, before = CAGradClip(sgd(model), [0.6, 0.4]), flat(model)
    opt.backward(two_losses(model, batch(0, dtype=DOUBLE)))
    combined = flat_grad(model)
    norm = nn.utils.clip_grad_norm_(model.parameters(), 0.5)
    assert float(norm) == pytest.approx(float(combined.norm()))
    opt.step()
    assert float((flat(model) - before).norm()) == pytest.approx(0.1 * 0.5, rel=1e-5)


@pytest.mark.parametrize(
    "form",
    [
        tuple,
        iter,
        torch.stack,
        lambda losses: [loss.reshape(1) for loss in losses],
        lambda losses: [lambda i=i: losses[i] for i in range(2)],
    ],
    ids=["tuple", "iterator", "stacked", "one element", "callables"],
)
def test_losses_in_any_form(form):
    results = []
    for make in (list, form):
        model = network()
        opt = CAGradClip(sgd(model), [0.6, 0.4])
        # The callables have a graph each, as the first one to run frees its own.
        pair = [two_losses(model, batch(0))[i] for i in range(2)]
        opt.backward(make(pair))
        results.append(bits([p.grad for p in model.parameters()]))
    assert results[0] == results[1]


@pytest.mark.parametrize(
    "context",
    [
        lambda: torch.autocast("cpu", torch.bfloat16),
        torch.no_grad,
        lambda: torch.device("meta"),  # stands for the GPU that a script makes its default
    ],
    ids=["autocast", "no_grad", "default device"],
)
@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("nonfinite", ["raise", "propagate"])
def test_context_around_backward_changes_nothing(context, solver, nonfinite):
    results, targets = [], torch.randn(3, 5)
    settings = {"solver": solver, "nonfinite": nonfinite}
    for surroundings in (contextlib.nullcontext, context):
        x = nn.Parameter(torch.ones(5))
        opt = CAGradClip(torch.optim.SGD([x], 0.1), [0.2, 0.5, 0.3], **settings)
        losses = [(x - target).square().sum() for target in targets[1:]]
        with surroundings():
            opt.backward([lambda x=x: (x - targets[0]).square().sum(), *losses])
        results.append(bits(x.grad))
    assert results[0] == results[1]


@pytest.mark.parametrize("names", [("b", "a"), ("0", "1"), ("", "a b.c")], ids=str)
@pytest.mark.parametrize("accumulate", [False, True])
def test_names_may_be_any_strings(names, accumulate):
    model = network()
    opt = CAGradClip(sgd(model), dict(zip(names, [0.6, 0.4], strict=True)))
    plain = CAGradClip(sgd(model), [0.6, 0.4])
    results = []
    for each in (opt, plain):
        each.zero_grad()
        if accumulate:
            each.backward(as_asked(each, two_losses(model, batch(1))), accumulate=True)
        losses = as_asked(each, two_losses(model, batch(0)))
        each.backward(dict(reversed(losses.items())) if each is opt else losses)
        results.append(flat_grad(model))
    assert torch.equal(*results)
    assert opt.report.names == names


def test_settings_may_change_between_steps(monkeypatch):
    model, x = network(DOUBLE), batch(0, dtype=DOUBLE)
    opt = CAGradClip(sgd(model), np.array([0.5, 0.25, 0.25]), c=0.1)
    J = jacobian(model, lambda: three_losses(model, x))
    asked = []
    for name in ("solve", "solve_on_host"):
        solve = getattr(cagrad, name)
        monkeypatch.setattr(
            cagrad, name, lambda *args, solve=solve: (asked.append(args[-1]), solve(*args))[1]
        )

    def alpha(tolerance, **settings):
        for name, value in settings.items():
            setattr(opt, name, value)
        opt.zero_grad()
        opt.backward(three_losses(model, x))
        expected = clipped_alpha(J, opt.weights, opt.c, opt.clip) @ J
        torch.testing.assert_close(flat_grad(model), expected, rtol=tolerance, atol=tolerance / 10)
        return opt.report.coefficients

    for weights, c in ((torch.tensor([0.5, 0.25, 0.25]), 0.1), ([0.25, 0.5, 0.25], 0.9)):
        alpha(1e-9, weights=weights, c=c)
        assert (opt.weights, opt.c) == (tuple(weights.tolist() if c == 0.1 else weights), c)
    assert asked == ["exact"] * 2
    opt.weights, opt.c = [0.1, 0.1, 0.8], 0.5
    found = [
        alpha(1e-5, clip=clip, solver=solver)
        for clip, solver in (("hard", "exact"), ("none", "slsqp"), ("soft", "pgd"))
    ]
    assert asked[2:] == ["exact", "slsqp", "pgd"]
    assert not torch.allclose(found[0], found[1], rtol=1e-2)
    assert not torch.allclose(found[0], found[2], rtol=1e-2)
