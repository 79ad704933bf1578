"""Statistics over records, against what a few lines without the library compute."""

import itertools
import math
import random
import statistics

import pytest

from raco_optim.cli.cells import Cell, cell_of, costs, finite, group_by_point
from raco_optim.cli.statistics import (
    bootstrap_interval,
    frame,
    front,
    front_distances,
    hypervolumes,
    indistinguishable,
    paired_difference,
    sign_flip_p_value,
)


def record(method, weights, seed, losses, *, c=None, accuracies=None):
    accuracies = accuracies or [0.5] * len(losses)
    point = {"method": method, "weights": dict(zip("abc", weights, strict=False))}
    evaluation = {
        name: {"loss": loss, "margin": loss and -loss, "accuracy": accuracy, "labelled": 10}
        for name, loss, accuracy in zip("abc", losses, accuracies, strict=False)
    }
    return {"point": point | {"seed": seed, "c": c}, "evaluation": evaluation}


def random_records(m, generator, methods=("linear", "raco"), seeds=3):
    corners = [[0.8 if i == j else 0.2 / (m - 1) for i in range(m)] for j in range(m)]
    return [
        record(method, weights, seed, [generator.uniform(0.4, 0.9) for _ in range(m)])
        for seed in range(seeds)
        for weights in corners
        for method in methods
    ]


# Cells


def test_cells_differ_in_method_radius_and_weights_but_not_in_the_seed():
    groups = group_by_point(
        [
            record("raco", [0.5, 0.5], 0, [1, 2], c=0.4),
            record("raco", [0.5, 0.5], 1, [1, 2], c=0.4),
            record("raco", [0.5, 0.5], 0, [1, 2], c=0.1),
            record("raco", [0.2, 0.8], 0, [1, 2], c=0.4),
            record("linear", [0.5, 0.5], 0, [1, 2]),
        ]
    )
    assert [(cell.method, len(group)) for cell, group in groups.items()] == [
        ("raco (c = 0.4)", 2),
        ("raco (c = 0.1)", 1),
        ("raco (c = 0.4)", 1),
        ("linear", 1),
    ]
    # A method that takes no weights is one cell.
    assert cell_of(record("mgda", [0.2, 0.8], 0, [1, 2])) == Cell("mgda", None)


def test_costs_are_minimised_and_finite():
    r = record("linear", [0.5, 0.5], 0, [0.6, 0.7], accuracies=[0.75, 0.5])
    assert costs(r, "loss") == costs(r, "margin") == [0.6, 0.7]
    assert costs(r, "accuracy") == [0.25, 0.5]
    assert finite([r, record("linear", [1.0], 1, [None])], "loss") == [r]


# Bootstrap


def test_interval_of_three_values_is_that_of_all_27_resamples():
    values = [1.0, 2.0, 4.0]
    means = sorted(statistics.fmean(drawn) for drawn in itertools.product(values, repeat=3))
    # At 90% the ends lie well inside an atom of the distribution: 1/27 < 5% < 4/27.
    interval = bootstrap_interval(values, level=0.9)
    assert interval.mean == pytest.approx(7 / 3)
    assert interval.low == pytest.approx(means[math.floor(0.05 * 27)])
    assert interval.high == pytest.approx(means[-1 - math.floor(0.05 * 27)])


def test_interval_of_many_values_is_the_normal_one():
    generator = random.Random(0)
    values = [generator.gauss(3, 2) for _ in range(400)]
    mean, low, high = bootstrap_interval(values)
    half = 1.96 * statistics.stdev(values) / 20
    assert (low, high) == pytest.approx((mean - half, mean + half), abs=0.03)


def test_interval_moves_and_scales_with_the_values():
    generator = random.Random(0)
    values = [generator.random() for _ in range(20)]
    plain = bootstrap_interval(values)
    moved = bootstrap_interval([3 + 2 * x for x in values])
    assert list(moved) == pytest.approx([3 + 2 * x for x in plain])
    assert bootstrap_interval(values) == plain, "it is repeatable"
    assert bootstrap_interval(values, seed=1) != plain


def test_bootstrap_refuses():
    assert list(bootstrap_interval([2.0])) == pytest.approx([2.0, math.nan, math.nan], nan_ok=True)
    with pytest.raises(ValueError, match="at least one value; got none"):
        bootstrap_interval([])
    for level in (0, 1, 95):
        with pytest.raises(ValueError, match=rf"`level` must be in \(0, 1\); got {level}"):
            bootstrap_interval([1.0], level=level)


# Fronts and volumes


def volume(points, worst):
    """Inclusion and exclusion over all sets of boxes."""
    total = 0.0
    for k in range(1, len(points) + 1):
        for chosen in itertools.combinations(points, k):
            sides = [w - max(column) for w, *column in zip(worst, *chosen, strict=True)]
            total += (-1) ** (k + 1) * math.prod(max(side, 0.0) for side in sides)
    return total


@pytest.mark.parametrize("m", [2, 3])
def test_hypervolume_is_the_share_of_the_box_that_is_dominated(m):
    records = random_records(m, random.Random(m))
    columns = list(zip(*(costs(r, "loss") for r in records), strict=True))
    best = [min(column) for column in columns]
    worst = [1.1 * max(column) - 0.1 * min(column) for column in columns]
    assert list(map(list, frame(records, "loss"))) == [pytest.approx(best), pytest.approx(worst)]
    box = math.prod(w - b for w, b in zip(worst, best, strict=True))
    found = hypervolumes(records, "loss")
    assert set(found) == {"linear", "raco"}
    for method, by_seed in found.items():
        assert set(by_seed) == {0, 1, 2}
        for seed, value in by_seed.items():
            own = [r for r in records if r["point"]["method"] == method]
            points = [costs(r, "loss") for r in own if r["point"]["seed"] == seed]
            assert value == pytest.approx(volume(points, worst) / box)


def test_hypervolume_of_accuracies_does_not_depend_on_the_other_runs():
    r = record("linear", [0.5, 0.5], 0, [0.5, 0.5], accuracies=[0.6, 0.7])
    other = record("raco", [0.5, 0.5], 0, [0.5, 0.5], accuracies=[0.9, 0.1])
    for records in ([r], [r, other]):
        assert hypervolumes(records, "accuracy")["linear"][0] == pytest.approx(0.42)


def test_hypervolume_of_few_runs():
    records = random_records(2, random.Random(0), methods=["linear"])
    assert set(hypervolumes(records[:-1], "loss")["linear"]) == {0, 1}, "a seed lacks a run"
    assert hypervolumes([record("linear", [1.0], 0, [0.5])], "loss") == {"linear": {0: 1.0}}


@pytest.mark.parametrize("m", [1, 2, 3])
def test_front_and_distances_are_those_of_brute_force(m):
    generator = random.Random(m)
    records = [
        record("linear", [1 / m] * m, seed, [generator.uniform(0, 1) for _ in range(m)])
        for seed in range(30)
    ]
    points = [costs(r, "loss") for r in records]
    marks = [
        not any(
            other != point and all(x <= y for x, y in zip(other, point, strict=True))
            for other in points
        )
        for point in points
    ]
    assert front(records, "loss") == marks
    best = list(itertools.compress(points, marks))
    assert front_distances(records, "loss") == pytest.approx(
        [min(math.dist(point, b) for b in best) for point in points]
    )


# Paired differences


def test_differences_are_paired_by_weights_and_seed():
    records = [
        record("linear", [0.25, 0.75], 0, [1.0, 2.0]),
        record("linear", [0.25, 0.75], 1, [3.0, 1.0]),
        record("linear", [0.5, 0.5], 0, [9.0, 9.0]),
        record("raco", [0.25, 0.75], 0, [0.5, 2.5], c=0.4),
        record("raco", [0.25, 0.75], 1, [2.0, 1.5], c=0.4),
        record("raco", [0.25, 0.75], 2, [0.0, 0.0], c=0.4),  # its baseline is missing
        record("mgda", [0.5, 0.5], 0, [1.0, 1.0]),  # asks for no weights: no pair
    ]
    a, b, weighted = paired_difference(records, "loss")
    for d, objective in ((a, "a"), (b, "b"), (weighted, None)):
        assert (d.cell.method, d.objective, d.seeds) == ("raco (c = 0.4)", objective, 2)
    assert a.interval.mean == pytest.approx((-0.5 - 1.0) / 2)
    assert (a.interval.low, a.interval.high) == pytest.approx((-1.0, -0.5))
    assert b.interval.mean == pytest.approx(0.5)
    assert weighted.interval.mean == pytest.approx(0.25 * -0.75 + 0.75 * 0.5)


def test_pairing_removes_what_the_seed_does_to_both():
    generator = random.Random(0)
    lucks = [generator.gauss(0, 10) for _ in range(5)]
    records = [record("linear", [1.0], seed, [luck]) for seed, luck in enumerate(lucks)]
    records += [record("amopo", [1.0], seed, [luck + 0.5]) for seed, luck in enumerate(lucks)]
    difference = paired_difference(records, "loss")[0]
    assert list(difference.interval) == pytest.approx([0.5, 0.5, 0.5])


def test_another_baseline_and_none():
    records = [record("raco", [1.0], 0, [1.0], c=0.1), record("linear", [1.0], 0, [3.0])]
    found = paired_difference(records, "loss", baseline="raco (c = 0.1)")
    assert [d.interval.mean for d in found] == [2.0, 2.0]
    assert paired_difference(records, "loss", baseline="modpo") == []


# Tests


def test_p_value_is_the_share_of_all_signs():
    generator = random.Random(0)
    for n in (1, 3, 6):
        differences = [generator.gauss(0.5, 1) for _ in range(n)]
        signed = itertools.product(*((d, -d) for d in differences))
        sums = [abs(sum(x)) for x in signed]
        share = sum(x >= abs(sum(differences)) - 1e-12 for x in sums) / len(sums)
        assert sign_flip_p_value(differences) == share
    assert sign_flip_p_value([1.0] * 20) < 0.01
    assert sign_flip_p_value([0.0] * 4) == 1.0


def test_holm_accepts_from_the_first_p_value_that_is_too_large():
    """Of three methods, one far from two that are alike; with too few seeds, none."""

    def found(seeds):
        generator = random.Random(0)
        records = [
            record(method, [0.5, 0.5], seed, [x + generator.uniform(0, 0.1) for _ in "ab"])
            for method, x in (("linear", 5.0), ("mgda", 0.5), ("raco", 0.5))
            for seed in range(seeds)
        ]
        return indistinguishable(records, "loss")

    assert found(8) == [("mgda", "raco")]
    assert found(6) == [("linear", "mgda"), ("linear", "raco"), ("mgda", "raco")]
