"""Losses that are absent from a step take no part in it, and leave the others their correction.

alpha of the losses that are there is W alpha(H, w / W): H their Gram matrix, w their weights,
W the sum of w. The witnesses are the 60-digit minimiser of tests/oracles.py and numbers known by
hand.
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
CLIPS, SOLVERS = ("hard", "soft", "none"), ("exact", "pgd", "slsqp")
# Every way in which some of four losses, and not all, can be absent.
ABSENT = [set(s) for k in (1, 2, 3) for s in itertools.combinations(range(4), k)]
each_absent = pytest.mark.parametrize("absent", ABSENT, ids=str)


def rows(seed, m=4, n=6):
    """Gradients in conflict: a Gram matrix with entries of both signs."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(m, n, generator=generator, dtype=DOUBLE) + torch.eye(m, n, dtype=DOUBLE)


def losses(J, x, absent):
    return [None if i in absent else J[i] @ x + i for i in range(len(J))]


def make(J, method=CAGradClip, weights=W4, c=None, **options):
    x = nn.Parameter(torch.zeros(J.shape[1], dtype=DOUBLE))
    radius = [] if c is None else [c]
    return x, method(torch.optim.SGD([x], lr=0.1), weights, *radius, **options)


def stepped(J, absent, *settings, **options):
    """The gradient and the report of a step on losses whose gradients are the rows."""
    x, opt = make(J, *settings, **options)
    opt.backward(losses(J, x, absent))
    return x.grad, opt.report


def present(absent, m=4):
    return [i for i in range(m) if i not in absent]


def witness(J, absent, weights=W4, c=0.4, clip="hard"):
    """alpha as the specification has it, with zeros for the absent losses."""
    return clipped_alpha(J, weights, c, clip, [i not in absent for i in range(len(J))])


def check(grad, report, J, alpha, tolerance=1e-8):
    torch.testing.assert_close(report.coefficients, alpha, rtol=tolerance, atol=tolerance / 100)
    torch.testing.assert_close(grad, alpha @ J, rtol=tolerance, atol=tolerance / 100)


def check_report(report, absent, *, p=True, clipped=True):
    """What the report says of the absent losses, and that it says something of the others."""
    gone = torch.tensor([i in absent for i in range(len(report.names))])
    assert report.absent == tuple(report.names[i] for i in sorted(absent))
    assert report.coefficients[gone].tolist() == [0] * len(absent)
    assert torch.equal(report.losses.isnan(), gone)
    assert not report.gram[gone].any() and not report.cosines[gone].any()
    for x, there in ((report.p, p), (report.p_clipped, clipped)):
        assert (x is not None) == there
        assert x is None or torch.equal(x.isnan(), gone)
    if p:
        assert float(report.p[~gone].sum()) == pytest.approx(1)


@each_absent
def test_cagrad_clip(absent):
    J = rows(1)
    for i, clip in enumerate(CLIPS):
        solver = SOLVERS[(i + ABSENT.index(absent)) % 3]
        grad, report = stepped(J, absent, clip=clip, solver=solver)
        alpha = witness(J, absent, clip=clip)
        torch.testing.assert_close(report.coefficients, alpha, rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(grad, alpha @ J, rtol=1e-6, atol=1e-6)
        check_report(report, absent)
        assert report.gap <= 1e-6
        assert report.outcome is Outcome.CORRECTED


@each_absent
def test_cagrad(absent):
    J = rows(2)
    for c in (0.4, 1.0, 1.5):
        grad, report = stepped(J, absent, CAGrad, c=c)
        check(grad, report, J, witness(J, absent, c=c, clip="none"), 1e-7)
        check_report(report, absent)
        assert c < 1 or (J[present(absent)] @ grad >= -1e-9).all(), "no loss that is there rises"


def test_cagrad_with_a_large_radius_at_a_point_that_is_critical_for_those_present():
    """Opposed gradients: no direction lowers both. The third, absent, would have offered one."""
    J = torch.tensor([[1.0, 0], [-1, 0], [0, 1]], dtype=DOUBLE)
    grad, report = stepped(J, {2}, CAGrad, [0.5, 0.25, 0.25], c=1.5)
    assert report.coefficients.tolist() == [0, 0, 0]
    assert grad.tolist() == [0, 0]
    assert report.outcome is Outcome.STATIONARY


@each_absent
def test_mgda_is_the_min_norm_point_of_those_present(absent):
    """Where the absent loss counted as a zero gradient, the point would be zero: no update."""
    J, there = rows(3) + 2, present(absent)  # all have a direction in common
    grad, report = stepped(J, absent, MGDA)
    shortest = exact_min_norm((J[there] @ J[there].T).numpy())
    assert float(grad.norm()) == pytest.approx(shortest, rel=1e-9)
    assert shortest > 1
    assert (J[there] @ grad >= shortest**2 * (1 - 1e-9)).all(), "the optimality condition"
    assert report.coefficients[there].sum() == pytest.approx(1)
    check_report(report, absent, clipped=False)


def test_mgda_without_weights():
    J = torch.tensor([[1.0, 0], [0, 0], [0, 3]], dtype=DOUBLE)
    grad, report = stepped(J, {1}, MGDA, None)
    torch.testing.assert_close(grad, torch.tensor([0.9, 0.3], dtype=DOUBLE))
    assert report.absent == ("1",)


class Recording(Rule):
    """Its result has a p and a clipped p."""

    def __call__(self, gram, weights):
        self.given = gram.clone(), list(weights)
        p = gram.new_tensor([1 / len(weights)] * len(weights))
        return MixingCoefficients(2 * p, p=p, p_clipped=p / 2, gap=p.new_zeros(()))


@each_absent
def test_a_rule_is_given_what_belongs_to_those_present(absent):
    """Their Gram matrix, and their weights as the user set them."""
    J, given, rule, there = rows(5), [], Recording(), present(absent)

    def function(gram):
        given.append(gram.clone())
        return torch.arange(1, len(gram) + 1, dtype=DOUBLE)

    k = len(there)
    for chosen, alpha in ((function, range(1, k + 1)), (rule, [2 / k] * k)):
        x = nn.Parameter(torch.zeros(6, dtype=DOUBLE))
        opt = MultiObjectiveOptimizer(torch.optim.SGD([x], lr=0.1), chosen, weights=W4)
        opt.backward(losses(J, x, absent))
        assert opt.report.coefficients[there].tolist() == list(alpha)
        torch.testing.assert_close(x.grad, torch.tensor(alpha, dtype=DOUBLE) @ J[there])
        check_report(opt.report, absent, p=chosen is rule, clipped=chosen is rule)
    assert len(given) == 1
    for gram in (given[0], rule.given[0]):
        torch.testing.assert_close(gram, J[there] @ J[there].T)
    assert rule.given[1] == [W4[i] for i in there]


# --- Limits --------------------------------------------------------------------------------------


@each_absent
def test_without_a_radius_alpha_is_the_users_weights_to_the_bit(absent):
    J = rows(7)
    expected = [0.0 if i in absent else w for i, w in enumerate(W4)]
    for method, c in ((CAGradClip, 0.0), (CAGrad, 0.0), (LinearScalarization, None)):
        grad, report = stepped(J, absent, method, c=c)
        assert report.coefficients.tolist() == expected
        alpha = torch.tensor(expected, dtype=DOUBLE)
        torch.testing.assert_close(grad, alpha @ J, rtol=1e-12, atol=1e-12)
        linear = method is LinearScalarization
        check_report(report, absent, p=not linear, clipped=not linear)
        assert linear or report.outcome is Outcome.WEIGHTED_SUM


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


@pytest.mark.parametrize("clip", CLIPS)
@pytest.mark.parametrize("there", [0, 1])
def test_one_of_two_is_lengthened_by_the_radius(there, clip):
    """p = w / W = 1, so alpha = w (1 + c): a loss on its own, times its weight."""
    J, weights = rows(8, m=2), [0.3, 0.7]
    grad, report = stepped(J, {1 - there}, CAGradClip, weights, c=0.5, clip=clip)
    torch.testing.assert_close(grad, 1.5 * weights[there] * J[there], rtol=1e-14, atol=0)
    assert report.p[there] == 1
    check_report(report, {1 - there})


@pytest.mark.parametrize("c", [0.0, 0.4])
@pytest.mark.parametrize("clip", CLIPS)
def test_those_present_have_no_weight(c, clip):
    """W = 0: g0 = 0, and the step is that of a stationary point."""
    J = rows(9, m=3)
    grad, report = stepped(J, {1}, CAGradClip, [0.0, 1.0, 0.0], c=c, clip=clip)
    assert grad.tolist() == [0] * 6
    assert report.outcome is Outcome.STATIONARY
    check_report(report, {1})


def test_one_without_weight_among_those_present():
    """It still takes part in the subproblem: with clipping "none" it may get all of p."""
    J, weights = rows(10), [0.0, 0.5, 0.25, 0.25]
    for clip in ("hard", "none"):
        grad, report = stepped(J, {2}, CAGradClip, weights, c=0.4, clip=clip)
        check(grad, report, J, witness(J, {2}, weights, clip=clip))


@pytest.mark.parametrize("scale", [1e-150, 1.0, 1e150])
def test_scale_of_the_losses_does_not_matter(scale):
    J = rows(11)
    _, report = stepped(J * scale, {1, 3})
    torch.testing.assert_close(report.coefficients, witness(J, {1, 3}), rtol=1e-8, atol=1e-10)


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
def test_a_loss_is_absent_if_no_micro_batch_has_it(pattern, named):
    J = [rows(20 + k) for k in range(len(pattern))]
    x, opt = make(J[0], weights=dict(zip("abcd", W4, strict=True)) if named else W4)
    total = torch.zeros(4, 6, dtype=DOUBLE)
    for k, absent in enumerate(pattern):
        found = losses(J[k], x, absent)
        total[present(absent)] += J[k][present(absent)]
        found = dict(zip("abcd", found, strict=True)) if named else found
        opt.backward(found, accumulate=k < len(pattern) - 1)
    absent = set.intersection(*pattern)
    check(x.grad, opt.report, total, witness(total, absent))
    check_report(opt.report, absent)


def test_none_in_every_micro_batch_is_no_update():
    for method in (CAGradClip, MGDA, LinearScalarization):
        x, opt = make(rows(0, m=2), method, [0.5, 0.5])
        opt.backward([None, None], accumulate=True)
        opt.backward([None, None])
        assert x.grad is None
        assert opt.report.absent == ("0", "1")
        assert opt.report.coefficients.tolist() == [0, 0]
        str(opt.report)
        opt.step()
        assert not x.any()


@pytest.mark.parametrize(("mode", "absent"), [("dense", {0}), ("dense", {1, 2}), ("ghost", {1, 2})])
def test_heads_get_the_weighted_sum_of_those_present(mode, absent):
    trunk, heads = nn.Linear(4, 3).double(), [nn.Linear(3, 1).double() for _ in range(4)]
    shared, x = list(trunk.parameters()), torch.randn(8, 4, dtype=DOUBLE)

    def values():
        z = trunk(x).tanh()
        return [(head(z) - i).square().mean() for i, head in enumerate(heads)]

    def flat(grads):
        return torch.cat([g.flatten() for g in grads])

    J = torch.stack(
        [flat(torch.autograd.grad(loss, shared, retain_graph=True)) for loss in values()]
    )
    heads_alone = [torch.autograd.grad(values()[i], heads[i].weight)[0] for i in range(4)]
    inner = torch.optim.SGD([*shared, *(p for head in heads for p in head.parameters())], lr=0.1)
    opt = CAGradClip(inner, W4, 0.4, shared_parameters=shared, gradients=mode)
    opt.backward([None if i in absent else loss for i, loss in enumerate(values())])
    alpha = witness(J, absent)
    torch.testing.assert_close(flat(p.grad for p in shared), alpha @ J, rtol=1e-7, atol=1e-10)
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
    x, opt = make(J, nonfinite=mode)
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


@pytest.mark.parametrize("mode", ["skip", "propagate"])  # "raise" is the default
@pytest.mark.parametrize("absent", [{0}, {1, 3}, {0, 1, 2}], ids=str)
def test_an_absent_loss_is_not_taken_for_a_bad_one(mode, absent):
    J = rows(13)
    grad, report = stepped(J, absent, nonfinite=mode)
    check(grad, report, J, witness(J, absent))
    check_report(report, absent)
    assert report.outcome is Outcome.CORRECTED


def test_a_gram_matrix_serves_only_steps_with_the_same_losses_present():
    """An entry of the Gram matrix of an absent loss is zero, not its product with the others."""
    x, opt = make(rows(0), gram_every=3)
    # Which are absent, and the step whose Gram matrix serves.
    steps = [({1}, 0), ({1}, 0), ({1}, 0), ({1}, 3), (set(), 4), ({2}, 5), ({2}, 5), ({1}, 7)]
    for k, (absent, of) in enumerate(steps):
        opt.zero_grad()
        J = rows(30 + k)
        opt.backward(losses(J, x, absent))
        check(x.grad, opt.report, J, witness(rows(30 + of), absent))
        assert opt.report.gram_age == k - of
        check_report(opt.report, absent)


@pytest.mark.parametrize("gradients", ["representation", "subset"])
def test_approximate_modes(gradients):
    """H of the surrogates of those present; here the representation is the only parameter."""
    J = rows(14)
    x = nn.Parameter(torch.zeros(6, dtype=DOUBLE))
    chosen = "representation" if gradients == "representation" else [x]
    opt = CAGradClip(torch.optim.SGD([x], lr=0.1), W4, 0.4, gradients=chosen)
    z = x * 1
    given = {"representation": z} if gradients == "representation" else {}
    opt.backward(losses(J, z, {0, 2}), **given)
    check(x.grad, opt.report, J, witness(J, {0, 2}))
    check_report(opt.report, {0, 2})


def test_per_example_mode():
    model = nn.Linear(5, 1).double()
    data, shares = torch.randn(6, 5, dtype=DOUBLE), torch.randn(4, 6, dtype=DOUBLE)
    inner = torch.optim.SGD(model.parameters(), lr=0.1)
    opt = CAGradClip(inner, W4, 0.4, gradients="per_example", model=model)
    scalars = model(data).squeeze(1)
    opt.backward([None if i == 1 else shares[i] @ scalars for i in range(4)], scalars=scalars)
    J = torch.cat([shares @ data, shares.sum(1, keepdim=True)], dim=1)
    found = torch.cat([p.grad.flatten() for p in model.parameters()])
    torch.testing.assert_close(found, witness(J, {1}) @ J, rtol=1e-7, atol=1e-10)
    assert opt.report.gradients == "per_example"
    check_report(opt.report, {1})


@pytest.mark.parametrize("m", [2, 3])
def test_a_callable_is_never_absent_and_none_is(m):
    J = rows(15, m=m)
    x, opt = make(J, weights=[1 / m] * m)
    opt.backward([*(lambda i=i: J[i] @ x for i in range(1, m)), None])
    assert opt.report.absent == (str(m - 1),)


def test_steps_with_and_without_a_loss_leave_nothing_behind():
    """The second of two steps is the same whatever was absent from the first."""
    J, found = rows(16), []
    for absent in (set(), {1}, {0, 3}):
        x, opt = make(J)
        opt.backward(losses(J, x, absent))
        opt.zero_grad()
        opt.backward(losses(rows(17), x, {2}))
        found.append(bits([x.grad, opt.report.coefficients]))
    assert found[0] == found[1] == found[2]
