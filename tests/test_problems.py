"""The toy problems are what they claim, and real optimizers reach what theory says they reach.

With c < 1 the updates of CAGrad and CAGrad-Clip vanish exactly where the gradient of the weighted
loss L_w does, and Theorem 3.1 makes that the limit of gradient descent with a step <= 1 / L. So:
on a convex front they must reach the one solution of the weights; on a concave front, *a* critical
point of L_w, which is on the front but says little of the weights; MGDA a Pareto-critical point.
"""

import math

import pytest
import torch

from benchmarks.problems import PROBLEMS, cagrad_toy, convex_quadratics, dtlz2, fonseca_fleming
from raco_optim import MGDA, CAGrad, CAGradClip, LinearScalarization, gram_matrix
from raco_optim.pareto import pareto_criticality, pareto_front

WEIGHTED = {
    "CAGradClip": lambda inner, weights: CAGradClip(inner, weights, c=0.4),
    "CAGrad": lambda inner, weights: CAGrad(inner, weights, c=0.4),
    "LinearScalarization": LinearScalarization,
}
PAIRS = [[0.1, 0.9], [0.5, 0.5], [0.7, 0.3]]
PAIR, PAIR_SMOOTHNESS = convex_quadratics(), 4.0
TRIPLE_SMOOTHNESS = 5.0
TRIPLE = convex_quadratics(
    [[-2.0, 1.0, 0.0], [2.0, 0.0, 1.0], [0.0, 3.0, -1.0]],
    [[1.0, 4.0, 2.0], [3.0, 1.0, 1.0], [2.0, 2.0, 5.0]],
)

by_name = pytest.mark.parametrize("problem", PROBLEMS, ids=lambda problem: problem.name)
by_weighted_method = pytest.mark.parametrize("method", WEIGHTED.values(), ids=WEIGHTED)


def float64(values):
    return torch.tensor(values, dtype=torch.float64)


def assert_close(actual, expected, tolerance):
    torch.testing.assert_close(actual, expected, rtol=0, atol=tolerance)


def values_at(problem, theta):
    return torch.stack(problem.losses(theta), dim=-1)


def gradients_at(problem, theta):
    return torch.autograd.functional.jacobian(lambda t: values_at(problem, t), theta)


def criticality_at(problem, theta):
    return pareto_criticality(gram_matrix([[g] for g in gradients_at(problem, theta)])).item()


def distance_at(problem, theta):
    return problem.distance(values_at(problem, theta)[None]).item()


def mgda(inner, weights):
    return MGDA(inner)


def descend(problem, start, method, weights, steps, rate, inner=torch.optim.SGD):
    """Values of theta, from the start to the end."""
    theta = torch.nn.Parameter(start.clone())
    optimizer = method(inner([theta], lr=rate), weights)
    path = [start]
    for _ in range(steps):
        optimizer.zero_grad()
        optimizer.backward(problem.losses(theta))
        optimizer.step()
        path.append(theta.detach().clone())
    return path


# The problems


@by_name
def test_shapes_are_those_of_the_interface(problem):
    assert problem.starts.shape[1:] == (problem.dimension,)
    scalars = problem.losses(problem.starts[0])
    assert len(scalars) == problem.m
    assert all(loss.shape == () and loss.dtype == torch.float64 for loss in scalars)
    assert torch.equal(values_at(problem, problem.starts)[0], torch.stack(scalars))
    assert problem.front(7).shape == (7, problem.m)
    assert problem.front(7).dtype == torch.float64


@by_name
def test_no_point_of_the_front_dominates_another_and_starts_are_off_it(problem):
    assert pareto_front(problem.front(501)).all()
    assert problem.distance(problem.front(501)).max().item() <= 0.01
    for start in problem.starts:
        assert distance_at(problem, start) > 0.01
        assert criticality_at(problem, start) > 0.001


@pytest.mark.parametrize(
    ("problem", "theta", "expected"),
    [
        (PAIR, [0.0, 0.0], [(1 * 4 + 4 * 1) / 2, (3 * 4 + 1 * 0) / 2]),
        (cagrad_toy(), [3.0, 0.0], [0.0, 0.0]),
        (cagrad_toy(), [0.0, -8.0], [math.tanh(4) * (4.9 - 20)] * 2),
        (cagrad_toy(), [7.0, -9.0], [math.tanh(4.5) * x for x in (0.01 - 20, 19.61 - 20)]),
        (
            cagrad_toy(),
            [-7.0, 2.0],
            [math.tanh(1) * (math.log(x) + 6) for x in (math.tanh(2), 7 - math.tanh(2))],
        ),
        (fonseca_fleming(), [0.0] * 3, [1 - math.exp(-1)] * 2),
        (fonseca_fleming(), [3**-0.5] * 3, [0.0, 1 - math.exp(-4)]),
        (dtlz2(3), [0.0] * 12, [0.5, 0.5, math.sqrt(0.5)]),
        # x = 1/3, 1/2 and ten times 3/4: cos and sin of pi/6 and pi/4, and g = 10/16.
        (
            dtlz2(3),
            [-math.log(2), 0.0] + [math.log(3)] * 10,
            [1.625 * math.sqrt(3 / 8), 1.625 * math.sqrt(3 / 8), 1.625 / 2],
        ),
    ],
)
def test_losses_are_those_of_the_formula_by_hand(problem, theta, expected):
    assert values_at(problem, float64(theta)).tolist() == pytest.approx(expected, abs=1e-14)


@pytest.mark.parametrize(
    ("problem", "spacing"),
    [(PAIR, 0.1), (cagrad_toy(), 0.1), (fonseca_fleming(dimension=2), 0.01)],
    ids=lambda value: getattr(value, "name", None),
)
def test_front_is_the_front_of_a_dense_grid(problem, spacing):
    axis = torch.linspace(-10, 10, 401, dtype=torch.float64)
    grid = values_at(problem, torch.cartesian_prod(axis, axis))
    front = problem.front(501)
    assert pareto_front(torch.cat([front, grid]))[: len(front)].all()
    # Nothing is missing either: what the grid finds non-dominated is close to the sample.
    assert problem.distance(grid[pareto_front(grid)]).max().item() <= spacing


@pytest.mark.parametrize("m", [3, 8])
def test_the_image_of_dtlz2_is_outside_the_sphere_and_every_point_of_the_front_is_reached(m):
    problem = dtlz2(m)
    theta = 3 * torch.randn(1000, problem.dimension, dtype=torch.float64)
    values = values_at(problem, theta)
    assert values.min() >= 0
    assert values.norm(dim=1).min() >= 1
    theta[:, m - 1 :] = 0
    on_front = values_at(problem, theta)
    torch.testing.assert_close(on_front.norm(dim=1), torch.ones(1000, dtype=torch.float64))
    assert max(criticality_at(problem, row) for row in theta[:20]) <= 1e-7
    assert problem.distance(2 * on_front).tolist() == pytest.approx([1.0] * 1000)


@pytest.mark.parametrize("problem", [PAIR, TRIPLE, cagrad_toy()], ids=lambda p: p.name)
def test_weighted_solution_minimises_the_weighted_loss(problem):
    near = 10 * torch.rand(2000, problem.dimension, dtype=torch.float64) - 5
    for _ in range(5):
        weights = torch.rand(problem.m, dtype=torch.float64)
        weights /= weights.sum()
        solution = problem.weighted_solution(weights)
        assert (weights @ gradients_at(problem, solution)).norm().item() <= 1e-12
        others = values_at(problem, torch.cat([near, solution + near / 100])) @ weights
        assert values_at(problem, solution) @ weights <= others.min()
        # Theorem 3.1 in one point: critical for the weighted loss is Pareto-critical.
        assert criticality_at(problem, solution) <= 1e-6


def test_the_front_of_the_cagrad_toy_is_where_its_authors_draw_it():
    toy = cagrad_toy()
    # Their figures mark the line y = -8.3552 from x = -7 to 7, with a star in its middle.
    star = toy.weighted_solution(float64([0.5, 0.5]))
    assert star.tolist() == pytest.approx([0.0, -8.3552], abs=1e-3)
    ends = toy.weighted_solution(float64([[0.0, 1.0], [1.0, 0.0]]))
    assert ends[:, 0].tolist() == [-7.0, 7.0]
    assert ends[:, 1].tolist() == pytest.approx([-8.3552] * 2, abs=0.1)


# A convex front: the weights decide


@by_weighted_method
@pytest.mark.parametrize("start", PAIR.starts, ids=["right", "left"])
def test_on_the_quadratic_pair_the_limit_is_the_solution_of_the_weights(method, start):
    reached = []
    for weights in PAIRS:
        end = descend(PAIR, start, method, weights, 80, rate=1 / PAIR_SMOOTHNESS)[-1]
        assert_close(end, PAIR.weighted_solution(float64(weights)), 1e-6)
        gradients = gradients_at(PAIR, end)
        assert (float64(weights) @ gradients).norm() <= 1e-6 * gradients.norm(dim=1).max()
        assert criticality_at(PAIR, end) <= 1e-6
        assert distance_at(PAIR, end) <= 0.01
        reached.append(values_at(PAIR, end))
    # More weight on the first loss lowers it and raises the other.
    for less, more in zip(reached, reached[1:], strict=False):
        assert more[0] < less[0]
        assert more[1] > less[1]


@by_weighted_method
@pytest.mark.parametrize("favourite", range(3))
def test_with_three_quadratics_too(method, favourite):
    reached = []
    for weight in (0.1, 0.4, 0.8):
        weights = [(1 - weight) / 2] * 3
        weights[favourite] = weight
        start, rate = TRIPLE.starts[0], 1 / TRIPLE_SMOOTHNESS
        end = descend(TRIPLE, start, method, weights, 120, rate)[-1]
        assert_close(end, TRIPLE.weighted_solution(float64(weights)), 1e-6)
        reached.append(values_at(TRIPLE, end)[favourite].item())
    assert reached == sorted(reached, reverse=True)


@pytest.mark.parametrize("problem", [PAIR, TRIPLE], ids=lambda problem: problem.name)
def test_mgda_lowers_every_quadratic_in_every_step_and_stops_anywhere_on_the_front(problem):
    ends = []
    for start in problem.starts:
        path = descend(problem, start, mgda, None, 100, rate=1 / TRIPLE_SMOOTHNESS)
        values = values_at(problem, torch.stack(path))
        assert (values[1:] <= values[:-1] + 1e-12).all()
        assert criticality_at(problem, path[-1]) <= 1e-6
        ends.append(path[-1])
    assert (ends[0] - ends[1]).norm() > 0.5


def fast_forgetting_adam(parameters, lr):
    # With beta_2 = 0.999 the steps stay tiny for thousands of steps after the first ravine, whose
    # gradients are hundreds of times those of the bowl.
    return torch.optim.Adam(parameters, lr=lr, betas=(0.9, 0.95))


@pytest.mark.parametrize(
    ("name", "weights", "start"),
    [*(("CAGradClip", [0.2, 0.8], start) for start in range(3)), ("CAGrad", [0.5, 0.5], 0)],
)
def test_from_every_start_of_the_cagrad_toy_adam_reaches_the_solution_of_the_weights(
    name, weights, start
):
    """Observed, not proved: the losses are neither smooth nor non-negative, and Adam is no SGD."""
    toy, method = cagrad_toy(), WEIGHTED[name]
    path = descend(toy, toy.starts[start], method, weights, 1000, 0.05, fast_forgetting_adam)
    assert_close(path[-1], toy.weighted_solution(float64(weights)), 0.01)
    assert distance_at(toy, path[-1]) <= 0.01


# A concave front: Pareto-critical, and no more


@by_weighted_method
@pytest.mark.parametrize("weights", PAIRS, ids=str)
def test_on_fonseca_fleming_the_limit_is_a_critical_point_of_the_weighted_loss(method, weights):
    problem = fonseca_fleming()
    end = descend(problem, problem.starts[0], method, weights, 200, rate=0.5)[-1]
    assert criticality_at(problem, end) <= 1e-6
    assert distance_at(problem, end) <= 0.001
    s = end.sum().item() / math.sqrt(3)
    assert end.tolist() == pytest.approx([s / math.sqrt(3)] * 3, abs=1e-6)
    balance = math.log(weights[1] / weights[0])
    assert 4 * s - 2 * math.atanh(s) == pytest.approx(balance, abs=1e-3)
    # Never the middle of the front, whatever the weights: there L_w has a maximum along the front.
    assert abs(s) > math.sqrt(0.5)


def test_on_fonseca_fleming_mgda_stops_in_the_middle_of_the_front():
    problem = fonseca_fleming()
    for start in problem.starts:
        end = descend(problem, start, mgda, None, 200, rate=0.5)[-1]
        assert criticality_at(problem, end) <= 1e-6
        assert distance_at(problem, end) <= 0.001
        assert abs(end.sum().item()) / math.sqrt(3) < math.sqrt(0.5)


@by_weighted_method
@pytest.mark.parametrize(("m", "first"), [(3, 0.6), (8, 1 / 8)])
def test_on_dtlz2_the_limit_is_on_the_sphere_whatever_the_weights(method, m, first):
    problem = dtlz2(m)
    weights = [first] + [(1 - first) / (m - 1)] * (m - 1)
    end = descend(problem, problem.starts[0], method, weights, 250, rate=4.0)[-1]
    assert distance_at(problem, end) <= 1e-5
    assert criticality_at(problem, end) <= 1e-3


@pytest.mark.parametrize("m", [3, 8])
def test_on_dtlz2_mgda_becomes_critical_before_it_is_on_the_front(m):
    """M small is all that theory promises, and it is not near the front.

    The loss that is closest to zero has the smallest gradient and takes almost all of p; with it
    the pull towards g = 0 fades, as do gradients towards the border of the box.
    """
    problem = dtlz2(m)
    path = descend(problem, problem.starts[0], mgda, None, 250, rate=4.0)
    assert criticality_at(problem, path[-1]) <= 1e-3 < criticality_at(problem, path[0])
    assert distance_at(problem, path[-1]) > 0.01
