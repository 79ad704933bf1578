r"""Theorems 3.1 and 3.2 of arXiv 2602.02495 and the inequality below both, as executable tests.

One step is theta' = theta - eta G0 with G0 = g0 + c |g0| u and |u| = 1; let rho = cos(g0, u). For
an L-smooth weighted loss L_w the descent lemma reads

    L_w(theta') <= L_w(theta) - eta |g0|^2 Gamma(rho),
    Gamma(rho) = 1 + c rho - (L eta / 2) (1 + c^2 + 2 c rho)  >=  (1 - c^2) / 2   for eta <= 1 / L.

Summed over T steps of non-negative losses, with M(theta) <= |g0|, that is Theorem 3.1. Theorem 3.2
compares Gamma at the rho of the clipped and of the plain correction.
"""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.optimize import minimize_scalar

from benchmarks.problems import convex_quadratics, fonseca_fleming
from raco_optim import MGDA, CAGrad, CAGradClip, LinearScalarization, mixing_coefficients
from raco_optim.pareto import pareto_criticality
from tests.problems_nn import flat_grad, jacobian

unit = st.floats(0, 1)
radius = st.floats(0, 0.99)


def gamma(rho, c, smoothness_times_rate):
    return 1 + c * rho - smoothness_times_rate / 2 * (1 + c**2 + 2 * c * rho)


def random_tensor(seed, *shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def random_weights(seed, m):
    return random_tensor(seed, m).softmax(dim=0)


def cosine(gram, a, b):
    """cos(sum_i a_i g_i, sum_i b_i g_i)."""
    return (a @ gram @ b / ((a @ gram @ a) * (b @ gram @ b)).sqrt()).item()


# Smooth non-negative losses: (losses, L, theta_0)
def random_quadratics(seed, m):
    centres = random_tensor(seed, m, 4)
    curvatures = 0.1 + 5 * torch.rand_like(centres)
    problem = convex_quadratics(centres.tolist(), curvatures.tolist())
    return problem.losses, curvatures.max().item(), 3 * random_tensor(seed + 1, 4)


def bounded_losses(seed, m):
    # The Hessian of 1 - exp(-r^2) has the eigenvalues 2 exp(-r^2) and (2 - 4 r^2) exp(-r^2), both
    # within [-2, 2].
    assert m == 2
    return fonseca_fleming(dimension=3).losses, 2.0, random_tensor(seed, 3)


def preference_losses(seed, m):
    """What DPO minimises, for a linear model: m labels of each pair, drawn independently."""
    features, labels = random_tensor(seed, 20, 4), random_tensor(seed + 1, m, 20).sign()
    # softplus'' <= 1/4
    smoothness = torch.linalg.eigvalsh(features.T @ features / 20)[-1].item() / 4

    def losses(theta):
        margins = features @ theta
        return [torch.nn.functional.softplus(-label * margins).mean() for label in labels]

    return losses, smoothness, 5 * random_tensor(seed + 2, 4)


FAMILIES = [
    pytest.param(random_quadratics, 2, id="quadratics-2"),
    pytest.param(random_quadratics, 5, id="quadratics-5"),
    pytest.param(bounded_losses, 2, id="bounded-2"),
    pytest.param(preference_losses, 3, id="preferences-3"),
]


def descend(losses, theta_0, weights, c, rate, steps, clip="hard"):
    """Reports of `steps` steps of gradient descent, and the weighted losses before and after."""
    theta = torch.nn.Parameter(theta_0.clone())
    optimizer = CAGradClip(torch.optim.SGD([theta], lr=rate), weights.tolist(), c, clip=clip)
    reports, values = [], []
    for _ in range(steps):
        optimizer.zero_grad()
        optimizer.backward(losses(theta))
        optimizer.step()
        reports.append(optimizer.report)
        values.append((weights @ optimizer.report.losses).item())
    with torch.no_grad():
        values.append((weights @ torch.stack(losses(theta))).item())
    return reports, values


@pytest.mark.parametrize("clip", ["hard", "soft", "none"])
def test_the_correction_has_exactly_the_length_of_its_trust_region(clip):
    for seed in range(12):
        gradients = random_tensor(seed, 3 + seed % 4, 8)
        gram, weights = gradients @ gradients.T, random_weights(seed, len(gradients))
        mixing = mixing_coefficients(gram, weights.tolist(), 0.7, clip=clip)
        correction = (mixing.coefficients - weights) @ gradients
        g0 = weights @ gradients
        assert correction.norm().item() == pytest.approx(0.7 * g0.norm().item(), rel=1e-9)


@pytest.mark.parametrize("rate", [1.0, 0.3])
@pytest.mark.parametrize("c", [0.0, 0.4, 0.9])
@pytest.mark.parametrize(("family", "m"), FAMILIES)
def test_theorem_3_1_bounds_the_smallest_criticality_after_every_step(family, m, c, rate):
    """And each step descends as far as the descent lemma promises."""
    losses, smoothness, theta_0 = family(10, m)
    weights, eta = random_weights(1, m), rate / smoothness
    reports, values = descend(losses, theta_0, weights, c, eta, steps=25)
    smallest = math.inf
    for steps, report in enumerate(reports, start=1):
        before, after = values[steps - 1 : steps + 1]
        squared = (weights @ report.gram @ weights).item()
        promised = eta * squared * gamma(cosine(report.gram, weights, report.p_clipped), c, rate)
        assert after <= before - promised + 1e-12 * before
        assert promised >= eta * squared * (1 - c**2) / 2 * (1 - 1e-12)
        smallest = min(smallest, pareto_criticality(report.gram).item() ** 2)
        assert smallest <= 2 * values[0] / (eta * (1 - c**2) * steps)


@given(st.floats(-1, 1), radius, unit)
def test_gamma_is_at_least_half_of_one_minus_c_squared(rho, c, smoothness_times_rate):
    """And equal to it at the largest step, for every rho."""
    assert gamma(rho, c, smoothness_times_rate) >= (1 - c**2) / 2 - 1e-15
    assert gamma(rho, c, 1.0) == pytest.approx((1 - c**2) / 2, abs=1e-15)


def test_theorem_3_1_needs_its_step_size():
    """The bound has content: with a step of 4 / L it fails, on a parabola."""
    losses = convex_quadratics([[0.0]], [[1.0]]).losses
    theta_0, weights = torch.ones(1, dtype=torch.float64), torch.ones(1, dtype=torch.float64)
    reports, values = descend(losses, theta_0, weights, 0.4, rate=4.0, steps=10)
    smallest = min(pareto_criticality(report.gram).item() ** 2 for report in reports)
    assert smallest > 2 * values[0] / (4.0 * (1 - 0.4**2) * len(reports))


# Theorem 3.2
def one_step_decrease(optimizer_class, centres, weights, c, smoothness, rate):
    """L_w(theta) - L_w(theta') for L_i = L |theta - z_i|^2 / 2, whose L_w has the Hessian L 1."""
    theta = torch.nn.Parameter(torch.zeros(centres.shape[1], dtype=torch.float64))
    optimizer = optimizer_class(torch.optim.SGD([theta], lr=rate), weights.tolist(), c)

    def losses():
        return [smoothness / 2 * ((theta - z) ** 2).sum() for z in centres]

    before = weights @ torch.stack(losses()).detach()
    optimizer.backward(losses())
    optimizer.step()
    return (before - weights @ torch.stack(losses()).detach()).item(), optimizer.report


@pytest.mark.parametrize("seed", range(0, 20, 2))
def test_theorem_3_2_is_the_measured_gain_where_the_descent_lemma_is_an_equality(seed):
    smoothness, c = 2.0, 0.5
    rate = (0.1 + 0.045 * seed) / smoothness
    centres, weights = random_tensor(seed, 2, 3), random_weights(seed, 2)
    setting = (centres, weights, c, smoothness, rate)
    clipped, report = one_step_decrease(CAGradClip, *setting)
    plain, _ = one_step_decrease(CAGrad, *setting)
    rho = cosine(report.gram, weights, report.p)
    rho_clipped = cosine(report.gram, weights, report.p_clipped)
    squared = (weights @ report.gram @ weights).item()
    tolerance = {"rel": 1e-9, "abs": 1e-12 * squared}
    unit_decrease, step = rate * squared, smoothness * rate
    assert clipped == pytest.approx(unit_decrease * gamma(rho_clipped, c, step), **tolerance)
    assert plain == pytest.approx(unit_decrease * gamma(rho, c, step), **tolerance)
    gain = unit_decrease * c * (1 - step) * (rho_clipped - rho)
    assert clipped - plain == pytest.approx(gain, **tolerance)


@given(st.floats(-1, 1), st.floats(-1, 1), radius, unit)
def test_theorem_3_2_is_an_identity(rho, rho_clipped, c, smoothness_times_rate):
    difference = gamma(rho_clipped, c, smoothness_times_rate) - gamma(rho, c, smoothness_times_rate)
    expected = c * (1 - smoothness_times_rate) * (rho_clipped - rho)
    assert difference == pytest.approx(expected, abs=1e-15)


@given(st.integers(0, 10**6), unit, st.floats(0.01, 0.99))
def test_with_two_losses_clipping_never_turns_the_correction_away_from_g0(seed, first, c):
    gradients, weights = random_tensor(seed, 2, 3), torch.tensor([first, 1 - first]).double()
    gram = gradients @ gradients.T
    mixing = mixing_coefficients(gram, weights.tolist(), c)
    if mixing.p_clipped.any():
        rho = cosine(gram, weights, mixing.p)
        assert cosine(gram, weights, mixing.p_clipped) >= rho - 1e-9


def test_the_strict_witness_of_theorem_3_2():
    gradients = torch.tensor([[1.0, -4.0], [-1.0, 1.0]], dtype=torch.float64)
    gram, weights, c = gradients @ gradients.T, torch.tensor([0.2, 0.8]).double(), 0.5
    mixing = mixing_coefficients(gram, weights.tolist(), c)

    def subproblem(first):
        mixture, g0 = torch.tensor([first, 1 - first]).double() @ gradients, weights @ gradients
        return (mixture @ g0 + c * g0.norm() * mixture.norm()).item()

    line = minimize_scalar(subproblem, bounds=(0, 1), method="bounded", options={"xatol": 1e-10})
    assert mixing.p[0].item() == pytest.approx(line.x, abs=1e-6)
    assert mixing.p.tolist() == pytest.approx([0.3561, 0.6439], abs=5e-5)
    assert mixing.p_clipped.tolist() == pytest.approx([0.2, 0.6439], abs=5e-5)
    assert cosine(gram, weights, mixing.p) == pytest.approx(0.34578, abs=5e-6)
    assert cosine(gram, weights, mixing.p_clipped) == pytest.approx(0.94333, abs=5e-6)


def test_theorem_3_2_does_not_extend_to_three_losses():
    """Clipping can turn the correction away from g0, as one sees by hand.

    g0 = (-0.4, 0.8), and p = (0, 0.4, 0.6) gives G_p = (-0.2, 0.4), parallel to it: rho = 1. It is
    the minimiser, because g_i.G_p is 0.6 for the first loss and 0.2 for the two on its support.
    Clipped, (0, 0.3, 0.2) gives G~ = (0.1, 0.3), at 45 degrees to g0.
    """
    gradients = torch.tensor([[-1.0, 1.0], [1.0, 1.0], [-1.0, 0.0]], dtype=torch.float64)
    gram, weights = gradients @ gradients.T, torch.tensor([0.5, 0.3, 0.2]).double()
    mixing = mixing_coefficients(gram, weights.tolist(), 0.5)
    assert mixing.p.tolist() == pytest.approx([0.0, 0.4, 0.6], abs=1e-7)
    assert mixing.p_clipped.tolist() == pytest.approx([0.0, 0.3, 0.2], abs=1e-7)
    assert cosine(gram, weights, mixing.p) == pytest.approx(1.0)
    assert cosine(gram, weights, mixing.p_clipped) == pytest.approx(math.sqrt(0.5))


# Limit cases, on trained parameters
INPUTS, TARGETS = random_tensor(5, 32, 4), random_tensor(6, 32, 3)
WEIGHTS = [0.5, 0.3, 0.2]


def column_losses(model):
    return list(((model(INPUTS) - TARGETS) ** 2).mean(dim=0).unbind())


def adam(model):
    return torch.optim.AdamW(model.parameters(), lr=0.01)


def trained(wrap, losses=column_losses):
    """Parameters after 20 steps; a function that returns no list is trained on by torch alone."""
    torch.manual_seed(3)
    layers = torch.nn.Linear(4, 8), torch.nn.Tanh(), torch.nn.Linear(8, 3)
    model = torch.nn.Sequential(*layers).double()
    optimizer = wrap(adam(model))
    for _ in range(20):
        optimizer.zero_grad()
        found = losses(model)
        if isinstance(found, list):
            optimizer.backward(found)
        else:
            found.backward()
        optimizer.step()
    return torch.nn.utils.parameters_to_vector(model.parameters()).detach()


def trained_on(loss):
    return trained(lambda inner: inner, loss)


def assert_same_training(actual, expected):
    torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("clip", ["hard", "soft", "none"])
def test_without_a_radius_training_is_that_of_the_weighted_sum(clip):
    actual = trained(lambda inner: CAGradClip(inner, WEIGHTS, 0.0, clip=clip))
    assert torch.equal(actual, trained(lambda inner: LinearScalarization(inner, WEIGHTS)))
    weighted = torch.tensor(WEIGHTS, dtype=torch.float64)
    assert_same_training(actual, trained_on(lambda n: weighted @ torch.stack(column_losses(n))))


@pytest.mark.parametrize("m", [1, 4])
def test_identical_losses_train_on_that_loss_with_one_plus_c_times_its_gradient(m):
    weights, c = random_weights(0, m).tolist(), 0.4
    wrap, first = lambda inner: CAGradClip(inner, weights, c), lambda n: column_losses(n)[0]
    actual = trained(wrap, lambda n: [first(n)] * m)
    assert_same_training(actual, trained_on(lambda n: (1 + c) * first(n)))


@pytest.mark.parametrize(
    "method", [CAGradClip, CAGrad, MGDA, LinearScalarization], ids=lambda method: method.__name__
)
def test_the_order_of_the_losses_does_not_matter(method):
    order = [2, 0, 1]
    actual = trained(
        lambda inner: method(inner, [WEIGHTS[i] for i in order]),
        lambda n: [column_losses(n)[i] for i in order],
    )
    assert_same_training(actual, trained(lambda inner: method(inner, WEIGHTS)))


def test_a_loss_without_weight_does_not_turn_the_update():
    """The aim of clipping: p~_2 = min(p_2, 0), so G0 is g_1 or (1 + c) g_1; CAGrad leaves g_1."""
    model, c = torch.nn.Linear(4, 3).double(), 0.8

    def gradient(optimizer_class):
        model.zero_grad()
        first, second, _ = column_losses(model)
        losses = [first, -first + 0.1 * second]
        optimizer_class(adam(model), [1.0, 0.0], c).backward(losses)
        return flat_grad(model)

    alone = jacobian(model, lambda: column_losses(model)[:1])[0]
    length = (gradient(CAGradClip).norm() / alone.norm()).item()
    assert min(abs(length - 1), abs(length - 1 - c)) < 1e-9
    torch.testing.assert_close(gradient(CAGradClip), length * alone)
    assert torch.cosine_similarity(gradient(CAGrad), alone, dim=0) < 0.98


def test_mgda_of_two_losses_in_closed_form():
    """p = clamp((|g2|^2 - <g1, g2>) / |g1 - g2|^2, 0, 1), Desideri 2012; a third one may follow."""
    model = torch.nn.Linear(4, 3).double()
    opt = MGDA(torch.optim.SGD(model.parameters(), lr=0.1))
    for m in (2, 3, 2):
        J = jacobian(model, lambda m=m: column_losses(model)[:m])
        opt.zero_grad()
        opt.backward(column_losses(model)[:m])
        d = flat_grad(model)
        assert opt.report.gram.shape == (m, m)
        assert (J @ d >= (d @ d) * (1 - 1e-9)).all(), "the projection of zero on the hull"
        if m == 2:
            p = ((J[1] @ J[1] - J[0] @ J[1]) / (J[0] - J[1]).square().sum()).clamp(0, 1)
            torch.testing.assert_close(d, p * J[0] + (1 - p) * J[1], rtol=1e-10, atol=1e-12)
