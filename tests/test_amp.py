"""Automatic mixed precision: losses scaled in, scaled combination out, the scaler on the wrapper.

A power of two scales every float exactly, so that without overflow a scaled float32 run must
equal the unscaled one bit for bit.
"""

import math

import pytest
import torch
from torch import nn
from torch.amp import GradScaler

from raco_optim import MGDA, CAGrad, CAGradClip
from tests.problems_nn import (
    INNER,
    WRAPPERS,
    as_asked,
    batch,
    bits,
    everything,
    infinite,
    network,
    train_step,
    two_losses,
)

UNSCALED = GradScaler("cpu", enabled=False)
SCALED_INNER = sorted(INNER.keys() - {"LBFGS"})  # a GradScaler takes no closure


def scaled_step(opt, model, scaler, losses, *, max_norm=None):
    opt.zero_grad()
    opt.backward(as_asked(opt, [scaler.scale(loss) for loss in losses]))
    if max_norm is not None:
        scaler.unscale_(opt)
        nn.utils.clip_grad_norm_(model.parameters(), max_norm)
    scaler.step(opt)
    scaler.update()


@pytest.mark.parametrize("name", SCALED_INNER)
@pytest.mark.parametrize(("wrapper", "max_norm"), [("CAGradClip", None), ("named", 0.5)])
def test_scaled_run_equals_the_unscaled_one_bit_for_bit(name, wrapper, max_norm):
    model, plain = network(), network()
    opt, plain_opt = (WRAPPERS[wrapper](INNER[name](m.parameters())) for m in (model, plain))
    scaler = GradScaler("cpu", init_scale=2.0**12, growth_interval=2)
    for t in range(5):
        scaled_step(opt, model, scaler, two_losses(model, batch(t)), max_norm=max_norm)
        scaled_step(plain_opt, plain, UNSCALED, two_losses(plain, batch(t)), max_norm=max_norm)
        assert torch.equal(opt.report.coefficients, plain_opt.report.coefficients)
    assert bits(model.state_dict()) == bits(plain.state_dict())
    assert bits(opt.state_dict()) == bits(plain_opt.state_dict())
    assert scaler.get_scale() == 2.0**14, "it grew twice: it saw five finite steps"


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_autocast_follows_the_float32_run(dtype):
    model, plain = network(), network()
    opt, plain_opt = (
        CAGradClip(torch.optim.SGD(m.parameters(), 0.05, momentum=0.9), [0.6, 0.4])
        for m in (model, plain)
    )
    scaler = GradScaler("cpu", init_scale=2.0**10, enabled=dtype == torch.float16)
    start, tolerance = bits(plain.state_dict()), 64 * torch.finfo(dtype).eps
    for t in range(8):
        with torch.autocast("cpu", dtype):
            losses = two_losses(model, batch(t))
        scaled_step(opt, model, scaler, losses, max_norm=5.0)
        scaled_step(plain_opt, plain, UNSCALED, two_losses(plain, batch(t)), max_norm=5.0)
        alphas = opt.report.coefficients, plain_opt.report.coefficients
        torch.testing.assert_close(*alphas, rtol=tolerance, atol=tolerance)
    for p, q in zip(model.parameters(), plain.parameters(), strict=True):
        assert float((p - q).detach().norm() / q.detach().norm()) < tolerance
    assert bits(plain.state_dict()) != start


def test_micro_batches_under_a_scaler():
    models, states = [network(), network()], []
    for m, scaler in zip(models, (GradScaler("cpu", init_scale=2.0**12), UNSCALED), strict=True):
        opt = CAGradClip(torch.optim.AdamW(m.parameters(), lr=0.1), [0.6, 0.4])
        for t in range(3):
            losses = [scaler.scale(loss) for loss in two_losses(m, batch(t))]
            opt.backward(losses, accumulate=t < 2)
        scaler.step(opt)
        scaler.update()
        states.append(bits(m.state_dict()))
    assert states[0] == states[1]


def test_scaling_twice_is_still_refused():
    model = network()
    opt = CAGradClip(torch.optim.SGD(model.parameters(), 0.1), [0.6, 0.4])
    scaler = GradScaler("cpu")
    opt.backward([scaler.scale(loss) for loss in two_losses(model, batch(0))])
    scaler.unscale_(opt)
    with pytest.raises(RuntimeError, match=r"unscale_\(\) has already been called"):
        scaler.unscale_(opt)


def overflow(losses, which, bad):
    """A loss that is finite, with an infinite gradient, or one that is not finite itself."""
    is_gradient = bad == "gradient"
    losses[which] = infinite(losses[which]) if is_gradient else losses[which] * bad
    return losses


BAD = pytest.mark.parametrize("bad", [math.inf, math.nan, "gradient"])


@pytest.mark.parametrize(
    ("bad", "which", "weights"),
    [
        (math.inf, 0, [0.6, 0.4]),
        (math.nan, 1, [0.6, 0.4]),
        ("gradient", 1, [0.6, 0.4]),
        *[(bad, 1, [1.0, 0.0]) for bad in (math.inf, math.nan, "gradient")],
        *[(bad, 0, [0.0, 1.0]) for bad in (math.inf, "gradient")],
    ],
)
@pytest.mark.parametrize(
    ("method", "options"),
    [(CAGradClip, {}), (CAGradClip, {"solver": "pgd"}), (CAGrad, {}), (MGDA, {})],
    ids=["exact", "pgd", "CAGrad", "MGDA"],
)
def test_propagated_overflow_is_skipped_by_the_scaler(method, options, weights, which, bad):
    """Also if the loss has weight zero: 0 * Inf must not vanish."""
    model = network()
    inner = torch.optim.AdamW(model.parameters(), lr=0.1)
    opt = method(inner, weights, nonfinite="propagate", **options)
    scaler = GradScaler("cpu", init_scale=2.0**12)
    scaled_step(opt, model, scaler, two_losses(model, batch(0)))
    opt.zero_grad()
    before = everything(model, opt)
    scaled_step(opt, model, scaler, overflow(two_losses(model, batch(1)), which, bad), max_norm=1.0)
    opt.zero_grad()
    assert everything(model, opt) == before
    assert scaler.get_scale() == 2.0**11
    scaled_step(opt, model, scaler, two_losses(model, batch(1)))
    opt.zero_grad()
    assert everything(model, opt) != before


@BAD
def test_default_raises_and_points_to_propagate(bad):
    model = network()
    opt = CAGradClip(torch.optim.AdamW(model.parameters()), {"first": 0.6, "second": 0.4})
    scaler = GradScaler("cpu")
    losses = [scaler.scale(loss) for loss in overflow(two_losses(model, batch(0)), 1, bad)]
    words = "the gradient of loss 'second'" if bad == "gradient" else "loss 'second'"
    with pytest.raises(FloatingPointError, match=words) as caught:
        opt.backward(as_asked(opt, losses))
    assert 'nonfinite="propagate"' in str(caught.value)
    assert "GradScaler" in str(caught.value)
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize(
    ("bad", "set_to_none"), [(math.inf, True), (math.nan, False), ("gradient", True)]
)
@pytest.mark.parametrize("name", INNER)
def test_skip_leaves_parameters_and_moments_alone(name, bad, set_to_none):
    """Zero gradients are not no gradients: momentum and weight decay would move the parameters."""
    model = network()
    opt = CAGradClip(INNER[name](model.parameters()), [0.6, 0.4], nonfinite="skip")

    def state():
        return bits([list(model.parameters()), opt.optimizer.state_dict()])

    train_step(opt, model, batch(0))
    before = state()

    def closure():
        opt.zero_grad(set_to_none)
        return overflow(two_losses(model, batch(1)), 1, bad)

    opt.step(closure)
    if name != "LBFGS":  # which counts that it looked
        assert state() == before
        opt.zero_grad(set_to_none)
        opt.backward(overflow(two_losses(model, batch(1)), 0, bad))
        opt.step()
        assert state() == before
        assert opt.report.skipped == 2
    assert state()[0] == before[0]
    train_step(opt, model, batch(1))
    assert state()[0] != before[0]
    assert opt.report.skipped == (1 if name == "LBFGS" else 2)


@pytest.mark.parametrize("order", [["good", "bad"], ["bad", "good"]])
def test_skip_does_not_depend_on_the_order_of_two_backwards(order):
    """A step without one of its parts is not the step that the user asked for."""
    model = network()
    opt = CAGradClip(torch.optim.SGD(model.parameters(), 0.1), [0.6, 0.4], nonfinite="skip")
    before = bits(list(model.parameters()))
    for kind in order:
        losses = two_losses(model, batch(0))
        opt.backward(overflow(losses, 0, math.nan) if kind == "bad" else losses)
    opt.step()
    assert bits(list(model.parameters())) == before
    assert opt.report.skipped == 1


def bad_then_good(opt, model, way):
    """A skipped step, then a good one; the gradients are zeroed in one of the usual ways."""
    losses = overflow(two_losses(model, batch(0)), 0, math.nan)
    if way == "closure":
        opt.step(lambda: losses)
        opt.step(lambda: model.zero_grad() or two_losses(model, batch(0)))
        return
    opt.backward(losses)
    if way == "no step":
        opt.zero_grad()
    else:
        opt.step()
        model.zero_grad()
    opt.backward(two_losses(model, batch(0)))
    opt.step()


@pytest.mark.parametrize("way", ["closure", "no step", "the model's zero_grad"])
def test_one_bad_step_skips_one_step(way):
    model, plain = network(), network()
    opt = CAGradClip(torch.optim.SGD(model.parameters(), 0.1), [0.6, 0.4], nonfinite="skip")
    bad_then_good(opt, model, way)
    train_step(CAGradClip(torch.optim.SGD(plain.parameters(), 0.1), [0.6, 0.4]), plain, batch(0))
    assert bits(list(model.parameters())) == bits(list(plain.parameters()))
    assert opt.report.skipped == 1
