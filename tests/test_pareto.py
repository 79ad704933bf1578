"""Pareto tools against witnesses that share no code and no idea with them."""

import itertools
import math
import re
import sys

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from raco_optim.pareto import distance_to_front, hypervolume, pareto_criticality, pareto_front
from tests.oracles import exact_min_norm

CELLS = 5


@st.composite
def integer_points(draw, smallest_m=1, largest_m=4):
    """Points on a small grid, so that ties, duplicates and points on the reference are common."""
    m = draw(st.integers(smallest_m, largest_m))
    row = st.lists(st.integers(0, CELLS), min_size=m, max_size=m)
    return torch.tensor(draw(st.lists(row, min_size=1, max_size=12)), dtype=torch.float64)


def random_points(seed, n, m):
    return torch.rand(n, m, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def dominates(a, b):
    return all(x <= y for x, y in zip(a, b, strict=True)) and a != b


def dominated_cells(points):
    """Hypervolume of integer points under (CELLS, ..., CELLS): the unit cells above any point."""
    m = points.shape[1]
    covered = np.zeros((CELLS,) * m, dtype=bool)
    for point in points.int().tolist():
        covered[tuple(slice(x, None) for x in point)] = True
    return int(covered.sum())


def inclusion_exclusion(points, reference):
    """Volume of a union of boxes as the alternating sum of their intersections."""
    sides = (reference - points).clamp(min=0)
    return math.fsum(
        (-1) ** (size + 1) * float(sides[list(chosen)].amin(dim=0).prod())
        for size in range(1, len(points) + 1)
        for chosen in itertools.combinations(range(len(points)), size)
    )


# pareto_front


@given(integer_points())
def test_front_is_what_pairwise_comparison_says(points):
    rows = points.tolist()
    expected = [not any(dominates(a, b) for a in rows) for b in rows]
    assert pareto_front(points).tolist() == expected


@pytest.mark.parametrize(
    ("points", "expected"),
    [
        ([[1, 2], [2, 1], [1, 2], [2, 2], [2, 2]], [True, True, True, False, False]),
        ([[0.0, 1.0], [-0.0, 1.0]], [True, True]),
        (torch.zeros(0, 3), []),
    ],
    ids=["copies", "negative zero", "no points"],
)
def test_front_of_special_points(points, expected):
    mask = pareto_front(points)
    assert mask.dtype == torch.bool
    assert mask.tolist() == expected


def test_points_on_a_sphere_are_all_non_dominated():
    points = random_points(0, 500, 8)
    assert pareto_front(points / points.norm(dim=1, keepdim=True)).all()


# hypervolume


@given(integer_points())
def test_hypervolume_counts_the_dominated_cells(points):
    assert hypervolume(points, [CELLS] * points.shape[1]).item() == dominated_cells(points)


@pytest.mark.parametrize("m", [1, 2, 3, 4, 5])
@pytest.mark.parametrize("seed", range(3))
def test_hypervolume_is_the_inclusion_exclusion_sum(m, seed):
    points, reference = random_points(seed, 9, m), torch.linspace(0.8, 1.2, m, dtype=torch.float64)
    expected = inclusion_exclusion(points, reference)
    assert hypervolume(points, reference).item() == pytest.approx(expected, rel=1e-12)


def test_hypervolume_of_a_dense_circular_front_is_what_geometry_says():
    angle = torch.linspace(0, math.pi / 2, 20_001, dtype=torch.float64)
    front = torch.stack([angle.cos(), angle.sin()], dim=1)
    # The unit square above the quarter disc. The staircase of n steps lies below it by O(1 / n).
    assert hypervolume(front, [1.0, 1.0]).item() == pytest.approx(1 - math.pi / 4, abs=1e-4)


@pytest.mark.parametrize("m", [1, 2, 3, 4])
def test_hypervolume_moves_with_a_translation_and_scales_with_the_units(m):
    points, reference = random_points(7, 20, m), torch.ones(m, dtype=torch.float64)
    volume = hypervolume(points, reference).item()
    # 2**20 is added without losing more than the last 20 bits of the 53.
    moved = hypervolume(points + 2**20, reference + 2**20).item()
    assert moved == pytest.approx(volume, rel=1e-8)
    units = torch.logspace(-8, 8, m, base=10, dtype=torch.float64)
    scaled = hypervolume(points * units, reference * units).item()
    assert scaled == pytest.approx(volume * units.prod().item(), rel=1e-12)


@pytest.mark.parametrize("m", [1, 2, 3])
def test_points_beyond_or_on_the_reference_add_nothing(m):
    inside = torch.full((1, m), 0.5, dtype=torch.float64)
    outside = torch.zeros(2, m, dtype=torch.float64)
    outside[0, 0], outside[1, 0] = 1, 2
    assert hypervolume(torch.cat([inside, outside]), [1.0] * m).item() == 0.5**m
    assert hypervolume(outside, [1.0] * m).item() == 0


@pytest.mark.parametrize("m", [1, 2, 3])
def test_hypervolume_of_no_points_is_zero(m):
    volume = hypervolume(torch.zeros(0, m), [1.0] * m)
    assert volume.item() == 0
    assert volume.dtype == torch.float64
    assert volume.shape == ()


def test_two_objectives_need_no_optional_package(monkeypatch):
    monkeypatch.setitem(sys.modules, "moocore", None)
    assert hypervolume([[1.0, 3.0], [2.0, 2.0]], [4.0, 4.0]).item() == 5
    assert hypervolume([[1.0], [2.0]], [4.0]).item() == 3
    message = (
        "`hypervolume` must have moocore installed for three objectives or more; got none. "
        'Run `pip install "raco_optim[pareto]"`.'
    )
    with pytest.raises(ImportError, match=re.escape(message)):
        hypervolume([[1.0, 1.0, 1.0]], [2.0, 2.0, 2.0])


# distance_to_front


@given(integer_points(3, 3), integer_points(3, 3))
def test_distance_is_the_smallest_of_all_pairs(points, front):
    expected = [min(math.dist(a, b) for b in front.tolist()) for a in points.tolist()]
    assert distance_to_front(points, front).tolist() == pytest.approx(expected, rel=1e-14)


def test_distance_keeps_its_digits_far_from_the_origin():
    front = random_points(0, 50, 3) + 2**20
    offset = torch.tensor([3.0, 4.0, 0.0], dtype=torch.float64) * 2**-20
    distances = distance_to_front(front + offset, front)
    torch.testing.assert_close(distances, torch.full_like(distances, 5 * 2**-20), rtol=1e-3, atol=0)


def test_swapped_arguments_give_the_inverted_generational_distance():
    front, found = [[0.0, 2.0], [1.0, 1.0], [2.0, 0.0]], [[1.0, 1.0]]
    assert distance_to_front(found, front).mean().item() == 0
    igd = distance_to_front(front, found).mean().item()
    assert igd == pytest.approx(2 * math.sqrt(2) / 3)


def test_distances_of_no_points_are_empty():
    assert distance_to_front(torch.zeros(0, 2), [[1.0, 2.0]]).shape == (0,)


# pareto_criticality


def two_gradients(norm_1, norm_2, angle):
    inner = norm_1 * norm_2 * math.cos(angle)
    return torch.tensor([[norm_1**2, inner], [inner, norm_2**2]], dtype=torch.float64)


@pytest.mark.parametrize("norms", [(1.0, 1.0), (3.0, 0.5), (1e-6, 2e-6), (1e5, 4e4)])
@pytest.mark.parametrize("angle", [0.3, 1.0, math.pi / 2, 2.0, 3.0])
def test_criticality_of_two_gradients_is_the_distance_from_a_segment(norms, angle):
    a, b = norms
    # The foot of the perpendicular on the line through g_1 and g_2 lies between them if each
    # gradient's projection on the other is shorter than the other; then it is the triangle's
    # height over that side.
    inside = math.cos(angle) < min(a, b) / max(a, b)
    side = math.sqrt(a**2 + b**2 - 2 * a * b * math.cos(angle))
    expected = a * b * math.sin(angle) / side if inside else min(a, b)
    assert pareto_criticality(two_gradients(a, b, angle)).item() == pytest.approx(
        expected, rel=1e-7
    )


@pytest.mark.parametrize("seed", range(20))
def test_criticality_is_the_least_norm_to_40_digits(seed):
    rng = np.random.default_rng(seed)
    # Integers: H has no rounding in it, and dependent gradients are common.
    gradients = rng.integers(-4, 5, size=(2 + seed % 4, 3)).astype(float)
    gram = gradients @ gradients.T
    tolerance = 1e-7 * math.sqrt(gram.diagonal().max())
    assert pareto_criticality(gram).item() == pytest.approx(exact_min_norm(gram), abs=tolerance)


@pytest.mark.parametrize("scale", [1e-16, 1e-8, 1.0, 1e8, 1e16])
def test_criticality_has_the_unit_of_a_gradient(scale):
    gram = two_gradients(1.0, 2.0, 2.0)
    expected = math.sqrt(scale) * pareto_criticality(gram).item()
    assert pareto_criticality(scale * gram).item() == pytest.approx(expected, rel=1e-9)


def test_criticality_vanishes_where_gradients_oppose_and_is_the_norm_where_they_agree():
    direction = torch.tensor([3.0, 4.0], dtype=torch.float64)
    opposed = torch.stack([direction, -2 * direction])
    assert pareto_criticality(opposed @ opposed.T).item() <= 1e-7
    agreeing = torch.stack([direction, direction])
    assert pareto_criticality(agreeing @ agreeing.T).item() == pytest.approx(5.0)
    assert pareto_criticality([[25.0]]).item() == pytest.approx(5.0)
    assert pareto_criticality([[0.0, 0.0], [0.0, 25.0]]).item() == 0


# What goes in and out


@pytest.mark.parametrize(
    "convert",
    [
        torch.Tensor.tolist,
        torch.Tensor.numpy,
        torch.Tensor.float,
        torch.Tensor.int,
        lambda points: points.clone().requires_grad_(),
    ],
    ids=["list", "numpy", "float32", "int32", "requires_grad"],
)
def test_array_likes_of_any_real_type_go_in_and_plain_float64_comes_out(convert):
    points = torch.tensor([[1.0, 3.0], [2.0, 2.0], [3.0, 3.0]], dtype=torch.float64)
    given_points = convert(points)
    assert pareto_front(given_points).tolist() == [True, True, False]
    for result in (hypervolume(given_points, [4, 4]), distance_to_front(given_points, [[1, 1]])):
        assert result.dtype == torch.float64
        assert not result.requires_grad
    assert hypervolume(given_points, [4, 4]).item() == 5
    assert torch.equal(torch.as_tensor(given_points).detach().double(), points)


PAIR = [[1.0, 2.0], [2.0, 1.0]]
SHAPE = (
    "`{0}` must have shape [n, m], one row per point and m >= 1 objectives; got {1}. "
    "Pass a single point as `{0}[None]`."
)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda: pareto_front([1.0, 2.0]),
            SHAPE.format("points", [2]),
        ),
        (
            lambda: pareto_front(torch.zeros(3, 0)),
            SHAPE.format("points", [3, 0]),
        ),
        (
            lambda: pareto_front([[1.0, 2.0], [3.0]]),
            "`points` must be an array of numbers; got [[1.0, 2.0], [3.0]]. Pass rows of "
            "equal length.",
        ),
        (
            lambda: pareto_front("front"),
            "`points` must be an array of numbers; got 'front'. Pass rows of equal length.",
        ),
        (
            lambda: pareto_front(torch.ones(1, 2, dtype=torch.complex64)),
            "`points` must be real; got torch.complex64. Pass its real part.",
        ),
        (
            lambda: pareto_front([[1.0, math.nan], [math.inf, 1.0]]),
            "`points` must be finite; got 2 NaN or Inf. Leave out diverged runs.",
        ),
        (
            lambda: hypervolume([[1.0, -math.inf]], [2.0, 2.0]),
            "`points` must be finite; got 1 NaN or Inf. Leave out diverged runs.",
        ),
        (
            lambda: hypervolume(PAIR, [3.0, 3.0, 3.0]),
            "`reference` must have shape [2], one bound per objective of `points`; got [3]. Pass "
            "the worst values that should count.",
        ),
        (
            lambda: hypervolume(PAIR, 3.0),
            "`reference` must have shape [2], one bound per objective of `points`; got []. Pass "
            "the worst values that should count.",
        ),
        (
            lambda: hypervolume(PAIR, [3.0, math.nan]),
            "`reference` must be finite; got 1 NaN or Inf. Leave out diverged runs.",
        ),
        (
            lambda: distance_to_front(PAIR, [[1.0, 2.0, 3.0]]),
            "`front` must have shape [k, 2] with k >= 1, the objectives of `points`; got [1, 3].",
        ),
        (
            lambda: distance_to_front(PAIR, torch.zeros(0, 2)),
            "`front` must have shape [k, 2] with k >= 1, the objectives of `points`; got [0, 2].",
        ),
        (
            lambda: distance_to_front(PAIR, [1.0, 2.0]),
            SHAPE.format("front", [2]),
        ),
        (
            lambda: distance_to_front(PAIR, [[1.0, math.nan]]),
            "`front` must be finite; got 1 NaN or Inf. Leave out diverged runs.",
        ),
    ],
)
def test_bad_input_is_refused_with_the_rule_the_value_and_the_remedy(call, message):
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        call()


@pytest.mark.parametrize(
    "gram", [[[1.0, 2.0]], [[1.0, math.nan], [math.nan, 1.0]], [[-1.0]], [[1.0, 0.5], [0.0, 1.0]]]
)
def test_criticality_refuses_what_is_no_gram_matrix(gram):
    with pytest.raises(ValueError, match="^`gram` must "):
        pareto_criticality(gram)
