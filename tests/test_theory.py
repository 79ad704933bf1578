r"""Theorems 3.1 and 3.2 of arXiv 2602.02495 and the inequality below both, as executable tests.

One step is theta' = theta - eta G0 with G0 = g0 + c |g0| u and |u| = 1; let rho = cos(g0, u). For
an L-smooth weighted loss L_w the descent lemma reads

    L_w(theta') <= L_w(theta) - eta |g0|^2 Gamma(rho),
    Gamma(rho) = 1 + c rho - (L eta / 2) (1 + c^2 + 2 c rho)  >=  (1 - c^2) / 2   for eta <= 1 / L.

Summed over T steps of non-negative losses, with M(theta) <= |g0|, that is Theorem 3.1. Theorem 3.2
compares Gamma at the rho of the clipped and of the plain correction.
"""

import copy
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.optimize import minimize_scalar

from benchmarks.problems import convex_quadratics, fonseca_fleming
from raco_optim import MGDA, CAGrad, CAGradClip, LinearScalarization, mixing_coefficients
from raco_optim.pareto import pareto_criticality

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


# The descent inequality


@pytest.mark.parametrize("clip", ["hard", "soft", "none"])
@pytest.mark.parametrize("seed", range(20))
def test_the_correction_has_exactly_the_length_of_its_trust_region(seed, clip):
    gradients = random_tensor(seed, 3 + seed % 4, 8)
    gram, weights = gradients @ gradients.T, random_weights(seed, len(gradients))
    mixing = mixing_coefficients(gram, weights.tolist(), 0.7, clip=clip)
    correction = (mixing.coefficients - weights) @ gradients
    g0 = weights @ gradients
    assert correction.norm().item() == pytest.approx(0.7 * g0.norm().item(), rel=1e-9)


@pytest.mark.parametrize("rate", [1.0, 0.3])
@pytest.mark.parametrize("c", [0.0, 0.4, 0.9])
@pytest.mark.parametrize(("family", "m"), FAMILIES)
def test_every_step_descends_by_what_the_descent_lemma_promises(family, m, c, rate):
    losses, smoothness, theta_0 = family(0, m)
    weights = random_weights(1, m)
    reports, values = descend(losses, theta_0, weights, c, rate / smoothness, steps=25)
    for report, before, after in zip(reports, values, values[1:], strict=False):
        squared = (weights @ report.gram @ weights).item()
        rho = cosine(report.gram, weights, report.p_clipped)
        promised = rate / smoothness * squared * gamma(rho, c, rate)
        assert after <= before - promised + 1e-12 * before
        assert promised >= rate / smoothness * squared * (1 - c**2) / 2 * (1 - 1e-12)


@given(st.floats(-1, 1), radius, unit)
def test_gamma_is_at_least_half_of_one_minus_c_squared(rho, c, smoothness_times_rate):
    assert gamma(rho, c, smoothness_times_rate) >= (1 - c**2) / 2 - 1e-15


@given(st.floats(-1, 1), radius)
def test_that_bound_is_attained_at_the_largest_step_for_every_rho(rho, c):
    assert gamma(rho, c, 1.0) == pytest.approx((1 - c**2) / 2, abs=1e-15)


# Theorem 3.1


@pytest.mark.parametrize("rate", [1.0, 0.3])
@pytest.mark.parametrize("c", [0.0, 0.4, 0.9])
@pytest.mark.parametrize(("family", "m"), FAMILIES)
@pytest.mark.parametrize("seed", [10, 20])
def test_theorem_3_1_bounds_the_smallest_criticality_after_every_step(family, m, seed, c, rate):
    losses, smoothness, theta_0 = family(seed, m)
    eta = rate / smoothness
    reports, values = descend(losses, theta_0, random_weights(seed, m), c, eta, steps=25)
    smallest = math.inf
    for steps, report in enumerate(reports, start=1):
        smallest = min(smallest, pareto_criticality(report.gram).item() ** 2)
        assert smallest <= 2 * values[0] / (eta * (1 - c**2) * steps)


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


@pytest.mark.parametrize("seed", range(20))
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


def network():
    torch.manual_seed(3)
    return torch.nn.Sequential(
        torch.nn.Linear(4, 8), torch.nn.Tanh(), torch.nn.Linear(8, 3)
    ).double()


INPUTS, TARGETS = random_tensor(5, 32, 4), random_tensor(6, 32, 3)
WEIGHTS = [0.5, 0.3, 0.2]
INNER = {
    "SGD": lambda parameters: torch.optim.SGD(parameters, lr=0.1, momentum=0.9),
    "AdamW": lambda parameters: torch.optim.AdamW(parameters, lr=0.01),
}


def column_losses(model):
    return list(((model(INPUTS) - TARGETS) ** 2).mean(dim=0).unbind())


def trained(model, wrap, losses=column_losses, steps=20):
    """Parameters after training a copy of the model, as one vector."""
    model = copy.deepcopy(model)
    optimizer = wrap(model.parameters())
    for _ in range(steps):
        optimizer.zero_grad()
        optimizer.backward(losses(model))
        optimizer.step()
    return torch.nn.utils.parameters_to_vector(model.parameters()).detach()


def trained_on_one_loss(model, inner, loss, steps=20):
    """The same with nothing of raco_optim."""
    model = copy.deepcopy(model)
    optimizer = inner(model.parameters())
    for _ in range(steps):
        optimizer.zero_grad()
        loss(model).backward()
        optimizer.step()
    return torch.nn.utils.parameters_to_vector(model.parameters()).detach()


def assert_same_training(actual, expected):
    torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("inner", INNER.values(), ids=INNER)
@pytest.mark.parametrize("clip", ["hard", "soft", "none"])
def test_without_a_radius_training_is_that_of_the_weighted_sum(inner, clip):
    model = network()
    actual = trained(model, lambda p: CAGradClip(inner(p), WEIGHTS, 0.0, clip=clip))
    assert torch.equal(actual, trained(model, lambda p: LinearScalarization(inner(p), WEIGHTS)))

    def weighted_sum(model):
        return sum(w * loss for w, loss in zip(WEIGHTS, column_losses(model), strict=True))

    assert_same_training(actual, trained_on_one_loss(model, inner, weighted_sum))


@pytest.mark.parametrize("inner", INNER.values(), ids=INNER)
@pytest.mark.parametrize("m", [1, 4])
def test_identical_losses_train_on_that_loss_with_one_plus_c_times_its_gradient(inner, m):
    def total(model):
        return column_losses(model)[0]

    model, weights, c = network(), random_weights(0, m).tolist(), 0.4
    actual = trained(model, lambda p: CAGradClip(inner(p), weights, c), lambda n: [total(n)] * m)
    assert_same_training(actual, trained_on_one_loss(model, inner, lambda n: (1 + c) * total(n)))


@pytest.mark.parametrize(
    "method",
    [
        lambda inner, weights: CAGradClip(inner, weights, 0.4),
        lambda inner, weights: CAGrad(inner, weights, 0.4),
        lambda inner, weights: MGDA(inner),
        lambda inner, weights: LinearScalarization(inner, weights),
    ],
    ids=["CAGradClip", "CAGrad", "MGDA", "LinearScalarization"],
)
@pytest.mark.parametrize("inner", INNER.values(), ids=INNER)
def test_the_order_of_the_losses_does_not_matter(inner, method):
    order, model = [2, 0, 1], network()
    shuffled_weights = [WEIGHTS[i] for i in order]
    actual = trained(
        model,
        lambda p: method(inner(p), shuffled_weights),
        lambda n: [column_losses(n)[i] for i in order],
    )
    assert_same_training(actual, trained(model, lambda p: method(inner(p), WEIGHTS)))


def test_a_loss_without_weight_does_not_turn_the_update():
    """What clipping is for: p~_2 = min(p_2, 0), so G0 is g_1 or (1 + c) g_1; CAGrad leaves g_1."""
    model, c = network(), 0.8

    def gradient(optimizer_class):
        copied = copy.deepcopy(model)
        inner = torch.optim.SGD(copied.parameters(), lr=0.1)
        optimizer = optimizer_class(inner, [1.0, 0.0], c)
        first, second, _ = column_losses(copied)
        optimizer.backward([first, -first + 0.1 * second])
        return torch.cat([p.grad.flatten() for p in copied.parameters()])

    first = torch.autograd.grad(column_losses(model)[0], list(model.parameters()))
    alone = torch.cat([g.flatten() for g in first])
    length = (gradient(CAGradClip).norm() / alone.norm()).item()
    assert min(abs(length - 1), abs(length - 1 - c)) < 1e-9
    torch.testing.assert_close(gradient(CAGradClip), length * alone)
    assert torch.cosine_similarity(gradient(CAGrad), alone, dim=0) < 0.98
