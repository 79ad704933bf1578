"""What stands in a picture is what the reports say: data on the axes, not pixels."""

import dataclasses
import itertools
import math
import re
import sys
import xml.etree.ElementTree
from pathlib import Path

import matplotlib
import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from torch import nn

from raco_optim import (
    MGDA,
    CAGrad,
    CAGradClip,
    LinearScalarization,
    MultiObjectiveOptimizer,
    Outcome,
    StepLogger,
    plot,
    read_steps,
)
from raco_optim.plot.moving import moving

PICTURES = [plot.cosines, plot.solution, plot.clip_angle, plot.conflict_rate]


def report_of(rows, weights, method=CAGradClip, **kwargs):
    """Reports a step on losses whose gradients are the rows, and whose values are their sums."""
    rows = torch.tensor(rows, dtype=torch.float64)
    x = nn.Parameter(torch.ones(rows.shape[1], dtype=torch.float64))
    opt = method(torch.optim.SGD([x], 0.1), weights, **kwargs)
    losses = [None if row.isnan().all() else row @ x for row in rows]
    opt.backward(dict(zip(weights, losses, strict=True)) if isinstance(weights, dict) else losses)
    return opt.report


def run_of(m=2, n=4, method=CAGradClip, weights=None, seed=0):
    rng = np.random.default_rng(seed)
    weights = weights or {f"loss {i}": w for i, w in enumerate(np.ones(m) / m)}
    return [
        report_of(rng.normal(size=(len(weights), 5)).tolist(), weights, method) for _ in range(n)
    ]


def turned_by(degrees, rows=((1.0, 0.0), (0.0, 1.0))):
    """Reports a step of two losses in which clipping turned the correction by an angle."""
    x = math.radians(degrees)
    before, after = [1.0, 0.0], [math.cos(x), math.sin(x)]
    # Coefficients with which the gradients, the rows, combine to these vectors.
    p, p_clipped = torch.linalg.solve(
        torch.tensor(rows, dtype=torch.float64), torch.tensor([before, after]).double(), left=False
    )
    return dataclasses.replace(report_of(rows, [0.5, 0.5]), p=p, p_clipped=p_clipped)


def lines(ax, dashes="-"):
    """y of the lines with data: not the one at zero, nor the legend's."""
    found = [line for line in ax.get_lines() if line.get_linestyle() == dashes]
    return [np.asarray(line.get_ydata()) for line in found if len(line.get_xdata()) != 2]


def legend_of(ax):
    return [text.get_text() for text in ax.get_legend().get_texts()]


def heat_map(ax):
    (mesh,) = ax.collections
    assert ax.get_ylim()[0] > ax.get_ylim()[1]  # the first row is on top
    return mesh.get_array(), [text.get_text() for text in ax.get_yticklabels()]


# Curves


def test_cosines_are_those_of_the_gradients():
    rng = np.random.default_rng(0)
    rows = rng.normal(size=(5, 3, 4))
    names = {"a": 0.5, "b": 0.3, "c": 0.2}
    ax = plot.cosines([report_of(row.tolist(), names) for row in rows], window=1)
    unit = rows / np.linalg.norm(rows, axis=-1, keepdims=True)
    expected = [np.einsum("nk,nk->n", unit[:, i], unit[:, j]) for i, j in ((0, 1), (0, 2), (1, 2))]
    np.testing.assert_allclose(lines(ax), expected, atol=1e-12)
    assert legend_of(ax) == ["a, b", "a, c", "b, c"]
    assert ax.get_xlabel() == "step"
    assert np.array_equal(ax.get_lines()[1].get_xdata(), range(5))


def test_cosines_that_do_not_exist_are_left_out():
    """Of absent losses, zero gradients and an infinite product."""
    rows = [[1.0, 1.0], [math.nan] * 2, [0.0, 0.0]]
    reports = [report_of([[1.0, 0.0], row], [0.5, 0.5]) for row in rows]
    gram = torch.tensor([[math.inf, 1.0], [1.0, 1.0]], dtype=torch.float64)
    reports.append(dataclasses.replace(reports[0], gram=gram))
    cosine = math.sqrt(0.5)
    found = lines(plot.cosines(reports, window=1))[0]
    np.testing.assert_allclose(found, [cosine, *[math.nan] * 3])
    found = plot.cosines(reports[:3], window=3).get_lines()[1].get_ydata()
    np.testing.assert_allclose(found, cosine)


def stacked(reports, name):
    return torch.stack([getattr(r, name) for r in reports]).T.numpy()


def test_solution_has_p_the_clipped_p_and_the_weights():
    reports = run_of(m=3, n=6, weights={"a": 0.5, "b": 0.3, "c": 0.2})
    ax = plot.solution(reports, window=1)
    for dashes, name in (("-", "p_clipped"), ("--", "p"), (":", "weights")):
        np.testing.assert_allclose(lines(ax, dashes), stacked(reports, name))
    assert legend_of(ax) == ["a", "b", "c", "clipped p", "p", "weight w"]
    assert len(ax.collections) == 3  # between p and the clipped p
    assert ax.get_ylabel() == "p, clipped p and weight"
    for method in (CAGrad, MGDA):  # which do not clip
        reports = run_of(n=6, method=method)
        ax = plot.solution(reports, window=1)
        np.testing.assert_allclose(lines(ax), stacked(reports, "p"))
        assert legend_of(ax)[2:] == ["p", "weight w"]
        assert not ax.collections
        assert ax.get_ylabel() == "p and weight"


def test_clip_angle_is_in_degrees():
    # Theorem 3.2's strict witness; see tests/test_report.py, whose angle is another's.
    rows, weights = [[1.0, -4.0], [-1.0, 1.0]], [0.2, 0.8]
    report = report_of(rows, weights, c=0.5)
    turned = [p.numpy() @ np.array(rows) for p in (report.p, report.p_clipped)]
    expected = math.degrees(abs(np.subtract(*[math.atan2(y, x) for x, y in turned])))
    tiny, opposite = turned_by(1e-6), turned_by(180)
    ax = plot.clip_angle([report, tiny, opposite], window=1)
    np.testing.assert_allclose(lines(ax)[0], [expected, 1e-6, 180])
    assert ax.get_ylabel().endswith("[°]")


AGREE, CONFLICT, HURT = ([[1.0, 0.0], row] for row in ([1.0, 1.0], [-1.0, 0.1], [-4.0, 0.1]))


def test_conflict_rate_is_the_share_of_the_steps_with_an_update():
    reports = [report_of(rows, [0.5, 0.5]) for rows in (AGREE, AGREE, CONFLICT, HURT)]
    assert [r.hurting for r in reports] == [False, False, False, True]
    bad = report_of([[math.inf, 0.0], [1.0, 0.0]], [0.5, 0.5], nonfinite="skip")
    assert bad.outcome is Outcome.SKIPPED
    ax = plot.conflict_rate([*reports, bad])
    np.testing.assert_allclose(np.ravel(lines(ax)), [50, 25])
    assert ax.get_xlabel() == "step (means of 5)"


@pytest.mark.parametrize("where", ["gradient", "loss", "rule"])
@pytest.mark.parametrize("nonfinite", ["skip", "propagate"])
def test_steps_that_were_not_finite_are_in_no_rate(where, nonfinite):
    good = [report_of(rows, [0.5, 0.5]) for rows in (AGREE, AGREE, AGREE, HURT)]
    x = nn.Parameter(torch.ones(2))
    sgd, options = torch.optim.SGD([x], 0.1), {"weights": [0.5, 0.5], "nonfinite": nonfinite}
    if where == "rule":
        opt = MultiObjectiveOptimizer(sgd, lambda gram: gram[0] * math.nan, **options)
    else:
        opt = CAGradClip(sgd, **options)
    # The root has the value 0 and an infinite slope there.
    first = (x[0] - 1).sqrt() if where == "gradient" else x[0]
    opt.backward([first + (math.nan if where == "loss" else 0.0), x @ torch.tensor(HURT[1])])
    bad = opt.report
    assert bad.conflicting
    if nonfinite == "skip":
        assert bad.outcome is Outcome.SKIPPED
    elif where != "rule":
        assert bad.outcome is Outcome.NONFINITE
    # One in four of the steps with a finite update; two in five of all.
    np.testing.assert_allclose(np.ravel(lines(plot.conflict_rate([*good, bad]))), [25, 25])
    ax = plot.conflict_rate([*good, bad], window=1)
    np.testing.assert_allclose(lines(ax), [[0, 0, 0, 100, math.nan]] * 2)
    np.testing.assert_allclose(lines(plot.solution([*good, bad], window=1))[0][-1], math.nan)
    with pytest.raises(ValueError, match="must have an update in at least one step"):
        plot.conflict_rate([bad])


def test_an_absent_loss_is_a_gap_in_p_and_its_step_counts():
    rows, names = [[1.0, -4.0], [-1.0, 1.0]], {"a": 0.1, "b": 0.4, "c": 0.5}
    absent = report_of([*rows, [math.nan] * 2], names)
    assert absent.absent == ("c",)
    # The step of the two alone, with their shares of the weights.
    alone = report_of(rows, [0.2, 0.8])
    full = report_of([*rows, [1.0, 1.0]], names)
    reports = [full, absent, full]
    ax = plot.solution(reports, window=1)
    for dashes, name in (("--", "p"), ("-", "p_clipped")):
        drawn = [curve[1] for curve in lines(ax, dashes)]
        np.testing.assert_allclose(drawn, [*getattr(alone, name), math.nan])
    drawn = lines(plot.clip_angle(reports, window=1))[0][1]
    np.testing.assert_allclose(drawn, lines(plot.clip_angle([alone], window=1))[0][0])
    assert drawn > 1
    np.testing.assert_allclose(lines(plot.conflict_rate(reports, window=1))[0], [100] * 3)
    # Four losses are the rows of a heat map.
    four = {"a": 0.1, "b": 0.4, "c": 0.25, "d": 0.25}
    reports = [report_of([*rows, [1.0, 1.0], last], four) for last in ([2.0, 1.0], [math.nan] * 2)]
    empty = {}
    for picture in (plot.solution, plot.cosines):
        cells, labels = heat_map(picture(reports, window=1))
        masks = np.ma.getmaskarray(np.ma.masked_invalid(cells)).tolist()
        empty |= dict(zip(labels, masks, strict=True))
    gaps = {label for label, mask in empty.items() if mask == [False, True]}
    assert gaps == {"d", "d, clipped", "a, d", "b, d", "c, d"}
    assert not any(any(mask) for label, mask in empty.items() if label not in gaps)
    for log in (reports, [absent] * 3):
        plot.overview(log).draw_without_rendering()


@pytest.mark.parametrize("window", [1, 7, 40])
def test_means_and_quartiles_are_those_of_the_finite_values(window):
    rng = np.random.default_rng(0)
    steps, values = np.cumsum(rng.integers(1, 5, size=40)).astype(float), rng.normal(size=40)
    values[rng.random(40) < 0.3] = math.nan
    values[3:13] = math.nan  # a window without a value
    values[20] = math.inf
    curve = moving(steps, values, window)
    values[20] = math.nan
    for k in range(41 - window):
        part = values[k : k + window]
        part = part[~np.isnan(part)]
        found = [c[k] for c in (curve.mean, curve.low, curve.high)]
        if len(part):
            quartiles = np.quantile(part, [0.25, 0.75], method="nearest")
            np.testing.assert_allclose(found, [part.mean(), *quartiles])
        else:
            assert np.isnan(found).all()
        assert curve.x[k] == pytest.approx(steps[k : k + window].mean())


def test_thousands_of_steps_are_a_few_points(tmp_path):
    rng = np.random.default_rng(0)
    angle, conflict = rng.integers(0, 90, 4000), rng.integers(0, 2, 4000)
    kinds = [((1.0, 0.0), (0.0, 1.0)), ((1.0, 0.0), (-1.0, 1.0))]
    found = {(k, x): turned_by(x, rows) for k, rows in enumerate(kinds) for x in range(90)}
    reports = [found[k, x] for k, x in zip(conflict.tolist(), angle.tolist(), strict=True)]
    figure = plot.overview(reports)
    for ax in figure.axes:
        assert all(len(line.get_xdata()) <= 120 for line in ax.get_lines())
        assert re.search(r"step \(means of 134", ax.get_xlabel())
    drawn = np.asarray(figure.axes[2].get_lines()[0].get_ydata())
    assert drawn[0] == pytest.approx(angle[:134].mean())
    assert drawn[-1] == pytest.approx(angle[-134:].mean())
    plot.save(figure, tmp_path / "long.svg")
    assert (tmp_path / "long.svg").stat().st_size < 300_000


# Heat maps


def test_more_losses_are_a_heat_map_with_the_worst_conflicts_on_top():
    reports = run_of(m=5, n=6)
    cells, names = heat_map(plot.cosines(reports, window=1))
    expected = {
        f"loss {i}, loss {j}": torch.stack([r.cosines[i, j] for r in reports]).numpy()
        for i, j in itertools.combinations(range(5), 2)
    }
    assert names == sorted(expected, key=lambda name: expected[name].mean())
    np.testing.assert_allclose(cells, [expected[name] for name in names])


def test_a_heat_map_of_p_has_both_and_the_largest_on_top():
    reports = run_of(m=4, n=6)
    cells, names = heat_map(plot.solution(reports, window=1))
    order = torch.stack([r.p for r in reports]).mean(0).argsort(descending=True, stable=True)
    assert names == [f"loss {i}{end}" for i in order for end in ("", ", clipped")]
    np.testing.assert_allclose(cells[::2], stacked(reports, "p")[order.numpy()])
    np.testing.assert_allclose(cells[1::2], stacked(reports, "p_clipped")[order.numpy()])
    assert len(heat_map(plot.solution(run_of(m=4, method=MGDA)))[1]) == 4


def test_a_heat_map_says_what_does_not_fit():
    reports = run_of(m=12, n=2)
    low, high = (Figure(figsize=(5, inches)).subplots() for inches in (2, 10))
    plot.cosines(reports, ax=low)
    rows = len(heat_map(low)[1])
    assert 10 < rows < 66
    assert f"({66 - rows} more do not fit)" in low.figure.axes[1].get_ylabel()
    plot.cosines(reports, ax=high)
    assert len(heat_map(high)[1]) == 66
    assert high.figure.axes[1].get_ylabel() == "cosine of the gradients"


# Overview


def diagonal_rule(inner, weights):
    return MultiObjectiveOptimizer(inner, torch.diag, weights=weights)


@pytest.mark.parametrize(
    ("method", "labels"),
    [
        (CAGradClip, ["cosine", "p, clipped p and weight", "angle", "share"]),
        (CAGrad, ["cosine", "p and weight", "share"]),
        (LinearScalarization, ["cosine", "share"]),
        (diagonal_rule, ["cosine", "share"]),
    ],
)
def test_overview_has_what_the_rule_has(method, labels):
    found = [ax.get_ylabel() for ax in plot.overview(run_of(method=method)).axes]
    assert len(found) == len(labels)
    assert all(map(str.startswith, found, labels))


def test_overview_of_a_single_loss_or_step_draws():
    assert len(plot.overview(run_of(m=1)).axes) == 2
    plot.overview(run_of(n=1)).draw_without_rendering()


def test_a_file_a_log_and_reports_give_one_picture(tmp_path):
    path, reports = tmp_path / "steps.jsonl", []
    x = nn.Parameter(torch.tensor([2.0, 3.0]))
    opt = CAGradClip(torch.optim.SGD([x], 0.01), [0.2, 0.8])
    with StepLogger(path) as logger:
        for t in range(4):
            opt.zero_grad()
            opt.backward([(x[0] - 2 * x[1] + t).square(), (x[0] * x[1] - t).square()])
            opt.step()
            logger.log(opt, step=10 * t)
            reports.append(opt.report)
    for picture in PICTURES:
        first, *others = (
            lines(picture(log, window=1)) for log in (path, str(path), read_steps(path), reports)
        )
        assert all(np.array_equal(first, other, equal_nan=True) for other in others)
    assert plot.cosines(path, window=2).get_lines()[1].get_xdata().tolist() == [5, 15, 25]


# Front


def ended(weights, losses, steps=20):
    """A run with the losses 9 until its last tenth, whose means are the losses."""
    m = len(weights)
    template = report_of(np.eye(m).tolist(), weights)
    last = torch.tensor(losses, dtype=torch.float64)
    tenth = steps // 10
    wobble = [0.1 * (2 * k - tenth + 1) for k in range(tenth)]
    before = [dataclasses.replace(template, losses=torch.full_like(last, 9.0))] * (steps - tenth)
    return [*before, *(dataclasses.replace(template, losses=last + x) for x in wobble)]


def two(w):
    return {"a": w, "b": 1 - w}


ENDS = {0.2: [4.0, 1.0], 0.5: [2.0, 2.0], 0.6: [2.5, 3.0], 0.8: [1.0, 4.0]}


@pytest.fixture
def runs():
    return [ended(two(w), losses) for w, losses in ENDS.items()]


def points_of(ax, hollow=False):
    """The markers that are filled, or hollow."""
    found = [line for line in ax.get_lines() if line.get_marker() == "o"]
    found = [line for line in found if (line.get_markerfacecolor() == "white") == hollow]
    return sorted(map(list, np.concatenate([line.get_xydata() for line in found]).tolist()))


def test_front_has_the_ends_of_the_runs_and_their_weights(runs):
    ax = plot.front(runs)
    np.testing.assert_allclose(points_of(ax), [[1, 4], [2, 2], [4, 1]])
    np.testing.assert_allclose(points_of(ax, hollow=True), [[2.5, 3]])
    found = {text.get_text(): text.xy for text in ax.texts}
    expected = {f"{w:g} / {1 - w:.1g}": losses for w, losses in ENDS.items()}
    assert found.keys() == expected.keys()
    for text, losses in expected.items():
        np.testing.assert_allclose(found[text], losses)
    assert (ax.get_xlabel(), ax.get_ylabel()) == ("loss a", "loss b")
    assert legend_of(ax) == ["runs", "dominated", "equal weighted loss"]
    # A line through each point: the weighted loss is the same everywhere on it.
    short = [line.get_xydata() for line in ax.get_lines() if line.get_marker() == "None"]
    for ends, (w, losses) in zip(short, ENDS.items(), strict=True):
        np.testing.assert_allclose(ends.mean(axis=0), losses)
        np.testing.assert_allclose(ends @ [w, 1 - w], np.array(losses) @ [w, 1 - w])
        assert np.abs(ends[1] - ends[0]).sum() > 0.1


def test_runs_with_the_same_weights_are_one_point():
    ax = plot.front([ended(two(0.5), [x, 4 - x]) for x in (1.0, 2.0, 3.0)])
    np.testing.assert_allclose(points_of(ax), [[2, 2]])
    (dots,) = [line for line in ax.get_lines() if line.get_marker() == "."]
    np.testing.assert_allclose(dots.get_xydata(), [[1, 3], [2, 2], [3, 1]])
    # The names of points in one place stand below each other.
    ax = plot.front([ended(two(w), [1.0, 1.0]) for w in (0.2, 0.5, 0.8)])
    assert len({text.xyann for text in ax.texts}) == 3


def test_methods_share_axes(runs):
    ax = plot.front(runs, label="one")
    again = plot.front([ended(two(0.5), [1.9, 2.1])], label="other", ax=ax)
    assert again is ax
    assert legend_of(ax) == ["one", "dominated", "equal weighted loss", "other"]
    markers = {line.get_marker() for line in ax.get_lines()} - {"None"}
    assert markers == {"o", "s"}
    # The name stands there already.
    assert sum(text.get_text() == "0.5 / 0.5" for text in ax.texts) == 1


def test_points_may_be_given(runs):
    ax = plot.front(runs, points=torch.tensor(list(ENDS.values())) / 10)
    np.testing.assert_allclose(points_of(ax), [[0.1, 0.4], [0.2, 0.2], [0.4, 0.1]])
    assert ax.get_xlabel() == "a"


def test_of_three_objectives_domination_counts_all():
    weights = [{"a": 0.2, "b": 0.3, "c": 0.5}, {"a": 0.3, "b": 0.2, "c": 0.5}]
    runs = [ended(w, losses) for w, losses in zip(weights, [[1, 1, 2], [2, 2, 1]], strict=True)]
    ax = plot.front(runs, objectives=("b", "a"))
    np.testing.assert_allclose(points_of(ax), [[1, 1], [2, 2]])
    assert (ax.get_xlabel(), ax.get_ylabel()) == ("loss b", "loss a")
    assert legend_of(ax) == ["runs"]  # a projection has no lines of equal weighted loss
    assert {text.get_text() for text in ax.texts} == {"0.2 / 0.3 / 0.5", "0.3 / 0.2 / 0.5"}


def test_what_counts_at_the_end_of_a_run():
    """The last weights, and the mean of the losses that are there."""
    early, late = (torch.tensor(w, dtype=torch.float64) for w in ([0.9, 0.1], [0.3, 0.7]))
    run = ended(two(0.5), [1.0, 2.0], steps=40)
    run = [dataclasses.replace(r, weights=late if k > 35 else early) for k, r in enumerate(run)]
    absent = torch.tensor([math.nan, 2.0], dtype=torch.float64)
    run[-1] = dataclasses.replace(run[-1], losses=absent)
    ax = plot.front([run])
    assert [text.get_text() for text in ax.texts] == ["0.3 / 0.7"]
    expected = np.mean([r.losses[0] for r in run[-4:-1]])
    np.testing.assert_allclose(points_of(ax)[0][0], expected)
    for bad in (math.inf, -math.inf):
        losses = torch.full([2], bad, dtype=torch.float64)
        run[-2 if bad > 0 else -3] = dataclasses.replace(run[-2], losses=losses)
        with pytest.raises(ValueError, match="`runs` must have finite losses"):
            plot.front([run])


# Errors

# Calls, and what their error says in one line.
REFUSED = """
plot.cosines([])
    `log` must hold at least one step; got none. Collect `report` after each step, or use a
    StepLogger.
plot.cosines([*run_of(m=2), *run_of(m=3)])
    `log` must be one run; got the losses ['loss 0', 'loss 1'] and, in step 4, ['loss 0', 'loss 1',
    'loss 2']. Draw each run separately.
plot.overview(3)
    `log` must be the path of a StepLogger's file, a result of `read_steps`, or a sequence of
    StepReports; got int.
plot.overview([0.5])
    `log` must be the path of a StepLogger's file, a result of `read_steps`, or a sequence of
    StepReports; got a sequence with float.
plot.overview(run_of()[0])
    `log` must be the path of a StepLogger's file, a result of `read_steps`, or a sequence of
    StepReports; got StepReport.
plot.cosines(run_of(m=1))
    `log` must have at least two losses for cosines; got ['loss 0']. Draw another picture.
plot.solution(run_of(method=LinearScalarization))
    `log` must have p in at least one step; got none, because the rule has no subproblem or no step
    was finite. Draw `cosines` or `conflict_rate`.
plot.clip_angle(run_of(method=MGDA))
    `log` must have a clip angle in at least one step; got none. Only CAGradClip clips. Draw
    `cosines` or `conflict_rate`.
plot.conflict_rate([report_of([[math.inf], [1.0]], [0.5, 0.5], nonfinite="skip")])
    `log` must have an update in at least one step; got NaN or Inf in all steps. Look for the cause
    in the losses.
plot.cosines(run_of(), window=0)
    `window` must be an integer of at least 1; got 0.
plot.cosines(run_of(), ax=3)
    `ax` must be axes of matplotlib; got int. Leave it out for a new figure.
plot.save("steps.jsonl", "steps.pdf")
    `picture` must be axes or a figure of matplotlib; got str. Pass the picture first, then the
    path.
plot.front("steps.jsonl")
    `runs` must be a sequence of logs, one per run; got str. Put a single log into a list.
plot.front([])
    `runs` must hold at least one log; got none. Pass one per run.
plot.front([run_of(), []])
    `runs[1]` must hold at least one step; got none. Collect `report` after each step, or use a
    StepLogger.
plot.front(run_of())
    `runs[0]` must be the path of a StepLogger's file, a result of `read_steps`, or a sequence of
    StepReports; got StepReport.
plot.front([run_of(m=2), run_of(m=3)])
    `runs` must have the same losses; got ['loss 0', 'loss 1'] and, in runs[1], ['loss 0', 'loss 1',
    'loss 2']. Draw them separately.
plot.front([run_of(m=1)])
    `runs` must have at least two losses for a trade-off; got ['loss 0'].
plot.front([ended(two(0.5), [math.nan, 2.0])])
    `runs` must have finite losses in the last tenth of their steps; got {'a': nan, 'b': 2.0} in
    runs[0]. Leave it out, or pass `points`.
plot.front([run_of()], points=[[1.0, 2.0, 3.0]])
    `points` must be finite and of shape [1, 2], one row per run and one column per loss; got [[1.0,
    2.0, 3.0]].
plot.front([run_of()], objectives=("loss 0", "loss 0"))
    `objectives` must be two of ['loss 0', 'loss 1']; got ('loss 0', 'loss 0').
"""


@pytest.mark.parametrize(("call", "message"), re.findall(r"(plot.*)\n((?: {4}.*\n)+)", REFUSED))
def test_bad_input_is_refused_in_one_line(call, message):
    message = " ".join(message.split())
    wrong_type = re.search("; got (int|str|StepReport|a sequence with float)[.]", message)
    with pytest.raises(TypeError if wrong_type else ValueError) as raised:
        eval(call)
    assert str(raised.value) == message


def test_without_matplotlib_the_remedy_is_named(monkeypatch):
    reports = run_of()
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    for draw in (*PICTURES, plot.overview, lambda log: plot.front([log])):
        with pytest.raises(ImportError, match=r'Run `pip install "raco_optim\[plot\]"`\.$'):
            draw(reports)


# Axes and files


@pytest.mark.parametrize("picture", PICTURES)
def test_own_axes_are_drawn_into_and_settings_left_alone(picture):
    before = dict(matplotlib.rcParams)
    left, right = Figure().subplots(1, 2)
    assert picture(run_of(), ax=right) is right
    assert right.lines and not left.lines
    assert dict(matplotlib.rcParams) == before
    pyplot = sys.modules.get("matplotlib.pyplot")
    assert pyplot is None or not pyplot.get_fignums()


def covered(figure):
    """Legends that lie upon axes, labels or another legend, or beyond the edge of the figure."""
    figure.draw_without_rendering()  # the canvas of a bare figure draws nothing
    legends = {ax: ax.get_legend().get_window_extent() for ax in figure.axes if ax.get_legend()}
    found = []
    for owner, box in legends.items():
        others = [
            *(("axes", ax.get_window_extent()) for ax in figure.axes),
            *(("x", ax.xaxis.get_tightbbox()) for ax in figure.axes),
            *(("y", ax.yaxis.get_tightbbox()) for ax in figure.axes),
            *(("legend", other) for ax, other in legends.items() if ax is not owner),
        ]
        found += [what for what, other in others if other.shrunk(0.98, 0.98).overlaps(box)]
        inside = figure.bbox.padded(20)  # its layout is good to a few points; `save` cuts nothing
        found += ["edge"] * (not all(inside.contains(*corner) for corner in box.corners()))
    return found


@pytest.mark.parametrize("length", [1, 30])
def test_legends_cover_no_data(length, runs):
    weights = {x * length: 1 / 3 for x in "abc"}
    figure = plot.overview(run_of(n=8, weights=weights))
    assert [len(legend_of(ax)) for ax in figure.axes if ax.get_legend()] == [3, 6, 2]
    assert covered(figure) == []
    front = plot.front(runs)
    assert len(legend_of(front)) == 3
    assert covered(front.figure) == []


def test_names_are_text_whatever_is_in_them(tmp_path):
    names = {"$x_1$": 0.5, "_hidden": 0.25, "long " * 20: 0.25}
    reports = run_of(n=3, weights=names)
    figure = plot.overview(reports)
    assert legend_of(figure.axes[1])[:3] == ["$x_1$", "_hidden", "long long long long lon…"]
    plot.save(figure, tmp_path / "names.svg")
    ax = plot.front([reports], ax=Figure().subplots())
    assert ax.get_xlabel() == "loss $x_1$"
    texts = [ax.xaxis.label, *figure.axes[1].get_legend().get_texts()]
    assert not any(text.get_parse_math() for text in texts)
    plot.save(ax, tmp_path / "front.png")
    names = {**{f"${i}": 0.2 for i in range(4)}, "_": 0.2}
    figure = plot.overview(run_of(n=3, weights=names))
    assert not any(text.get_parse_math() for text in figure.axes[0].get_yticklabels())
    plot.save(figure, tmp_path / "rows.png")


def test_pictures_are_saved_in_the_format_of_the_suffix(tmp_path):
    ax = plot.cosines(run_of())
    for name in ("a.png", "a.pdf", "a.svg", "new/a.PDF"):
        plot.save(ax, tmp_path / name)
    assert (tmp_path / "a.png").read_bytes()[1:4] == b"PNG"
    for name in ("a.pdf", "new/a.PDF"):
        data = (tmp_path / name).read_bytes()
        assert data.startswith(b"%PDF") and b"/Type3" not in data
    assert xml.etree.ElementTree.parse(tmp_path / "a.svg").getroot().tag.endswith("svg")
    plot.save(Figure().subfigures(1, 2)[0].subplots(), str(tmp_path / "sub.png"))
    names = ["a.pdf", "a.png", "a.svg", "new", "sub.png"]
    assert sorted(path.name for path in tmp_path.iterdir()) == names


def test_pictures_that_cannot_be_written_are_refused(tmp_path):
    ax = plot.cosines(run_of())
    for name in ("a.xyz", "a", ".png"):
        with pytest.raises(ValueError, match=r"^`path` must end in one of .*\.pdf.*; got '.*'\.$"):
            plot.save(ax, tmp_path / name)
    (tmp_path / "file").write_text("")
    (tmp_path / "folder.png").mkdir()
    for path, why in [
        (tmp_path / "file" / "a.png", "File exists"),
        (tmp_path / "folder.png", "Is a directory"),
        (Path("/proc/a.png"), ""),
    ]:
        with pytest.raises(OSError) as raised:
            plot.save(ax, path)
        pattern = (
            rf"`path` must be a writable file; got '{path}' \({why}.*\)\. Choose another path\."
        )
        assert re.fullmatch(pattern, str(raised.value))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "folder.png"]
