"""Losses that are absent from a step take no part in it, and leave the others their correction.

alpha of those present is W alpha(H, w / W), of their Gram matrix H and weights w, whose sum is W.
The witnesses are the 60-digit minimiser of tests/oracles.py and numbers known by hand.
"""

import itertools
import math

import pytest
import torch
from torch import nn

from raco_optim import (
    MGDA,
    CAGrad,
    CAGradClip,
    LinearScalarization,
    MixingCoefficients,
    MultiObjectiveOptimizer,
    Outcome,
)
from raco_optim.rules import Rule
from tests.oracles import exact_min_norm
from tests.problems_nn import bits, clipped_alpha

DOUBLE = torch.float64
W4 = [0.1, 0.2, 0.3, 0.4]
# Every way in which one of four losses, and not all, can be absent.
ABSENT = [set(s) for k in (1, 2, 3) for s in itertools.combinations(range(4), k)]


def rows(seed, m=4, n=6):
    """Gradients in conflict: a Gram matrix with entries of both signs."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(m, n, generator=generator, dtype=DOUBLE) + torch.eye(m, n, dtype=DOUBLE)


def parameter(J):
    return nn.Parameter(torch.zeros(J.shape[1], dtype=DOUBLE))


def losses(J, x, absent):
    return [None if i in absent else J[i] @ x + i for i in range(len(J))]


def witness(J, weights, absent, c, clip):
    """alpha as the specification has it, with zeros for the absent losses."""
    there = [i for i in range(len(J)) if i not in absent]
    w = torch.tensor(weights, dtype=DOUBLE)
    total = w[there].sum()
    alpha = torch.zeros(len(J), dtype=DOUBLE)
    alpha[there] = total * clipped_alpha(J[there], (w[there] / total).tolist(), c, clip)
    return alpha


def check_report(report, absent, *, p=True, clipped=True):
    """What the report says of the absent losses, and that it says something of the others."""
    gone = torch.tensor([i in absent for i in range(len(report.names))])
    assert report.absent == tuple(report.names[i] for i in sorted(absent))
    assert report.coefficients[gone].tolist() == [0] * len(absent)
    assert torch.equal(report.losses.isnan(), gone)
    for x, there in ((report.p, p), (report.p_clipped, clipped)):
        assert (x is not None) == there
        if x is not None:
            assert torch.equal(x.isnan(), gone)
    if p:
        assert float(report.p[~gone].sum()) == pytest.approx(1)


@pytest.mark.parametrize("absent", ABSENT, ids=str)
@pytest.mark.parametrize("solver", ["exact", "pgd", "slsqp"])
@pytest.mark.parametrize("clip", ["hard", "soft", "none"])
def test_cagrad_clip(clip, solver, absent):
    J = rows(1)
    x = parameter(J)
    opt = CAGradClip(torch.optim.SGD([x], lr=0.1), W4, 0.4, clip=clip, solver=solver)
    opt.backward(losses(J, x, absent))
    alpha = witness(J, W4, absent, 0.4, clip)
    torch.testing.assert_close(opt.report.coefficients, alpha, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(x.grad, alpha @ J, rtol=1e-6, atol=1e-6)
    check_report(opt.report, absent)
    assert opt.report.gap <= 1e-6
    assert opt.report.outcome is Outcome.CORRECTED


@pytest.mark.parametrize("absent", ABSENT, ids=str)
@pytest.mark.parametrize("c", [0.4, 1.0, 1.5])
def test_cagrad(c, absent):
    J = rows(2)
    x = parameter(J)
    opt = CAGrad(torch.optim.SGD([x], lr=0.1), W4, c)
    opt.backward(losses(J, x, absent))
    alpha = witness(J, W4, absent, c, "none")
    torch.testing.assert_close(opt.report.coefficients, alpha, rtol=1e-7, atol=1e-9)
    torch.testing.assert_close(x.grad, alpha @ J, rtol=1e-7, atol=1e-9)
    check_report(opt.report, absent)
    if c >= 1:
        there = [i for i in range(4) if i not in absent]
        assert (J[there] @ x.grad >= -1e-9).all(), "no loss that is there rises"


def test_cagrad_with_a_large_radius_at_a_point_that_is_critical_for_those_present():
    """Opposed gradients: no direction lowers both. The third, absent, would have offered one."""
    J = torch.tensor([[1.0, 0], [-1, 0], [0, 1]], dtype=DOUBLE)
    x = parameter(J)
    opt = CAGrad(torch.optim.SGD([x], lr=0.1), [0.5, 0.25, 0.25], 1.5)
    opt.backward(losses(J, x, {2}))
    assert opt.report.coefficients.tolist() == [0, 0, 0]
    assert x.grad.tolist() == [0, 0]
    assert opt.report.outcome is Outcome.STATIONARY


@pytest.mark.parametrize("absent", ABSENT, ids=str)
def test_mgda_is_the_min_norm_point_of_those_present(absent):
    """Where the absent loss counted as a zero gradient, the point would be zero: no update."""
    J = rows(3) + 2  # all have a direction in common
    x = parameter(J)
    opt = MGDA(torch.optim.SGD([x], lr=0.1), W4)
    opt.backward(losses(J, x, absent))
    there = [i for i in range(4) if i not in absent]
    shortest = exact_min_norm((J[there] @ J[there].T).numpy())
    assert float(x.grad.norm()) == pytest.approx(shortest, rel=1e-9)
    assert shortest > 1
    assert (J[there] @ x.grad >= shortest**2 * (1 - 1e-9)).all(), "the optimality condition"
    assert opt.report.coefficients[there].sum() == pytest.approx(1)
    check_report(opt.report, absent, clipped=False)


def test_mgda_without_weights():
    x = nn.Parameter(torch.zeros(2, dtype=DOUBLE))
    opt = MGDA(torch.optim.SGD([x], lr=0.1))
    opt.backward([x[0], None, 3 * x[1]])
    torch.testing.assert_close(x.grad, torch.tensor([0.9, 0.3], dtype=DOUBLE))
    assert opt.report.absent == ("1",)


@pytest.mark.parametrize("absent", ABSENT, ids=str)
def test_linear_scalarization_keeps_the_users_own_weights(absent):
    J = rows(4)
    x = parameter(J)
    opt = LinearScalarization(torch.optim.SGD([x], lr=0.1), W4)
    opt.backward(losses(J, x, absent))
    there = [i for i in range(4) if i not in absent]
    w = torch.tensor(W4, dtype=DOUBLE)[there]
    torch.testing.assert_close(x.grad, w @ J[there], rtol=1e-12, atol=1e-12)
    assert opt.report.coefficients[there].tolist() == w.tolist()
    check_report(opt.report, absent, p=False, clipped=False)


@pytest.mark.parametrize("absent", ABSENT, ids=str)
def test_a_function_is_given_the_gram_matrix_of_those_present(absent):
    J, given = rows(5), []

    def rule(gram):
        given.append(gram.clone())
        return torch.arange(1, len(gram) + 1, dtype=DOUBLE)

    x = parameter(J)
    opt = MultiObjectiveOptimizer(torch.optim.SGD([x], lr=0.1), rule, weights=W4)
    opt.backward(losses(J, x, absent))
    there = [i for i in range(4) if i not in absent]
    assert len(given) == 1
    torch.testing.assert_close(given[0], J[there] @ J[there].T)
    alpha = torch.arange(1, len(there) + 1, dtype=DOUBLE)
    assert torch.equal(opt.report.coefficients[there], alpha)
    torch.testing.assert_close(x.grad, alpha @ J[there])
    check_report(opt.report, absent, p=False, clipped=False)


class Recording(Rule):
    """Its result has a p and a clipped p."""

    def __call__(self, gram, weights):
        self.given = gram.clone(), list(weights)
        p = gram.new_tensor([1 / len(weights)] * len(weights))
        return MixingCoefficients(2 * p, p=p, p_clipped=p / 2, gap=p.new_zeros(()))


@pytest.mark.parametrize("absent", ABSENT, ids=str)
def test_a_rule_is_given_the_weights_of_those_present_as_the_user_set_them(absent):
    J, rule = rows(6), Recording()
    x = parameter(J)
    opt = MultiObjectiveOptimizer(torch.optim.SGD([x], lr=0.1), rule, weights=W4)
    opt.backward(losses(J, x, absent))
    there = [i for i in range(4) if i not in absent]
    torch.testing.assert_close(rule.given[0], J[there] @ J[there].T)
    assert rule.given[1] == [W4[i] for i in there]
    assert opt.report.coefficients[there].tolist() == [2 / len(there)] * len(there)
    check_report(opt.report, absent)


# --- Limits --------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [CAGradClip, CAGrad, LinearScalarization])
@pytest.mark.parametrize("absent", ABSENT, ids=str)
def test_without_a_radius_alpha_is_the_users_weights_to_the_bit(make, absent):
    J, weights = rows(7), [0.1, 0.2, 0.3, 0.4]
    x = parameter(J)
    inner = torch.optim.SGD([x], lr=0.1)
    opt = make(inner, weights) if make is LinearScalarization else make(inner, weights, 0.0)
    opt.backward(losses(J, x, absent))
    expected = [0.0 if i in absent else w for i, w in enumerate(weights)]
    assert opt.report.coefficients.tolist() == expected
    if make is not LinearScalarization:
        assert opt.report.outcome is Outcome.WEIGHTED_SUM


def test_without_a_radius_the_gradient_is_that_of_the_weighted_sum():
    grads = []
    for wrapped in (True, False):
        x = nn.Parameter(torch.tensor([1.0, 2.0, 3.0], dtype=DOUBLE))
        a, c = x.square().sum(), (x.prod() * 0.5).sin()
        if wrapped:
            opt = CAGradClip(torch.optim.SGD([x], lr=0.1), [0.2, 0.5, 0.3], 0.0)
            opt.backward([a, None, c])
        else:
            (0.2 * a + 0.3 * c).backward()
        grads.append(x.grad)
    torch.testing.assert_close(*grads, rtol=1e-15, atol=0)


@pytest.mark.parametrize("clip", ["hard", "soft", "none"])
@pytest.mark.parametrize("there", [0, 1])
def test_one_of_two_is_lengthened_by_the_radius(there, clip):
    """p = w / W = 1, so alpha = w (1 + c): a loss on its own, times its weight."""
    J, weights = rows(8, m=2), [0.3, 0.7]
    x = parameter(J)
    opt = CAGradClip(torch.optim.SGD([x], lr=0.1), weights, 0.5, clip=clip)
    opt.backward(losses(J, x, {1 - there}))
    torch.testing.assert_close(x.grad, 1.5 * weights[there] * J[there], rtol=1e-14, atol=0)
    assert opt.report.p[there] == 1
    check_report(opt.report, {1 - there})


@pytest.mark.parametrize("c", [0.0, 0.4])
@pytest.mark.parametrize("clip", ["hard", "soft", "none"])
def test_those_present_have_no_weight(c, clip):
    """W = 0: g0 = 0, and the step is that of a stationary point."""
    J = rows(9, m=3)
    x = parameter(J)
    opt = CAGradClip(torch.optim.SGD([x], lr=0.1), [0.0, 1.0, 0.0], c, clip=clip)
    opt.backward(losses(J, x, {1}))
    assert x.grad.tolist() == [0] * 6
    assert opt.report.outcome is Outcome.STATIONARY
    check_report(opt.report, {1})
    opt.step()


def test_one_without_weight_among_those_present():
    """It still takes part in the subproblem: with clipping "none" it may get all of p."""
    J = rows(10)
    weights = [0.0, 0.5, 0.25, 0.25]
    x = parameter(J)
    for clip in ("hard", "none"):
        x.grad = None
        opt = CAGradClip(torch.optim.SGD([x], lr=0.1), weights, 0.4, clip=clip)
        opt.backward(losses(J, x, {2}))
        alpha = witness(J, weights, {2}, 0.4, clip)
        torch.testing.assert_close(x.grad, alpha @ J, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("scale", [1e-150, 1.0, 1e150])
def test_scale_of_the_losses_does_not_matter(scale):
    J = rows(11)
    x = parameter(J)
    opt = CAGradClip(torch.optim.SGD([x], lr=0.1), W4, 0.4)
    opt.backward(losses(J * scale, x, {1, 3}))
    alpha = witness(J, W4, {1, 3}, 0.4, "hard")
    torch.testing.assert_close(opt.report.coefficients, alpha, rtol=1e-8, atol=1e-10)


# --- Micro-batches, heads, modes -----------------------------------------------------------------

PATTERNS = [
    [{0}, set()],
    [set(), {0}],
    [{0, 1}, {2, 3}],
    [{0, 1, 2, 3}, set()],
    [{0, 1}, {0, 2}, {0}],
    [{0, 1, 2, 3}, {0, 1}, {0, 1, 3}],
]


@pytest.mark.parametrize("named", [False, True])
@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
def test_absent_is_what_no_micro_batch_has(pattern, named):
    names = "abcd"
    J = [rows(20 + k) for k in range(len(pattern))]
    x = parameter(J[0])
    weights = dict(zip(names, W4, strict=True)) if named else W4
    opt = CAGradClip(torch.optim.SGD([x], lr=0.1), weights, 0.4)
    for k, absent in enumerate(pattern):
        found = losses(J[k], x, absent)
        if named:
            found = dict(zip(names, found, strict=True))
        opt.backward(found, accumulate=k < len(pattern) - 1)
    total = torch.zeros(4, 6, dtype=DOUBLE)
    for k, absent in enumerate(pattern):
        for i in {0, 1, 2, 3} - absent:
            total[i] += J[k][i]
    absent = set.intersection(*pattern)
    alpha = witness(total, W4, absent, 0.4, "hard")
    torch.testing.assert_close(x.grad, alpha @ total, rtol=1e-8, atol=1e-10)
    check_report(opt.report, absent)


def test_none_in_every_micro_batch_is_no_update():
    for make in (CAGradClip, MGDA, LinearScalarization):
        x = nn.Parameter(torch.ones(2))
        opt = make(torch.optim.SGD([x], lr=0.1), [0.5, 0.5])
        opt.backward([None, None], accumulate=True)
        opt.backward([None, None])
        assert x.grad is None
        assert opt.report.absent == ("0", "1")
        assert opt.report.coefficients.tolist() == [0, 0]
        str(opt.report)


@pytest.mark.parametrize("mode", ["dense", "ghost"])
@pytest.mark.parametrize("absent", [{0}, {1, 2}], ids=str)
def test_heads_get_the_weighted_sum_of_those_present(mode, absent):
    torch.manual_seed(0)
    trunk, heads = nn.Linear(4, 3).double(), [nn.Linear(3, 1).double() for _ in range(4)]
    parameters = [*trunk.parameters(), *(p for head in heads for p in head.parameters())]
    x = torch.randn(8, 4, dtype=DOUBLE)

    def values():
        z = trunk(x).tanh()
        return [(head(z) - i).square().mean() for i, head in enumerate(heads)]

    J = torch.stack(
        [
            torch.cat(
                [g.flatten() for g in torch.autograd.grad(values()[i], list(trunk.parameters()))]
            )
            for i in range(4)
        ]
    )
    heads_alone = [torch.autograd.grad(values()[i], heads[i].weight)[0] for i in range(4)]
    opt = CAGradClip(
        torch.optim.SGD(parameters, lr=0.1),
        W4,
        0.4,
        shared_parameters=trunk.parameters(),
        gradients=mode,
    )
    opt.backward([None if i in absent else loss for i, loss in enumerate(values())])
    alpha = witness(J, W4, absent, 0.4, "hard")
    found = torch.cat([p.grad.flatten() for p in trunk.parameters()])
    torch.testing.assert_close(found, alpha @ J, rtol=1e-7, atol=1e-10)
    for i, head in enumerate(heads):
        if i in absent:
            assert head.weight.grad is None, "so that weight decay does not move it"
        else:
            torch.testing.assert_close(head.weight.grad, W4[i] * heads_alone[i])


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("mode", ["raise", "skip", "propagate"])
def test_another_loss_is_not_finite(mode, bad):
    J = rows(12)
    J[2, 0] = bad
    x = parameter(J)
    opt = CAGradClip(torch.optim.SGD([x], lr=0.1), W4, 0.4, nonfinite=mode)
    if mode == "raise":
        with pytest.raises(FloatingPointError, match="gradient of loss '2'|loss '2' is NaN"):
            opt.backward(losses(J, x, {1}))
        assert x.grad is None
        return
    opt.backward(losses(J, x, {1}))
    opt.step()
    report = opt.report
    assert report.absent == ("1",)
    assert math.isnan(report.losses[1])
    if mode == "skip":
        assert report.outcome is Outcome.SKIPPED
        assert x.tolist() == [0] * 6
    else:
        assert report.outcome is Outcome.NONFINITE
        assert report.coefficients.tolist() == [0.1, 0, 0.3, 0.4]
        assert not x.grad.isfinite().all()


@pytest.mark.parametrize("mode", ["raise", "skip", "propagate"])
@pytest.mark.parametrize("absent", [{0}, {1, 3}, {0, 1, 2}], ids=str)
def test_all_is_finite_whatever_the_mode(mode, absent):
    J = rows(13)
    x = parameter(J)
    opt = CAGradClip(torch.optim.SGD([x], lr=0.1), W4, 0.4, nonfinite=mode)
    opt.backward(losses(J, x, absent))
    torch.testing.assert_close(
        x.grad, witness(J, W4, absent, 0.4, "hard") @ J, rtol=1e-8, atol=1e-10
    )
    check_report(opt.report, absent)
    assert opt.report.outcome is Outcome.CORRECTED


def test_a_gram_matrix_serves_only_steps_with_the_same_losses_present():
    """An entry of the Gram matrix of an absent loss is zero, not its product with the others."""
    x = parameter(rows(0))
    opt = CAGradClip(torch.optim.SGD([x], lr=0.1), W4, 0.4, gram_every=3)
    # Which are absent, and the step whose Gram matrix serves.
    steps = [({1}, 0), ({1}, 0), ({1}, 0), ({1}, 3), (set(), 4), ({2}, 5), ({2}, 5), ({1}, 7)]
    for k, (absent, of) in enumerate(steps):
        opt.zero_grad()
        J, served = rows(30 + k), rows(30 + of)
        opt.backward(losses(J, x, absent))
        alpha = witness(served, W4, absent, 0.4, "hard")
        torch.testing.assert_close(x.grad, alpha @ J, rtol=1e-8, atol=1e-10)
        assert opt.report.gram_age == k - of
        check_report(opt.report, absent)


@pytest.mark.parametrize("gradients", ["representation", "subset"])
def test_approximate_modes(gradients):
    """H of the surrogates of those present; here the representation is the only parameter."""
    J = rows(14)
    x = parameter(J)
    chosen = "representation" if gradients == "representation" else [x]
    opt = CAGradClip(torch.optim.SGD([x], lr=0.1), W4, 0.4, gradients=chosen)
    z = x * 1
    given = {"representation": z} if gradients == "representation" else {}
    opt.backward(losses(J, z, {0, 2}), **given)
    alpha = witness(J, W4, {0, 2}, 0.4, "hard")
    torch.testing.assert_close(x.grad, alpha @ J, rtol=1e-8, atol=1e-10)
    check_report(opt.report, {0, 2})


def test_per_example_mode():
    torch.manual_seed(0)
    model = nn.Linear(5, 1).double()
    data, shares = torch.randn(6, 5, dtype=DOUBLE), torch.randn(4, 6, dtype=DOUBLE)
    opt = CAGradClip(
        torch.optim.SGD(model.parameters(), lr=0.1), W4, 0.4, gradients="per_example", model=model
    )
    scalars = model(data).squeeze(1)
    opt.backward([None if i == 1 else shares[i] @ scalars for i in range(4)], scalars=scalars)
    J = torch.cat([shares @ data, shares.sum(1, keepdim=True)], dim=1)
    alpha = witness(J, W4, {1}, 0.4, "hard")
    found = torch.cat([p.grad.flatten() for p in model.parameters()])
    torch.testing.assert_close(found, alpha @ J, rtol=1e-7, atol=1e-10)
    assert opt.report.gradients == "per_example"
    check_report(opt.report, {1})


@pytest.mark.parametrize("m", [2, 3])
def test_a_callable_is_never_absent_and_none_is(m):
    J = rows(15, m=m)
    x = parameter(J)
    opt = CAGradClip(torch.optim.SGD([x], lr=0.1), [1 / m] * m, 0.4)
    opt.backward([lambda i=i: J[i] @ x if i else None for i in range(m)][1:] + [None])
    assert opt.report.absent == (str(m - 1),)


def test_steps_with_and_without_a_loss_leave_nothing_behind():
    """The second of two steps is the same whatever was absent from the first."""
    J, found = rows(16), []
    for absent in (set(), {1}, {0, 3}):
        x = parameter(J)
        opt = CAGradClip(torch.optim.SGD([x], lr=0.1), W4, 0.4)
        opt.backward(losses(J, x, absent))
        opt.zero_grad()
        opt.backward(losses(rows(17), x, {2}))
        found.append(bits([x.grad, opt.report.coefficients]))
    assert found[0] == found[1] == found[2]
