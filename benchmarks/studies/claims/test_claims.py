"""The claims about clipping: descent on toys, tasks on digits, rows and their summary."""

import json
import math

import numpy as np
import pytest
import torch

from benchmarks.problems import convex_quadratics
from benchmarks.studies.claims import __main__ as claims
from benchmarks.studies.claims import digits, summary, toys
from benchmarks.studies.estimates import plain
from benchmarks.studies.multitask.data import Sizes
from benchmarks.studies.multitask.data import digits as overlaid_digits
from raco_optim import CAGradClip
from raco_optim.rules import CAGradRule


def test_descent_on_a_toy_is_that_of_the_optimizer():
    problem = convex_quadratics()
    starts, weights = toys.grid(problem.starts, [(0.3, 0.7), (0.9, 0.1)])
    found = toys.descend(problem, starts, weights, CAGradRule(0.6), steps=5, lr=0.05)
    for i in range(len(starts)):
        x = torch.nn.Parameter(starts[i].clone())
        opt = CAGradClip(torch.optim.SGD([x], 0.05), weights[i].tolist(), 0.6)
        for _ in range(5):
            opt.zero_grad()
            opt.backward(problem.losses(x))
            opt.step()
        torch.testing.assert_close(found.theta[i], x.data)
        torch.testing.assert_close(found.losses[-1, i], torch.stack(problem.losses(x.data)))


def test_steps_to_a_target_is_the_first_step_at_it():
    values = torch.tensor([[4.0, 4.0], [2.0, 3.0], [3.0, 3.0], [1.0, 3.0]])
    assert toys.steps_to(values, torch.tensor([2.0, 1.0])) == [1, None]


def test_binary_tasks_ask_for_one_digit_at_one_place():
    data = overlaid_digits(0, Sizes(train=60, val=40, test=80))
    tasks = digits.binary_tasks(data, 20)
    assert [task.outputs for task in tasks.tasks] == [1] * 20
    stacked = torch.stack(tasks.train.targets, dim=1)
    torch.testing.assert_close(stacked[:, :10].argmax(1), data.train.targets[0])
    torch.testing.assert_close(stacked[:, 10:].argmax(1), data.train.targets[1])
    assert (stacked.sum(1) == 2).all()


def test_coefficients_from_all_the_data_do_not_move():
    gram = torch.tensor([[2.0, -1.0], [-1.0, 1.0]], dtype=torch.float64)
    found = digits._moved(gram, [gram, gram], [0.3, 0.7], CAGradRule(0.4))
    assert found == pytest.approx({"variation": 0, "bias": 0, "angle": 0}, abs=1e-12)


def test_ratios_are_geometric_means_over_units():
    estimate = summary.ratio(np.log([0.5, 2.0, np.nan, 4.0]))
    assert estimate.value == pytest.approx(4 ** (1 / 3))
    assert (estimate.low, estimate.high) == pytest.approx((0.5, 4))
    assert summary.ratio(np.array([math.nan])) is None


def test_summary_of_made_up_rows_by_hand():
    runs = [("linear", 0.0, 1.0, 0.3), ("cagrad", 0.4, 0.9, 0.1), ("raco", 0.4, 1.1, 0.2)]
    rows = [
        {"seed": seed, "rule": rule, "c": c, "weighted": weighted, "losses": [least, 0.0]}
        for seed in (0, 1)
        for rule, c, weighted, least in runs
    ]
    [line] = summary.radius(rows)
    found = {name: value.value for name, value in line.items() if name != "c"}
    assert found == pytest.approx(
        {
            "CAGrad, weighted loss": -0.1,
            "CAGrad, least weight": -0.2,
            "clipped, weighted loss": 0.1,
            "clipped, least weight": -0.1,
        }
    )
    [line] = summary.objectives(
        [{**row, "on": "digits", "m": 5, "weights": "equal"} for row in rows]
    )
    assert line["clipped / CAGrad"].value == pytest.approx(1.1 / 0.9)
    assert line["never there"] == {"linear": 0, "cagrad": 0, "raco": 0}
    [line] = summary.speed(
        [
            {"problem": "p", "rule": rule, "c": c, "units": 1, "steps": steps, "clip_changed": [0]}
            for rule, c, steps in (
                ("linear", 0.0, [8, 4]),
                ("cagrad", 0.4, [4, None]),
                ("raco", 0.4, [2, 4]),
            )
        ]
    )
    assert line["clipped / CAGrad"].value == pytest.approx(0.5)
    assert line["clipped / weighted"].value == pytest.approx(0.5)  # of 1/4 and 1
    assert line["never there"] == {"linear": 0, "cagrad": 1, "raco": 0}
    text = summary.table("speed", plain([line]))
    assert "**0.50 [0.50, 0.50]**" in text and "0/1/0" in text


def test_a_part_is_run_once(tmp_path, monkeypatch):
    monkeypatch.setattr(claims, "PARTS", {"speed": lambda: iter([{"x": math.nan}])})
    path = tmp_path / "below" / "rows.json"
    found = claims.run(path, ["speed"])
    assert found["speed"] == [{"x": None}] and json.loads(path.read_text()) == found
    monkeypatch.setattr(claims, "PARTS", {"speed": lambda: pytest.fail("run again")})
    assert claims.run(path, ["speed"]) == found


@pytest.mark.parametrize("content", ['{"speed": [', "[1]", "notes"])
def test_a_damaged_file_is_refused_in_one_line(content, tmp_path, capsys):
    path = tmp_path / "rows.json"
    path.write_text(content)
    with pytest.raises(SystemExit) as stop:
        claims.main(["--output", str(path)])
    assert stop.value.code == 2
    [line] = capsys.readouterr().err.splitlines()
    assert f"`--output` must hold what this program wrote; got {path}" in line
    assert path.read_text() == content
