"""Coefficients of a step: the clipping rules, their identities and their limits."""

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from raco_optim import gram_matrix, min_norm_point, mixing_coefficients, solve_subproblem
from tests.oracles import exact_minimum
from tests.samplers import SAMPLERS, Problem, problem

KINDS = sorted(SAMPLERS)
CLIPS = ("hard", "soft", "none")
SOLVERS = ("exact", "pgd", "slsqp")


def mix(case: Problem, clip: str = "hard"):
    return mixing_coefficients(torch.from_numpy(case.gram), case.weights, case.c, clip=clip)


def norm(gram, q) -> float:
    return float(np.sqrt(max(q @ gram @ q, 0.0)))


# --- Clipping ------------------------------------------------------------------------------------


any_problem = given(st.sampled_from(KINDS), st.integers(1, 8), st.integers(0, 2**32))


@any_problem
def test_clipped_p(kind, m, seed):
    case = problem(kind, m, seed)
    none, hard, soft = (mix(case, clip) for clip in ("none", "hard", "soft"))
    bound = torch.minimum(none.p, torch.from_numpy(case.weights))
    # Bit for bit: renormalising would be a change.
    assert torch.equal(none.p_clipped, none.p)
    assert torch.equal(hard.p_clipped, bound)
    assert (soft.p_clipped >= 0).all()
    assert (soft.p_clipped <= bound).all()
    # It vanishes only where one of the two does.
    assert torch.equal(soft.p_clipped > 0, bound > 0)


def test_soft_clipping_is_smooth_where_hard_clipping_has_a_corner():
    """As p_1 passes w_1, the slope of the hard rule jumps from 1 to 0; the soft one has no jump."""

    def curve(clip):
        """The first clipped entry along a path of Gram matrices on which p is not a vertex."""
        clipped = []
        for t in np.linspace(-1.4, -0.3, 401):
            g = np.array([[1.0, 0.0], [t, 1.0]])
            mixing = mixing_coefficients(g @ g.T, [0.6, 0.4], 0.9, clip=clip)
            clipped.append(float(mixing.p_clipped[0]))
        return np.array(clipped)

    none, hard, soft = curve("none"), curve("hard"), curve("soft")
    assert none.min() < 0.55 < 0.65 < none.max()  # the path crosses the corner
    bends = [np.abs(np.diff(values, 2)).max() for values in (none, hard, soft)]
    assert bends[1] > 20 * bends[0]
    assert bends[2] < 3 * bends[0]


@pytest.mark.parametrize("clip", CLIPS)
@any_problem
def test_coefficients_by_their_definition(clip, kind, m, seed):
    """alpha = w + c |g0| p~ / |G~|, unless |G~| is zero to rounding: then alpha = w."""
    case = problem(kind, m, seed)
    mixing = mix(case, clip)
    alpha, clipped = mixing.coefficients.numpy(), mixing.p_clipped.numpy()
    assert np.isfinite(alpha).all()
    assert (alpha >= case.weights).all()
    norms = np.sqrt(case.gram.diagonal())
    length, size = norm(case.gram, clipped), clipped @ norms
    length_g0 = norm(case.gram, case.weights)
    if length <= 1e-9 * size:
        np.testing.assert_array_equal(alpha, case.weights)
    elif length > 1e-5 * size and length_g0 > 1e-5 * (case.weights @ norms):
        step = case.c * length_g0 * clipped / length
        # What cancels in a norm is lost, here as there.
        lost = 1e-14 * ((size / length) ** 2 + (case.weights @ norms / length_g0) ** 2)
        np.testing.assert_allclose(alpha, case.weights + step, rtol=1e-12 + lost)


@pytest.mark.parametrize("clip", CLIPS)
def test_the_step_lies_on_the_ball_around_g0(clip):
    """|G0 - g0| = c |g0|, in the space of the gradients and not only in that of the Gram."""
    rng = np.random.default_rng(0)
    for m in (1, 2, 3, 7):
        g = rng.standard_normal((m, 20))
        w = rng.dirichlet(np.ones(m))
        mixing = mixing_coefficients(g @ g.T, w, 0.4, clip=clip)
        g0, combined = w @ g, mixing.coefficients.numpy() @ g
        assert np.linalg.norm(combined - g0) == pytest.approx(0.4 * np.linalg.norm(g0))
        direction = mixing.p_clipped.numpy() @ g
        expected = g0 + 0.4 * np.linalg.norm(g0) * direction / np.linalg.norm(direction)
        np.testing.assert_allclose(combined, expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("clip", CLIPS)
@pytest.mark.parametrize("c", [0.4, 0.9])
@pytest.mark.parametrize("exponent", [-10, -16, -20])
def test_the_correction_has_its_length_where_most_of_it_cancels(clip, c, exponent):
    """|G0 - g0| = c |g0| where |G~| is 1e-3 to 5e-7 of its terms; powers of two make H exact."""
    small = 2.0**exponent
    g = np.array([[3.0, 2 * small, 0.0], [-3.0, small, 0.0], [0.0, 0.0, 1.0]])
    w = np.array([0.25, 0.25, 0.5])
    mixing = mixing_coefficients(g @ g.T, w, c, clip=clip)
    q, step = mixing.p_clipped.numpy(), (mixing.coefficients.numpy() - w) @ np.longdouble(g)
    left = np.linalg.norm(q @ g) / (q @ np.linalg.norm(g, axis=1))
    assert small / 10 < left < small * 10
    length = c * np.linalg.norm(w @ g)
    assert float(np.sqrt(step @ step)) == pytest.approx(length, rel=1e-15 / left**2)


def test_without_clipping_the_worst_improvement_is_the_best_possible():
    """Plain CAGrad: min_i <g_i, d> over the ball |d - g0| <= c |g0| is largest at G0."""
    rng = np.random.default_rng(1)
    for m in (2, 3, 5):
        g, w, c = rng.standard_normal((m, 6)), rng.dirichlet(np.ones(m)), 0.6
        combined = mixing_coefficients(g @ g.T, w, c, clip="none").coefficients.numpy() @ g
        g0 = w @ g
        others = rng.standard_normal((20_000, 6))
        others *= c * np.linalg.norm(g0) / np.linalg.norm(others, axis=1, keepdims=True)
        assert (g @ combined).min() >= ((g0 + others) @ g.T).min(axis=1).max() - 1e-12


@pytest.mark.parametrize("clip", CLIPS)
@any_problem
def test_the_weighted_loss_descends(clip, kind, m, seed):
    """<g0, G0> >= (1 - c) |g0|^2, by Cauchy-Schwarz, whatever was clipped."""
    case = problem(kind, m, seed)
    alpha = mix(case, clip).coefficients.numpy()
    squared = case.weights @ case.gram @ case.weights
    rounding = 1e-13 * (alpha @ np.sqrt(case.gram.diagonal())) ** 2
    if kind == "single_precision":
        rounding *= 1e8
    assert case.weights @ case.gram @ alpha >= (1 - case.c) * squared - rounding


# --- Invariances ---------------------------------------------------------------------------------


@pytest.mark.parametrize("clip", CLIPS)
def test_scaling_by_powers_of_two_changes_no_bit(clip):
    for kind, m in itertools.product(KINDS, (1, 2, 3, 6)):
        case = problem(kind, m, 0)
        alpha = mix(case, clip).coefficients
        for exponent in (-53, -8, 1, 30, 53):  # of H: 1e-16 to 1e16
            scaled = Problem(case.gram * 4.0**exponent, case.weights, case.c)
            assert torch.equal(mix(scaled, clip).coefficients, alpha)


@pytest.mark.parametrize("clip", CLIPS)
def test_scaling_by_any_factor_changes_nothing(clip):
    for m in (1, 2, 3, 6):
        case = problem("random", m, 2)
        unit = case.gram / case.gram.max()
        alpha = mixing_coefficients(unit, case.weights, 0.4, clip=clip).coefficients
        for k in (1e-300, 1e-16, 1e-3, 1e16, 1e300):
            scaled = mixing_coefficients(unit * k, case.weights, 0.4, clip=clip).coefficients
            np.testing.assert_allclose(scaled, alpha, rtol=1e-9)


@pytest.mark.parametrize("clip", CLIPS)
def test_permuting_the_losses_permutes_the_coefficients(clip):
    rng = np.random.default_rng(0)
    for kind in ("random", "conflicting", "duplicate", "rank_deficient", "kink"):
        for m in (2, 3, 6):
            case = problem(kind, m, 0)
            order = rng.permutation(m)
            permuted = Problem(case.gram[np.ix_(order, order)], case.weights[order], case.c)
            a, b = mix(case, clip).coefficients.numpy(), mix(permuted, clip).coefficients.numpy()
            np.testing.assert_allclose(b, a[order], rtol=1e-6, atol=1e-6)


def test_a_vertex_keeps_its_direction_when_clipped():
    """Clipping scales G~ = min(1, w_i) g_i, and the division by |G~| undoes it."""
    for m in (2, 3, 6):
        case = problem("vertex", m, 0)
        case = Problem(case.gram, np.full(m, 1 / m), 0.4)
        hard, none = mix(case, "hard"), mix(case, "none")
        assert not torch.equal(hard.p_clipped, none.p_clipped)
        np.testing.assert_allclose(hard.coefficients, none.coefficients, rtol=1e-12)


# --- Limits --------------------------------------------------------------------------------------


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("clip", CLIPS)
class TestLimits:
    def alpha(self, gram, weights, c, clip, solver):
        return mixing_coefficients(gram, weights, c, clip=clip, solver=solver).coefficients

    def test_without_a_radius_the_coefficients_are_the_weights(self, clip, solver):
        for kind, m in itertools.product(KINDS, (1, 2, 3)):
            case = problem(kind, m, 1)
            alpha = self.alpha(case.gram, case.weights, 0.0, clip, solver)
            assert alpha.tolist() == case.weights.tolist()

    def test_one_loss(self, clip, solver):
        for c in (0.0, 1e-12, 0.4, 0.999999):
            assert self.alpha([[7.0]], [1.0], c, clip, solver).tolist() == [1 + c]

    def test_a_stationary_point_keeps_the_weights(self, clip, solver):
        """The update is zero: there is no direction to move g0 = 0 in."""
        triangle = np.array([[3.0, 0.0], [-1.0, 2.0], [-1.0, -2.0]])
        for g, w in (
            *((np.zeros((m, 1)), [1 / m] * m) for m in (1, 2, 3)),
            (triangle, [0.25, 0.375, 0.375]),
            (np.array([[1.0], [-1.0]]), [0.5, 0.5]),
        ):
            alpha = self.alpha(g @ g.T, w, 0.4, clip, solver)
            assert alpha.tolist() == w
            np.testing.assert_array_equal(alpha.numpy() @ g, 0)

    def test_equal_losses_are_one_loss(self, clip, solver):
        """alpha = (1 + c) w: equal gradients lead to (1 + c) g, as one loss does."""
        for w in ([0.5, 0.5], [0.7, 0.2, 0.1]):
            alpha = self.alpha(np.full((len(w), len(w)), 3.0), w, 0.4, clip, solver)
            assert float(alpha.sum()) == pytest.approx(1.4)

    def test_a_kink_keeps_g0(self, clip, solver):
        """G_p = 0 leaves no direction, so that the step is the weighted gradient."""
        g = np.array([[1.0, 0.0], [-2.0, 0.0], [0.0, 1.0]])
        alpha = self.alpha(g @ g.T, [0.0, 0.0, 1.0], 0.4, clip, solver)
        np.testing.assert_allclose(alpha.numpy() @ g, [0.0, 1.0], atol=1e-12)


def test_nothing_left_after_clipping_keeps_the_weights():
    """All weight on the first loss, all of p on the second: p~ = 0."""
    mixing = mixing_coefficients([[1.0, -0.9], [-0.9, 1.0]], [1.0, 0.0], 0.4)
    assert mixing.p.tolist() == [0.0, 1.0]
    assert mixing.p_clipped.tolist() == [0.0, 0.0]
    assert mixing.coefficients.tolist() == [1.0, 0.0]


def test_a_weight_of_zero_takes_no_part_when_clipped():
    case = problem("conflicting", 4, 0)
    for clip in ("hard", "soft"):
        alpha = mixing_coefficients(case.gram, [0.5, 0.5, 0.0, 0.0], 0.4, clip=clip).coefficients
        assert alpha[2:].tolist() == [0.0, 0.0]


# --- The result ----------------------------------------------------------------------------------


@pytest.mark.parametrize("clip", CLIPS)
@pytest.mark.parametrize("solver", SOLVERS)
def test_p_and_gap_are_those_of_the_subproblem(solver, clip):
    case = problem("random", 3, 0)
    mixing = mixing_coefficients(case.gram, case.weights, 0.4, clip=clip, solver=solver)
    solution = solve_subproblem(case.gram, case.weights, 0.4, solver=solver)
    assert torch.equal(mixing.p, solution.p)
    assert torch.equal(mixing.gap, solution.gap)
    for tensor in (mixing.coefficients, mixing.p, mixing.p_clipped, mixing.gap):
        assert tensor.dtype == torch.float64
    np.testing.assert_allclose(mixing.p, exact_minimum(case.gram, case.weights, 0.4).p, atol=1e-6)


def test_hard_clipping_and_the_exact_solver_are_the_defaults():
    case = problem("conflicting", 3, 0)
    default = mixing_coefficients(case.gram, case.weights, 0.4)
    explicit = mixing_coefficients(case.gram, case.weights, 0.4, clip="hard", solver="exact")
    assert torch.equal(default.coefficients, explicit.coefficients)


# --- Bad input -----------------------------------------------------------------------------------


@pytest.mark.parametrize("clip", ["harder", "", None, True, ["hard"]])
def test_bad_clip(clip):
    with pytest.raises(ValueError, match="`clip` must be one of 'hard', 'soft', 'none'; got"):
        mixing_coefficients(np.eye(2), [0.5, 0.5], 0.4, clip=clip)


@pytest.mark.parametrize(
    ("argument", "gram", "weights", "c", "solver"),
    [
        ("gram", [[1.0, 2.0, 3.0]], [0.5, 0.5], 0.4, "exact"),
        ("weights", np.eye(2), [0.5, 0.6], 0.4, "exact"),
        ("c", np.eye(2), [0.5, 0.5], -1.0, "exact"),
        ("solver", np.eye(2), [0.5, 0.5], 0.4, "newton"),
    ],
)
def test_bad_arguments_are_named(argument, gram, weights, c, solver):
    for clip in CLIPS:
        with pytest.raises(ValueError, match=f"`{argument}` must"):
            mixing_coefficients(gram, weights, c, clip=clip, solver=solver)


@pytest.mark.parametrize("clip", CLIPS)
@pytest.mark.parametrize("c", [0.4, 1.0, 1.5])
def test_few_losses_are_solved_as_many_are(c, clip, monkeypatch):
    """Up to ten losses have a solver of their own; the coefficients are the same without it."""
    kinds = ("random", "conflicting", "aligned", "vertex", "interior", "duplicate", "kink", "zero")
    cases = [problem(kind, m, seed) for kind in kinds for m in (2, 3, 6, 10) for seed in range(2)]
    few = [mixing_coefficients(x.gram, x.weights, c, clip=clip) for x in cases]
    monkeypatch.setattr("raco_optim.subproblem.solve.FEW", 2)
    for case, found in zip(cases, few, strict=True):
        many = mixing_coefficients(case.gram, case.weights, c, clip=clip)
        np.testing.assert_allclose(found.p, many.p, atol=1e-9)
        np.testing.assert_allclose(found.coefficients, many.coefficients, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("m", [2, 3, 4, 5, 6, 8, 10, 11, 20, 40])
def test_duplicates_of_equal_weight_have_equal_shares_to_the_bit(m, dtype):
    """The minimiser closest to w is unique, so it is symmetric."""
    generator = torch.Generator().manual_seed(m)
    for n in (2 * m, 1000):
        for number in {1, (m + 1) // 2, max(1, m - 1)}:  # of different gradients
            distinct = torch.randn(number, n, generator=generator, dtype=dtype)
            which = torch.arange(m) % number
            own = torch.rand(number, generator=generator, dtype=torch.float64) + 0.1
            for w in (torch.full((m,), 1 / m), own[which] / own[which].sum()):
                gram = gram_matrix([[g] for g in distinct[which]])
                for c in (0.4, 0.9):
                    mixing = mixing_coefficients(gram, w.tolist(), c)
                    points = [mixing.p, mixing.p_clipped, mixing.coefficients]
                    for x in [*points, min_norm_point(gram).p]:
                        assert torch.equal(x, x[which])  # each as the first of its kind
