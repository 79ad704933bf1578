"""What `print` shows of an optimizer and of a report: a table that a person can read."""

import math
import re

import pytest
import torch
from torch import nn

from raco_optim import MGDA, CAGradClip, LinearScalarization, MultiObjectiveOptimizer

NAMES = ("helpful", "harmless", "brief")


def stepped(gradients, weights=None, *, method=CAGradClip, absent=(), **options):
    """An optimizer after `backward` on losses with these gradients."""
    gradients = torch.as_tensor(gradients, dtype=torch.float64)
    x = nn.Parameter(torch.ones(gradients.shape[1], dtype=torch.float64))
    if weights is None:
        weights = dict.fromkeys(map(str, range(len(gradients))), 1 / len(gradients))
    opt = method(torch.optim.SGD([x], lr=0.1), weights, **options)
    losses = {n: None if n in absent else g @ x for n, g in zip(weights, gradients, strict=True)}
    opt.backward(losses)
    return opt


def table(text):
    """The rows of a printed report, title -> cell, by the name of the loss.

    Columns end where their titles end, so that this fails where they are not aligned.
    """
    head, *lines = text.splitlines()
    titles = re.split(r"\s{2,}", head)
    ends = [head.index(title) + len(title) for title in titles[1:]]
    rows = {}
    for line in lines:
        if len(line) != len(head) or line.startswith(("  ", "...")):
            break
        starts = [line.rindex("  ", 0, end) for end in ends]
        cells = [line[start:end].strip() for start, end in zip(starts, ends, strict=True)]
        assert all(cells), line
        rows[line[: starts[0]].strip()] = dict(zip(titles[1:], cells, strict=True))
    return rows


def test_three_losses_to_the_letter():
    """(3, 0), (-4, 3), (0, 2): cosines -0.8, 0 and 0.6; c = 0 leaves alpha = w."""
    opt = stepped([[3, 0], [-4, 3], [0, 2]], dict(zip(NAMES, (0.5, 0.25, 0.25), strict=True)), c=0)
    report = str(opt.report)
    p = table(report)["harmless"]["p"]
    assert [line for line in report.splitlines() if not line.startswith(NAMES)] == [
        next(iter(report.splitlines())),
        "conflicting pairs: 1 of 3",
        "  helpful, harmless: cosine -0.8",
        "outcome: WEIGHTED_SUM, no correction (c = 0 or the correction's direction is zero): "
        "alpha = w",
        "gradients: dense; updates skipped so far: 0",
    ]
    rows = table(report)
    assert list(rows) == list(NAMES), "in the order of the weights"
    shown = [[row[x] for x in ("value", "weight", "alpha", "norm")] for row in rows.values()]
    assert shown == [
        ["3", "0.5", "0.5", "3"],
        ["-1", "0.25", "0.25", "5"],
        ["2", "0.25", "0.25", "2"],
    ]
    assert float(p) == pytest.approx(float(opt.report.p[1]), rel=1e-3)


@pytest.mark.parametrize("m", [1, 3, 200])
def test_every_number_is_that_of_its_column(m):
    torch.manual_seed(m)
    weights = torch.rand(m, dtype=torch.float64)
    weights = {f"task_{i}": x for i, x in enumerate((weights / weights.sum()).tolist())}
    opt = stepped(torch.randn(m, 30), weights)
    report, text = opt.report, str(opt.report)
    assert len(text.splitlines()) <= 30
    assert max(map(len, text.splitlines())) <= 100
    rows = table(text)
    assert len(rows) == min(m, 15)
    for name, row in rows.items():
        i = report.names.index(name)
        expected = {
            "value": report.losses[i],
            "weight": weights[name],
            "p": report.p[i],
            "clipped p": min(report.p[i], torch.tensor(weights[name])),
            "alpha": report.coefficients[i],
            "norm": report.gram[i, i].sqrt(),
        }
        assert {title: float(cell) for title, cell in row.items()} == pytest.approx(
            {title: float(x) for title, x in expected.items()}, rel=1e-3
        )
    if m == 200:
        shown = [report.names.index(name) for name in rows]
        largest = report.p.sort(descending=True).values[:15]
        assert torch.equal(report.p[shown], largest)
        assert "... and 185 more" in text
    negative = [(report.gram[i, j] < 0).item() for i in range(m) for j in range(i)]
    assert f"conflicting pairs: {sum(negative)} of {len(negative)}\n" in text
    pairs = re.findall(r"^  task_(\d+), task_(\d+): cosine (\S+)$", text, re.MULTILINE)
    assert len(pairs) == min(5, sum(negative))
    cosines = torch.corrcoef(torch.zeros(2, 2)) if m == 1 else report.cosines
    lowest = sorted(float(cosines[i, j]) for i in range(m) for j in range(i))[: len(pairs)]
    assert [float(x) for *_, x in pairs] == pytest.approx(lowest, rel=5e-3)
    for i, j, x in pairs:
        assert float(cosines[int(i), int(j)]) == pytest.approx(float(x), rel=5e-3)


def test_absent_losses_show_no_numbers():
    opt = stepped(torch.eye(3), dict.fromkeys(NAMES, 1 / 3), absent=["harmless"])
    text = str(opt.report)
    assert set(table(text)["harmless"].values()) == {"-", "0.3333"}
    assert "absent losses: 1\n" in text
    assert "conflicting pairs: 0 of 1\n" in text
    assert "-" not in table(text)["brief"].values()


@pytest.mark.parametrize(
    ("nonfinite", "outcome"), [("skip", "SKIPPED"), ("propagate", "NONFINITE")]
)
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_what_is_not_finite_stands_first_where_rows_are_cut(nonfinite, outcome, bad):
    gradients = torch.eye(40, dtype=torch.float64)
    gradients[33, 33] = bad
    opt = stepped(gradients, nonfinite=nonfinite)
    text = str(opt.report)
    rows = table(text)
    assert next(iter(rows)) == "33"
    assert rows["33"]["value"] == rows["33"]["norm"] == str(bad)
    assert "p" not in rows["33"], "there was no subproblem"
    assert f"outcome: {outcome}, " in text
    assert f"updates skipped so far: {int(nonfinite == 'skip')}" in text
    assert max(map(len, text.splitlines())) <= 100


def test_columns_that_a_rule_does_not_have_are_left_out():
    for method, p in ((LinearScalarization, []), (MGDA, ["p"])):
        rows = table(str(stepped(torch.eye(2), {"a": 0.5, "b": 0.5}, method=method).report))
        assert list(rows["a"]) == ["value", "weight", *p, "alpha", "norm"]


def test_very_small_and_large_numbers_are_aligned():
    rows = table(str(stepped([[1e-150, 0], [0, -1e150], [3, 4]]).report))
    assert rows["0"]["norm"] == "1e-150"
    assert rows["1"]["value"] == "-1e+150"


def test_long_and_odd_names():
    """Cut in the middle, as names of losses often have a beginning or an end in common."""
    names = [f"rewards/{word} of the answer to the question" for word in ("brevity", "harm")]
    names += ["", "two\nlines"]
    text = str(stepped(torch.eye(4), dict.fromkeys(names, 0.25)).report)
    assert list(table(text)) == [
        "rewards/brevi...the question",
        "rewards/harm ...the question",
        "''",
        r"'two\nlines'",
    ]


def test_optimizer_shows_settings_and_the_last_step():
    opt = CAGradClip(torch.optim.SGD([nn.Parameter(torch.ones(3))]), [1 / 3] * 3, c=0.25)
    assert str(opt) == repr(opt)
    opt = stepped(torch.eye(3), dict.fromkeys(NAMES, 1 / 3), c=0.25)
    assert str(opt) == f"{opt!r}\n{opt.report}"
    assert repr(opt).splitlines()[1] == (
        "  weights={'helpful': 0.3333, 'harmless': 0.3333, 'brief': 0.3333}, c=0.25, clip='hard',"
    )
    assert repr(opt.optimizer).splitlines()[0] in repr(opt)


@pytest.mark.parametrize("m", [1, 10, 200])
def test_optimizer_with_long_names_fits_the_screen(m):
    names = [f"rewards/{i} of the answer to the question that was asked" for i in range(m)]
    opt = stepped(torch.eye(m), dict.fromkeys(names, 1 / m))
    text = str(opt)
    assert max(map(len, text.splitlines())) <= 100
    assert len(text.splitlines()) - len(repr(opt.optimizer).splitlines()) <= 40
    assert ("... 200 in all" in text) == (m == 200)


@pytest.mark.parametrize("m", [1, 3, 200])
def test_repr_of_a_report_is_one_line(m):
    """A debugger or a failed assertion shows it; it must not print m x m numbers."""
    assert repr(stepped(torch.eye(m)).report) == f"<StepReport: m = {m}, CORRECTED>"


def test_a_rule_is_printed_whole():
    class Rule:
        def __call__(self, gram):
            return torch.ones(len(gram))

        def __repr__(self):
            return "-".join(["word"] * 40)

    sgd = torch.optim.SGD([nn.Parameter(torch.ones(1))], 0.1)
    opt = MultiObjectiveOptimizer(sgd, Rule())
    assert f"rule={Rule()!r}," in repr(opt)
    assert repr(MGDA(sgd)).startswith("MGDA(\n  SGD (\n"), "without settings, no empty line"
