"""The subproblem: against exact truth where m is small, against a certificate where it is not."""

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from raco_optim import SubproblemSolution, min_norm_point, solve_subproblem
from tests.oracles import (
    certificate,
    distance_to_closest,
    exact_min_norm,
    exact_minimum,
    excess_gap,
    grid_minimum,
    phi,
)
from tests.samplers import SAMPLERS, Problem, problem, simplex_point

KINDS = sorted(SAMPLERS)
GENERIC = ("random", "conflicting", "aligned", "vertex", "interior")
SOLVERS = ("exact", "pgd", "slsqp")
GAP = 1e-9
# The last digits of H decide. The solution is as good as they are, but a solver can prove less
# (docs/algorithm.md gives figures).
FEW_DIGITS = {"near_kink", "near_singular", "nearly_stationary", "single_precision"}


def solve(case: Problem, solver: str = "exact") -> SubproblemSolution:
    return solve_subproblem(torch.from_numpy(case.gram), case.weights, case.c, solver=solver)


def assert_solves(case: Problem, solution: SubproblemSolution, *, proved: float = GAP) -> None:
    """Feasible, and optimal by our certificate and by the solution's own, which is not false."""
    p = solution.p.numpy()
    assert solution.p.dtype == solution.value.dtype == solution.gap.dtype == torch.float64
    assert np.isfinite(p).all()
    assert (p >= 0).all()
    assert abs(p.sum() - 1) <= 1e-14 * len(p)
    assert 0 <= float(solution.gap) <= proved
    rounding = max(case.rounding, 2.0**-52)  # nobody but the sampler knows that H is exact
    assert excess_gap(case.gram, case.weights, case.c, p, rounding=rounding) <= max(
        GAP, float(solution.gap)
    )


@pytest.mark.parametrize("kind", KINDS)
def test_the_witnesses_agree(kind):
    """The exact minimum equals that of a grid and the proved one; its distance to itself is 0."""
    for m, seed in itertools.product((1, 2, 3, 4), range(3)):
        case = problem(kind, m, seed)
        H, w, c = case.gram, case.weights, case.c
        assert sum(w) == pytest.approx(1, abs=1e-15)
        truth = exact_minimum(H, w, c)
        scale = np.sqrt(w @ H @ w * H.diagonal().max())
        assert phi(H, w, c, truth.p) >= truth.value - 1e-15 * scale
        if m in (2, 3) and seed < 2:
            _, value = grid_minimum(H, w, c)
            # In float64, norms near zero are known to the root of the rounding.
            assert value == pytest.approx(truth.value, abs=1e-7 * scale + 1e-8 * H.max())
        if case.p is not None:
            np.testing.assert_allclose(truth.p, case.p, atol=1e-9)
        if case.rounding == 0:
            assert distance_to_closest(H, w, c, truth.p) <= 1e-9


@pytest.mark.parametrize("kind", GENERIC)
def test_certificate_bounds_the_suboptimality(kind):
    rng = np.random.default_rng(0)
    for seed in range(4):
        case = problem(kind, 4, seed)
        H, w, c = case.gram, case.weights, case.c
        truth = exact_minimum(H, w, c)
        assert certificate(H, w, c, truth.p) <= 1e-13
        p = rng.dirichlet(np.ones(4))
        missed = (phi(H, w, c, p) - truth.value) / np.sqrt(w @ H @ w * H.diagonal().max())
        assert certificate(H, w, c, p) >= missed - 1e-15
        assert excess_gap(H, w, c, p) >= missed - 1e-9  # rounding excuses nothing here


def test_the_distance_to_the_closest_minimiser_is_seen():
    g, w = np.array([[1.0, 0.0], [1.0, 0.0], [-1.0, 2.0]]), np.array([0.5, 0.125, 0.375])
    other = exact_minimum(g @ g.T, w, 0.75).p + [0.01, -0.01, 0.0]
    assert distance_to_closest(g @ g.T, w, 0.75, other) == pytest.approx(0.01 * np.sqrt(2))


PINNED = [
    # The example of Theorem 3.2: g_1 = (1, -4), g_2 = (-1, 1), to the digits of the paper.
    ([[17, -5], [-5, 2]], [0.2, 0.8], 0.5, [0.3561, 0.6439]),
    # Orthogonal gradients of one length and even weights: even by symmetry.
    (np.eye(3), [1 / 3] * 3, 0.5, [1 / 3] * 3),
    # H = diag(1, 4): Phi has the derivatives 0.5 + s and 2 at the first vertex, s = 0.56.
    (np.diag([1.0, 4.0]), [0.5, 0.5], 0.5, [1.0, 0.0]),
    # g_2 = -g_1: g0 = 0.4 g_1, so the loss that gets worse takes all.
    ([[1.0, -1.0], [-1.0, 1.0]], [0.7, 0.3], 0.4, [0.0, 1.0]),
    # g_1 and g_2 opposed, all weight on g_3 orthogonal to both: a kink.
    ([[1.0, -2.0, 0.0], [-2.0, 4.0, 0.0], [0.0, 0.0, 1.0]], [0, 0, 1.0], 0.4, [2 / 3, 1 / 3, 0]),
    # Equal derivatives and no radius: w is a minimiser.
    (np.eye(2), [0.5, 0.5], 0.0, [0.5, 0.5]),
]


@pytest.mark.parametrize("solver", SOLVERS)
def test_pinned(solver):
    for gram, weights, c, p in PINNED:
        solution = solve_subproblem(gram, weights, c, solver=solver)
        np.testing.assert_allclose(solution.p, p, atol=5e-5 if p[0] == 0.3561 else 1e-6)
        truth = exact_minimum(np.asarray(gram, float), np.array(weights), c)
        np.testing.assert_allclose(solution.p, truth.p, atol=1e-6)
        assert float(solution.value) == pytest.approx(truth.value, rel=1e-9, abs=1e-15)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("m", [1, 2, 3, 4, 5])
def test_exact_solver_finds_the_minimiser_closest_to_the_weights(kind, m):
    for seed in range(1 if m == 1 else 8 if m < 5 else 2):
        case = problem(kind, m, seed)
        solution = solve(case)
        assert_solves(case, solution, proved=1e-7 if kind in FEW_DIGITS else GAP)
        if case.rounding == 0 or kind in GENERIC:
            truth = exact_minimum(case.gram, case.weights, case.c)
            np.testing.assert_allclose(solution.p, truth.p, atol=1e-6, err_msg=f"seed {seed}")
            scale = np.sqrt(case.weights @ case.gram @ case.weights * case.gram.diagonal().max())
            assert float(solution.value) == pytest.approx(truth.value, abs=1e-8 * scale)


@pytest.mark.parametrize("solver", ["pgd", "slsqp"])
@pytest.mark.parametrize("kind", KINDS)
def test_other_solvers_agree_with_the_exact_one(kind, solver):
    for m, seed in ((1, 0), (2, 0), (2, 1), (3, 0), (3, 1), (5, 0), (5, 1)):
        case = problem(kind, m, seed)
        solution = solve(case, solver)
        assert_solves(case, solution, proved=np.inf if kind in FEW_DIGITS else GAP)
        if kind in GENERIC and case.c > 1e-9:
            np.testing.assert_allclose(solution.p, solve(case).p, atol=1e-6)
        if solver == "slsqp" and case.rounding == 0:
            assert distance_to_closest(case.gram, case.weights, case.c, solution.p.numpy()) <= 1e-6


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("m", "seeds"), [(8, 3), (20, 2), (64, 1)])
def test_certificate_for_many_losses(kind, m, seeds):
    for seed in range(seeds):
        case = problem(kind, m, seed)
        solution = solve(case)
        assert_solves(case, solution, proved=1e-7 if kind in FEW_DIGITS else GAP)
        if case.rounding == 0:
            assert distance_to_closest(case.gram, case.weights, case.c, solution.p.numpy()) <= 1e-6


@st.composite
def degenerate_problems(draw):
    """Small integer gradients and dyadic weights: exact, and full of coincidences."""
    m, n = draw(st.integers(1, 4)), draw(st.integers(1, 3))
    entries = st.lists(st.integers(-3, 3), min_size=n, max_size=n)
    g = np.array(draw(st.lists(entries, min_size=m, max_size=m)), float)
    cuts = sorted(draw(st.lists(st.integers(0, 16), min_size=m - 1, max_size=m - 1)))
    w = np.diff([0, *cuts, 16]) / 16
    return Problem(g @ g.T, w, draw(st.sampled_from([0.0, 0.25, 0.4, 0.75, 0.999, 1.5])), 0)


@given(degenerate_problems())
def test_degenerate_problems_exactly(case):
    solution = solve(case)
    assert_solves(case, solution)
    truth = exact_minimum(case.gram, case.weights, case.c)
    np.testing.assert_allclose(solution.p, truth.p, atol=1e-6)


@given(st.sampled_from(KINDS), st.integers(1, 12), st.integers(0, 2**32))
def test_any_problem(kind, m, seed):
    case = problem(kind, m, seed)
    assert_solves(case, solve(case))


# Each of these was wrong once, in p or in its certificate, in some state of some solver.
REGRESSIONS = {
    "a radius below the rounding": ([[8.95, 1.3], [1.3, 9.11]], [1.0, 0.0], 1e-12),
    "norms 1e10 apart": (
        [
            [1.2592716264857275, -5.155185303763862e-11],
            [-5.155185303763862e-11, 4.74738502681038e-21],
        ],
        [0.0, 1.0],
        0.999999,
    ),
    "next to stationary": (
        [[0.03614152104947968, -0.6052839322682018], [-0.6052839322682018, 10.13705643878499]],
        [0.9436543686200967, 0.05634563137990338],
        0.4,
    ),
    "next to a kink": (
        [
            [2.0000000229023853, -2.000000034713581, -5.174729184691252e-08],
            [-2.000000034713581, 2.000000046524777, 8.189167469433809e-08],
            [-5.174729184691252e-08, 8.189167469433809e-08, 13.999999566577035],
        ],
        [0.4636387879967035, 0.2647125204505385, 0.27164869155275806],
        0.9,
    ),
    "a kink on an edge": (
        [[121, -242, 61], [-242, 484, -122], [61, -122, 42]],
        [0.1875, 0.1640625, 0.6484375],
        0.999999,
    ),
    "a kink with a long and a short gradient": (
        [[8912896, -1140850688, 0], [-1140850688, 146028888064, 0], [0, 0, 1376256]],
        [1 / 3, 1 / 3, 1 / 3],
        0.999999,
    ),
    "two duplicates": (
        [[30, 25, 25, 30], [25, 75, 75, 25], [25, 75, 75, 25], [30, 25, 25, 30]],
        [0.9658769531, 0.034098034981, 0.0000010305, 0.000023981419],
        0.9,
    ),
}


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("name", REGRESSIONS)
def test_regressions(name, solver):
    gram, weights, c = REGRESSIONS[name]
    case = Problem(np.array(gram, float), simplex_point(np.array(weights)), c)
    solution = solve(case, solver)
    assert_solves(case, solution, proved=GAP if solver == "exact" else 1e-6)
    if solver == "exact":
        truth = exact_minimum(case.gram, case.weights, c)
        np.testing.assert_allclose(solution.p, truth.p, atol=1e-6)


def opposed(rng: np.random.Generator, m: int, factor: int) -> tuple[np.ndarray, np.ndarray]:
    """Gradients along one line, the last against the others, but for a part in `factor`."""
    line, lengths = rng.integers(-2, 3, 4), rng.integers(1, 8, m)
    line[0], lengths[-1] = 2, -lengths[-1]
    g = factor * np.outer(lengths, line) + rng.integers(-3, 4, (m, 4))
    return g.astype(float), simplex_point(rng.dirichlet(np.ones(m)) + 0.05)


def almost_stationary(rng: np.random.Generator, m: int, factor: int) -> tuple[np.ndarray, ...]:
    """The weighted gradient is zero, but for a part in `factor`."""
    w, g = rng.integers(1, 8, m), rng.integers(-3, 4, (m, 4))
    g[-1] = -(w[:-1] @ g[:-1])
    g[:-1] *= w[-1]
    return (factor * g + rng.integers(-3, 4, (m, 4))).astype(float), simplex_point(w)


@pytest.mark.skipif(np.finfo(np.longdouble).eps > 1e-18, reason="no extended precision here")
@pytest.mark.parametrize("m", [2, 3, 4])
@pytest.mark.parametrize(
    ("family", "radii"), [(opposed, (1.25, 1.5, 2, 5)), (almost_stationary, (0.4, 0.9, 1.5))]
)
def test_digits_that_cancel_are_not_lost(family, radii, m):
    """Next to G_p = 0 or g_0 = 0, float64 would be off by 2e-3 in p and 1 % in Phi.

    Integer gradients make H exact. If cancellation leaves a share r of a vector, it leaves r^2 of
    its squares in H. With 16 digits the error would be 1e-16 / r^2; 80-bit numbers have a
    thousandth of it.
    """
    checked = 0
    for exponent, seed in itertools.product((14, 16, 18, 20), range(10 if m < 4 else 4)):
        rng = np.random.default_rng([seed, m, exponent])
        g, w = family(rng, m, 2**exponent)
        H, c = g @ g.T, float(rng.choice(radii))
        truth, norms = exact_minimum(H, w, c), np.sqrt(H.diagonal())
        left = min(np.linalg.norm(q @ g) / (q @ norms) for q in (truth.p, w))
        if left < 2e-7:  # zero to rounding
            continue
        checked += 1
        solution, tolerance = solve_subproblem(H, w, c), 5e-18 / left**2 + 1e-9
        np.testing.assert_allclose(solution.p, truth.p, atol=tolerance)
        assert float(solution.value) == pytest.approx(truth.value, rel=tolerance)
    assert checked > (20 if m < 4 else 8)


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("kind", KINDS)
def test_scaling_by_powers_of_two_changes_no_bit(kind, solver):
    for m in (2, 3, 6):
        case = problem(kind, m, 0)
        p = solve(case, solver).p
        for exponent in (-53, 1, 53):  # of H: 1e-16 to 1e16
            scaled = Problem(case.gram * 4.0**exponent, case.weights, case.c)
            assert torch.equal(solve(scaled, solver).p, p)


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("kind", GENERIC)
def test_scaling_by_any_factor_changes_nothing(kind, solver):
    for m in (2, 3, 6):
        case = problem(kind, m, 1)
        unit = case.gram / case.gram.max()
        p = solve_subproblem(unit, case.weights, 0.4, solver=solver).p
        for k in (1e-300, 1e-16, 1e-5, 1e9, 1e16, 1e300):
            scaled = solve_subproblem(unit * k, case.weights, 0.4, solver=solver)
            np.testing.assert_allclose(scaled.p, p, atol=1e-6 if solver != "exact" else 1e-9)
            assert float(scaled.gap) <= GAP


@pytest.mark.parametrize("kind", KINDS)
def test_permuting_the_losses_permutes_the_solution(kind):
    rng = np.random.default_rng(0)
    for m, seed in itertools.product((2, 3, 6), range(3)):
        case = problem(kind, m, seed)
        order = rng.permutation(m)
        permuted = Problem(case.gram[np.ix_(order, order)], case.weights[order], case.c)
        if case.rounding == 0 or kind in GENERIC:
            np.testing.assert_allclose(solve(permuted).p, solve(case).p[order], atol=1e-6)
        else:  # ill-conditioned: p may move, Phi may not
            assert_solves(permuted, solve(permuted), proved=1e-7)


@pytest.mark.parametrize("solver", SOLVERS)
def test_the_same_call_gives_the_same_bits_and_leaves_its_argument_alone(solver):
    for kind in KINDS:
        case = problem(kind, 5, 0)
        kept = case.gram.copy()
        first, second = solve(case, solver), solve(case, solver)
        assert torch.equal(first.p, second.p)
        assert torch.equal(first.gap, second.gap)
        assert (case.gram == kept).all()


def test_every_form_of_the_gram_is_solved_in_float64():
    """Numbers of Python are not rounded to single precision; a mapping counts in its order."""
    rows = [[2.0, -1.0, 0.5], [-1.0, 3.0, 0.0], [0.5, 0.0, 1.0]]
    listed = solve_subproblem(rows, [0.25, 0.25, 0.5], 0.4).p
    for dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
        p = solve_subproblem(torch.tensor(rows, dtype=dtype), [0.25, 0.25, 0.5], 0.4).p
        assert p.dtype == torch.float64
        assert torch.equal(p, listed)
    gram = [[0.1, -0.3], [-0.3, 1.7]]
    double = torch.tensor(gram, dtype=torch.float64)
    for solver in SOLVERS:
        p = solve_subproblem(double, [0.3, 0.7], 0.4, solver=solver).p
        for weights in ([0.3, 0.7], {"a": 0.3, "b": 0.7}):
            assert torch.equal(p, solve_subproblem(gram, weights, 0.4, solver=solver).p)
    assert torch.equal(min_norm_point(gram).p, min_norm_point(double).p)


def test_duplicates_share_as_the_weights_do():
    for w1, c in itertools.product((0.5, 0.9, 1.0, 1 / 3), (0.0, 1e-12, 0.4, 0.999999)):
        p = solve_subproblem([[3.0, 3.0], [3.0, 3.0]], [w1, 1 - w1], c).p
        np.testing.assert_allclose(p, [w1, 1 - w1], atol=1e-12)


def test_duplicates_among_others_move_together():
    """The distance to w is least when both shares of a duplicate move by the same amount."""
    g = np.array([[1.0, 0.0], [1.0, 0.0], [-1.0, 2.0]])
    w = np.array([0.5, 0.125, 0.375])
    p = solve_subproblem(g @ g.T, w, 0.75).p.numpy()
    assert p[0] - w[0] == pytest.approx(p[1] - w[1], abs=1e-12)
    truth = exact_minimum(g @ g.T, w, 0.75)
    assert not truth.unique
    np.testing.assert_allclose(p, truth.p, atol=1e-12)
    # Unless one of them would be negative: then the other has all.
    p = solve_subproblem(g @ g.T, [0.75, 0.125, 0.125], 0.5).p
    np.testing.assert_allclose(p, [0.25, 0.0, 0.75], atol=1e-12)


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("c", [0.0, 1e-12, 0.4, 0.999999])
def test_limits(c, solver):
    """One loss, gradients that are all zero, g0 = 0, and weights at a vertex."""
    one = solve_subproblem([[4.0]], [1.0], c, solver=solver)
    assert one.p.tolist() == [1.0]
    assert float(one.value) == pytest.approx(4 * (1 + c))
    for m in (1, 2, 3):
        w = simplex_point(np.arange(1.0, m + 1))
        zero = solve_subproblem(np.zeros((m, m)), w, c, solver=solver)
        assert zero.p.tolist() == w.tolist()
        assert float(zero.value) == float(zero.gap) == 0
    g, w = np.array([[3.0, 0.0], [-1.0, 2.0], [-1.0, -2.0]]), [0.25, 0.375, 0.375]
    stationary = solve_subproblem(g @ g.T, w, c, solver=solver)
    assert stationary.p.tolist() == w
    assert float(stationary.gap) == 0
    g = np.array([[1.0, 2.0, 0.0], [-3.0, 1.0, 1.0], [0.5, -1.0, 2.0]])
    for w in np.eye(3):
        case = Problem(g @ g.T, w, c)
        assert_solves(case, solve(case, solver))


@pytest.mark.parametrize("c", [1.0, 1.5, 10.0])
def test_a_large_radius(c):
    for kind, m in itertools.product(
        ("random", "conflicting", "kink", "duplicate", "opposed"), (2, 3, 4, 20)
    ):
        case = problem(kind, m, 0)
        case = Problem(case.gram, case.weights, c, case.rounding)
        assert_solves(case, solve(case))


@pytest.mark.parametrize("kind", sorted({*KINDS} - {"single_precision"}))  # no norm there
def test_min_norm_point(kind):
    for m, seed in itertools.product((1, 2, 3, 4), range(2)):
        case = problem(kind, m, seed)
        solution = min_norm_point(torch.from_numpy(case.gram))
        p, largest = solution.p.numpy(), np.sqrt(case.gram.diagonal().max())
        assert (p >= 0).all()
        assert p.sum() == pytest.approx(1, abs=1e-14)
        # H holds squares, so zero is known to the root of the rounding.
        assert float(solution.gap) <= 3e-8
        if case.rounding == 0 or kind in GENERIC:
            assert float(solution.gap) <= GAP
            norm = exact_min_norm(case.gram)
            assert float(solution.norm) == pytest.approx(norm, abs=3e-8 * largest)
            assert np.sqrt(max(p @ case.gram @ p, 0)) <= norm + 3e-8 * largest


def test_min_norm_point_of_equal_gradients_is_even():
    np.testing.assert_allclose(min_norm_point(np.ones((3, 3))).p, [1 / 3] * 3)


NAN, INF = float("nan"), float("inf")

BAD_SHAPES = {
    "not square": [[1.0, 0.0, 0.0], [0.0, 1.0, 0.0]],
    "a vector": [1.0, 2.0],
    "empty": np.zeros((0, 0)),
    "a batch": np.zeros((4, 2, 2)),
    "ragged": [[1.0, 0.0], [0.0]],
    "text": "H",
    "nothing": None,
    "complex": np.eye(2) * 1j,
    "sparse": torch.eye(2).to_sparse(),
}
BAD_ENTRIES = {
    "asymmetric": [[1.0, 0.5], [0.2, 1.0]],
    "NaN": [[1.0, NAN], [NAN, 1.0]],
    "NaN on the diagonal": [[NAN, 0.0], [0.0, 1.0]],
    "Inf": [[INF, 0.0], [0.0, 1.0]],
    "minus Inf": [[1.0, -INF], [-INF, 1.0]],
    "a negative diagonal": [[-1.0, 0.0], [0.0, 1.0]],
    "all of it negative": [[-1.0, 0.0], [0.0, -1.0]],
    "a product larger than the norms": [[1.0, 3.0], [3.0, 1.0]],
    "a product with a zero gradient": [[0.0, 1.0], [1.0, 1.0]],
    "a product of zero gradients": [[0.0, 1.0], [1.0, 0.0]],
    "a cosine of 1.05": [[1.0, 2.1], [2.1, 4.0]],
    "a cosine just above 1": [[1.0, 2.00021], [2.00021, 4.0]],
    "an asymmetry just above rounding": [[1.0, 1.0], [1.00021, 4.0]],
}


BAD_ARGUMENTS = {
    "too few": ("weights", [1.0]),
    "too many": ("weights", [0.5, 0.25, 0.25]),
    "none": ("weights", []),
    "negative": ("weights", [1.5, -0.5]),
    "not summing to 1": ("weights", [0.5, 0.4]),
    "NaN": ("weights", [NAN, 1.0]),
    "Inf": ("weights", [INF, 0.0]),
    "text": ("weights", ["a", "b"]),
    "nothing": ("weights", None),
    "a number": ("weights", 0.5),
    **{f"c = {c}": ("c", c) for c in (-0.1, NAN, INF, "large", None, [0.1, 0.2])},
    **{f"solver {s}": ("solver", s) for s in ("newton", "", None, 1, ["exact"])},
}


@pytest.mark.parametrize(
    "gram", [*BAD_SHAPES.values(), *BAD_ENTRIES.values()], ids=[*BAD_SHAPES, *BAD_ENTRIES]
)
def test_bad_gram(gram):
    given = [(gram, [0.5, 0.5])]
    if any(gram is x for x in BAD_ENTRIES.values()):
        wider = np.zeros((3, 3))  # another loss, and another solver
        wider[:2, :2], wider[2, 2] = gram, max(np.nanmax(np.diag(gram)), 1e-3)
        given.append((wider, [0.5, 0.25, 0.25]))
    for H, weights in given:
        for solver in ("exact", "slsqp"):
            with pytest.raises(ValueError, match="`gram` must"):
                solve_subproblem(H, weights, 0.4, solver=solver)
        with pytest.raises(ValueError, match="`gram` must"):
            min_norm_point(H)


@pytest.mark.parametrize(("name", "value"), BAD_ARGUMENTS.values(), ids=BAD_ARGUMENTS)
def test_bad_arguments(name, value):
    words = "must be one of 'exact', 'pgd', 'slsqp'; got" if name == "solver" else "must"
    for solver in SOLVERS:
        arguments = {"weights": [0.5, 0.5], "c": 0.4, "solver": solver, name: value}
        with pytest.raises(ValueError, match=f"`{name}` {words}"):
            solve_subproblem([[1.0, 0.0], [0.0, 1.0]], **arguments)


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("m", [2, 3])
def test_rounding_is_no_mistake(m, solver):
    """The asymmetry, the cosine above 1 and the sum of weights of float32 arithmetic."""
    w = [0.2, 0.8 + 5e-7, 0.0][:m]
    inside = 0
    for rounded in (
        [[1.0, 1.0], [1.00019, 4.0]],
        [[1.0, 2.00019], [2.00019, 4.0]],
        [[1.0, -1.0], [-1.00019, 4.0]],
        [[4.0, -1.0], [-1.00019, 1.0]],
    ):
        gram = np.eye(m)
        gram[:2, :2] = rounded
        bound = np.sqrt(np.outer(*[gram.diagonal()] * 2))
        mended = np.clip((gram + gram.T) / 2, -bound, bound)
        p = solve_subproblem(gram, w, 0.4, solver=solver).p
        inside += int((p > 0.01).sum() > 1)
        expected = solve_subproblem(mended, [0.2, 0.8, 0.0][:m], 0.4, solver=solver).p
        np.testing.assert_allclose(p, expected, atol=1e-5)
    assert inside, "at a vertex p would be the same for any mistake"


def test_messages_show_plain_numbers():
    for gram in ([[1.0, 0.5], [0.2, 1.0]], [[1.0, -1.5], [-1.5, 1.0]], [[-1.0, 0.0], [0.0, 1.0]]):
        opposed = np.array([[1, -1, 0, 0], [-1, 1, 0, 0], *np.zeros((2, 4))])
        opposed[2:, 2:] = gram
        for solve_it in (
            lambda: min_norm_point(gram),  # noqa: B023  # called here
            lambda: solve_subproblem(np.longdouble(gram), [0.5, 0.5], 0.4),  # noqa: B023
            lambda: solve_subproblem(opposed, [0.5, 0.5, 0, 0], 0.4),  # noqa: B023
        ):
            with pytest.raises(ValueError, match="`gram` must") as error:
                solve_it()
            assert "np." not in str(error.value)
