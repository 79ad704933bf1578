"""What the report says about steps whose numbers are known by hand."""

import dataclasses
import enum
import math

import pytest
import torch
from torch import nn

from raco_optim import (
    MGDA,
    CAGradClip,
    LinearScalarization,
    MultiObjectiveOptimizer,
    Outcome,
    StepReport,
)

# Theorem 3.2's strict witness (shared/anchors.md): gradients, weights, radius and what they give.
G = torch.tensor([[1.0, -4.0], [-1.0, 1.0]], dtype=torch.float64)
WEIGHTS, C = [0.2, 0.8], 0.5
P = torch.tensor([0.3561, 0.6439], dtype=torch.float64)


def double(*rows):
    return torch.tensor(rows, dtype=torch.float64)


def stepped(gradients, method, *args, **kwargs):
    """The optimizer after `backward` on losses whose gradients are the rows, and `.grad`."""
    x = nn.Parameter(double(2, 3))
    opt = method(torch.optim.SGD([x], 0.1), *args, **kwargs)
    opt.backward([g @ x for g in gradients])
    return opt, x.grad


def step(gradients, weights, c=C, **kwargs):
    opt, grad = stepped(gradients, CAGradClip, weights, c, **kwargs)
    return opt.report, grad


def test_witness_of_theorem_3_2():
    report, grad = step(G, WEIGHTS)
    assert report.names == ("0", "1")
    assert report.weights.tolist() == WEIGHTS
    assert report.gram.tolist() == [[17, -5], [-5, 2]]
    cosine = -5 / math.sqrt(34)
    torch.testing.assert_close(report.cosines, double([1, cosine], [cosine, 1]))
    torch.testing.assert_close(report.p, P, atol=5e-5, rtol=0)
    torch.testing.assert_close(report.p_clipped, double(0.2, P[1]), atol=5e-5, rtol=0)
    # alpha = w + c |g0| p~ / |G~|, with g0 = (-0.6, 0).
    combined = report.p_clipped @ G
    alpha = torch.tensor(WEIGHTS) + 0.5 * 0.6 * report.p_clipped / combined.norm()
    torch.testing.assert_close(report.coefficients, alpha.double(), atol=1e-7, rtol=0)
    torch.testing.assert_close(report.coefficients @ G, grad)
    # rho and rho~ of anchors.md are cosines with g0; in the plane the angles subtract.
    rho, rho_clipped = 0.34578, 0.94333
    turned = [math.atan2(float(v[1]), float(v[0])) for v in (report.p @ G, combined)]
    assert report.clip_angle == pytest.approx(1 - math.cos(turned[0] - turned[1]), abs=1e-9)
    assert abs(math.cos(turned[0] - math.pi)) == pytest.approx(rho, abs=1e-4)
    assert abs(math.cos(turned[1] - math.pi)) == pytest.approx(rho_clipped, abs=1e-4)
    assert 0 <= report.gap <= 1e-9
    assert report.outcome is Outcome.CORRECTED
    assert report.losses.tolist() == [-10, 1]
    assert report.absent == ()
    assert report.skipped == 0


@pytest.mark.parametrize("scale", [1e-16, 1.0, 1e16])
def test_outcomes_do_not_depend_on_scale(scale):
    opposed = double([1, 2], [-1, -2]) * scale
    report, grad = step(opposed, [0.5, 0.5])
    assert report.outcome is Outcome.STATIONARY
    assert report.p.tolist() == [0.5, 0.5]
    assert grad.tolist() == [0, 0]
    assert math.isnan(report.clip_angle)
    assert step(opposed, [0.75, 0.25])[0].outcome is not Outcome.STATIONARY
    report, _ = step(G * scale, WEIGHTS, c=0.0)
    assert report.outcome is Outcome.WEIGHTED_SUM
    assert report.coefficients.tolist() == WEIGHTS
    assert step(G * scale, WEIGHTS)[0].outcome is Outcome.CORRECTED


def test_limits():
    report, grad = step(0 * G, WEIGHTS)
    assert report.outcome is Outcome.STATIONARY
    assert report.coefficients.tolist() == WEIGHTS == report.p.tolist()
    assert report.cosines.tolist() == [[0, 0], [0, 0]]
    assert grad.tolist() == [0, 0]
    # g2 = 0: p* = e_2 makes G_p vanish, and there is nothing to correct with.
    report, grad = step(double([1, 2], [0, 0]), [0.25, 0.75])
    assert report.outcome is Outcome.WEIGHTED_SUM
    assert report.coefficients.tolist() == [0.25, 0.75]
    assert grad.tolist() == [0.25, 0.5]
    assert math.isnan(report.clip_angle)
    # g1 is short and g2 long, almost in its direction: p* = e_1, p~ = w_1 e_1, no turn.
    report, _ = step(double([1, 0], [10, 1]), [0.5, 0.5])
    assert report.p.tolist() == [1, 0]
    assert report.p_clipped.tolist() == [0.5, 0]
    assert report.clip_angle == 0


def test_names_are_those_of_the_weights_whatever_the_order_of_the_losses():
    x = nn.Parameter(torch.tensor([2.0, 3.0]))
    opt = CAGradClip(torch.optim.SGD([x], 0.1), {"b": 0.25, "a": 0.75})
    opt.backward({"a": x[0], "b": 2 * x[1]})
    assert opt.report.names == ("b", "a")
    assert opt.report.weights.tolist() == [0.25, 0.75]
    assert opt.report.losses.tolist() == [6, 2]
    assert opt.report.gram.tolist() == [[4, 0], [0, 1]]


@pytest.mark.parametrize(
    ("method", "argument", "p"),
    [
        (MultiObjectiveOptimizer, lambda gram: gram.new_ones(2), None),
        (LinearScalarization, [0.5, 0.5], None),
        (MGDA, None, [0.5, 0.5]),
    ],
)
def test_rules_without_a_trust_region(method, argument, p):
    report = stepped(torch.eye(2).double(), method, argument)[0].report
    assert report.outcome is Outcome.COEFFICIENTS
    assert (None if report.p is None else report.p.tolist()) == p
    assert report.p_clipped is None
    assert math.isnan(report.clip_angle)
    assert report.weights.tolist() == [0.5, 0.5]


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_skipped_and_propagated_steps(bad):
    gradients = double([1, 0], [0, bad])
    report, grad = step(gradients, WEIGHTS, nonfinite="skip")
    assert report.outcome is Outcome.SKIPPED
    assert report.skipped == 1
    assert report.coefficients.tolist() == [0, 0]
    assert grad is None
    report, grad = step(gradients, WEIGHTS, nonfinite="propagate")
    assert report.outcome is Outcome.NONFINITE
    assert report.coefficients.tolist() == WEIGHTS
    assert not grad.isfinite().all()
    # There is no subproblem to have solved, so there must be no certificate of one.
    assert report.p is None or bool(report.p.isnan().all())
    assert report.p_clipped is None or bool(report.p_clipped.isnan().all())
    assert math.isnan(report.gap)


def test_report_before_the_first_backward_says_what_to_do():
    opt = MGDA(torch.optim.SGD([nn.Parameter(torch.ones(2))], 0.1))
    with pytest.raises(RuntimeError, match="Call `backward` first"):
        _ = opt.report


def test_is_frozen_and_a_snapshot():
    opt, _ = stepped(G, CAGradClip, WEIGHTS, C)
    first = opt.report
    with pytest.raises(dataclasses.FrozenInstanceError):
        first.skipped = 3
    first.gram.zero_()
    opt.weights = [0.5, 0.5]
    assert opt.report.gram.tolist() == [[17, -5], [-5, 2]]
    assert opt.report.weights.tolist() == WEIGHTS, "those of the step, not those of now"
    opt.backward([g @ opt.param_groups[0]["params"][0] for g in G.flip(0)])
    assert first.weights.tolist() == WEIGHTS
    tensors = [v for v in vars(opt.report).values() if isinstance(v, torch.Tensor)]
    assert {(t.dtype, t.is_cpu, t.requires_grad) for t in tensors} == {(torch.float64, True, False)}


def test_outcomes_explain_themselves():
    assert issubclass(Outcome, enum.Enum)
    assert all(len(outcome.value) > 20 for outcome in Outcome)
    assert [field.name for field in dataclasses.fields(StepReport)] == [
        *("names", "weights", "gram", "coefficients", "losses", "p", "p_clipped", "gap"),
        *("absent", "skip", "skipped", "gram_age", "gradients"),
    ]


@pytest.mark.parametrize(
    ("second", "coefficients", "hurting", "conflicting"),
    [
        ([0.0, 1.0], [1.0, 1.0], False, False),
        ([-0.5, 1.0], [1.0, 1.0], False, True),
        ([-2.0, 1.0], [1.0, 1.0], True, True),
        ([0.0, 1.0], [1.0, -1.0], True, False),
    ],
)
def test_hurting_and_conflicting(second, coefficients, hurting, conflicting):
    rule = double(*coefficients)
    opt, _ = stepped(double([1, 0], second), MultiObjectiveOptimizer, lambda _: rule)
    assert (opt.report.hurting, opt.report.conflicting) == (hurting, conflicting)
