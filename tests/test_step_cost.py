"""The benchmark of a step: what it counts is right, its candidates do the same work, it runs."""

import copy
import json
import re

import pytest
import torch
from torch import nn

pytest.importorskip("torchjd", reason="the competitor comes with the extra bench")

from benchmarks import (
    communication,
    fuzz_subproblem,
    step_cost,
    step_cost_figure,
    step_cost_targets,
    theory_figures,
)
from benchmarks.harness import RESULTS, UsageError, spread
from benchmarks.step_cost_candidates import NAMES, TORCHJD, WEIGHTED_SUM, C, Problem
from benchmarks.step_cost_memory import measure_memory
from benchmarks.step_cost_models import make
from raco_optim import CAGrad

# Of TorchJD about attention, whose backward pass it runs under vmap.
pytestmark = pytest.mark.filterwarnings("ignore:There is a performance drop:UserWarning")

FLOAT = 4  # bytes


# -- step_cost_memory.py --------------------------------------------------------------------------


def test_peak_and_what_stays_are_counted_to_the_byte():
    kept = {}

    def step():
        kept.setdefault("buffer", torch.ones(700))
        a = torch.ones(1000)
        b = torch.ones(500)
        del a
        c = torch.ones(800)
        kept["result"] = (b, c)
        return torch.ones(100)  # freed by nobody but the caller

    held, peak = measure_memory(step, lambda: kept.pop("result", None))
    assert (held, peak) == (700 * FLOAT, 1500 * FLOAT)


def test_peak_is_that_of_the_whole_cycle():
    count = 0

    def step():
        nonlocal count
        count += 1
        torch.ones(1000 * count)

    assert measure_memory(step, lambda: None, cycle=3) == (0, 4000 * FLOAT)


def test_memory_that_was_there_before_is_not_counted():
    grads = {"old": torch.ones(5000)}

    def step():
        grads["old"] = torch.ones(300)

    assert measure_memory(step, grads.clear) == (0, 300 * FLOAT)


def test_release_of_what_an_earlier_measurement_left_is_not_counted():
    left = []
    measure_memory(lambda: left.append(torch.ones(1000)), left.copy)
    assert measure_memory(left.clear, left.copy) == (0, 0)


def test_weighted_step_of_one_matrix():
    """Inputs [B, d], weight [d, d]: at the end of the backward pass, and then in AdamW's step."""
    B, d = 2, 64
    model = nn.Linear(d, d, bias=False)
    adamw = torch.optim.AdamW(model.parameters())
    x = torch.ones(B, d)

    def step():
        adamw.zero_grad()
        torch.autograd.backward(model(x).sum())
        adamw.step()

    step()  # AdamW's state is there from here on
    held, peak = measure_memory(step, adamw.zero_grad)
    assert held == 0
    # The gradient, and two temporaries of its size in AdamW: the root and what it is divided into.
    assert 2 * d * d * FLOAT <= peak <= 3 * d * d * FLOAT + 64


# -- step_cost_candidates.py ----------------------------------------------------------------------


@pytest.fixture(params=step_cost.CASES)
def case(request):
    return step_cost.quick(step_cost.CASES[request.param])


def flat(parameters):
    found = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
    return torch.cat([g.reshape(-1) for g in found])


def test_exact_candidates_agree(case):
    model, batches = make(case, 3, seed=0)
    problem = Problem(model)
    found = {}
    for name in ("dense", "ghost", *TORCHJD):
        candidate = problem.candidate(name)
        candidate.zero_grad()
        candidate.fill(batches[0])
        found[name] = flat(problem.parameters)
    torch.testing.assert_close(found["ghost"], found["dense"], rtol=1e-4, atol=1e-6)
    # TorchJD doesn't clip.
    CAGrad(problem.adamw, [1 / 3] * 3, c=C).zero_grad()
    CAGrad(problem.adamw, [1 / 3] * 3, c=C).backward(model(*batches[0])[0])
    unclipped = flat(problem.parameters)
    for name in TORCHJD:
        assert float((found[name] - unclipped).norm() / unclipped.norm()) < 1e-3


@pytest.mark.parametrize("name", NAMES)
def test_candidate_moves_all_parameters_that_the_losses_reach(case, name):
    model, batches = make(case, 2, seed=0)
    candidate = Problem(model, learning_rate=0.1).candidate(name)
    before = copy.deepcopy(model)
    for batch in batches:
        candidate(batch)
    assert not any(p.grad.requires_grad for p in model.parameters() if p.grad is not None)
    for (key, p), q in zip(model.named_parameters(), before.parameters(), strict=True):
        if name != "floor" or not key.startswith("heads.0"):  # it steps along the last loss
            assert not torch.equal(p, q), key


def test_twin_has_its_own_hooks_and_the_same_parameters(case):
    model, _ = make(case, 2, seed=0)
    twin = model.twin()
    assert all(p is q for p, q in zip(model.parameters(), twin.parameters(), strict=True))
    assert all(a is not b for a, b in zip(model.modules(), twin.modules(), strict=True))


@pytest.mark.parametrize("name", step_cost.CASES)
def test_trunks_have_the_size_of_their_name(name):
    case = step_cost.CASES[name]
    with torch.device("meta"):
        model, _ = make(case, 2, seed=0)
    millions = sum(p.numel() for p in model.trunk.parameters()) / 1e6
    assert millions == pytest.approx(float(name.split("-")[1].removesuffix("M")), rel=0.15)


# -- step_cost.py ---------------------------------------------------------------------------------


def test_means_of_windows():
    assert step_cost.means([1, 2, 3, 6], 1) == [1, 2, 3, 6]
    assert step_cost.means([1, 2, 3, 6], 3) == [2, 11 / 3]


def _row(case, m, *, ghost, floor, memory):
    ratios = {"over_dense": spread([ghost, ghost]), "over_floor": spread([floor, floor])}
    found = {"ghost": {**ratios, "memory": {"over_weighted_sum": memory}}}
    return {"case": case, "m": m, "candidates": found}


def test_targets_are_met_or_missed():
    rows = [
        _row("mlp-10M", 8, ghost=0.5, floor=0.69, memory=2.1),
        _row("mlp-0.3M", 8, ghost=1.1, floor=1.1, memory=1.9),
    ]
    verdicts = step_cost_targets.judge(rows, ["mlp-10M"])
    assert {(v["case"], v["target"], v["met"]) for v in verdicts} == {
        ("mlp-10M", "ghost over floor, m = 8, small batch", "met"),
        ("mlp-10M", "ghost over dense", "met"),
        ("mlp-10M", "memory of ghost over weighted sum, small batch", "missed"),
        ("mlp-0.3M", "ghost over dense", "missed"),
    }


def test_quick_run_writes_table_json_and_picture(tmp_path, capsys):
    cases = ["mlp-10M", "conv-8M", "transformer-50M"]
    step_cost.main(["--quick", "--rounds", "5", "--cases", *cases, "--output", str(tmp_path)])
    results = json.loads((tmp_path / "step_cost.json").read_text())
    assert (tmp_path / "step-cost.png").read_bytes().startswith(b"\x89PNG")
    assert results["targets"] == json.loads(json.dumps(step_cost_targets.TARGETS))
    assert results["environment"]["versions"].keys() >= {"torch", "torchjd"}
    assert results["malloc"].keys() == set(step_cost.MALLOC)
    expected = [(name, m) for name in cases for m in (2, 8)]
    assert [(row["case"], row["m"]) for row in results["rows"]] == expected
    verdicts = step_cost_targets.judge(results["rows"], results["small_batch"])
    judged = {(verdict["case"], verdict["target"]) for verdict in verdicts}
    assert judged >= {(name, "ghost over dense") for name in cases}
    assert ("mlp-10M", "dense over floor, batch 64") in judged
    out = capsys.readouterr().out
    for row in results["rows"]:
        case = step_cost.CASES[row["case"]]
        assert row["candidates"].keys() == set(NAMES) - set(case.without)
        for name, found in row["candidates"].items():
            windows = 2 if name == "gram_every" else 5
            assert found["seconds"]["n"] == found["over_floor"]["n"] == windows
            assert found["memory"]["peak_bytes"] > 0
            assert found["memory"]["held_bytes"] >= 0
            assert f"| {row['case']} | {row['m']} | {name} |" in out
        assert row["candidates"][WEIGHTED_SUM]["memory"]["over_weighted_sum"] == 1
        if case.errors:
            ghost = row["errors"]["ghost"]
            assert ghost.keys() == {str(step) for step in results["steps_of_errors"]}
            assert all(e["gram_error"] < 1e-5 for e in ghost.values())
            assert all(e["gradient_error"] < 1e-4 for e in ghost.values())
            # At its first step it is exact.
            assert row["errors"]["gram_every"]["1"]["p_error"] < 1e-9


def test_the_picture_of_the_committed_results_has_every_candidate():
    results = json.loads((RESULTS / "step_cost.json").read_text())
    figure = step_cost_figure.picture(results)
    measured = {name for row in results["rows"] for name in row["candidates"]}
    (legend,) = figure.legends
    assert len(legend.get_texts()) == len(measured) == len(NAMES)
    left, right = figure.axes
    dense = [r["candidates"]["materialized"]["over_floor"] for r in results["rows"] if r["m"] == 8]
    drawn = {c.get_label(): c.lines[0].get_ydata().tolist() for c in right.containers}
    assert sorted(drawn["dense (default)"]) == sorted(ratio["median"] for ratio in dense)
    results["rows"][0]["candidates"]["nonsense"] = {}
    with pytest.raises(
        UsageError, match=r"`source` must hold candidates of .*; got \['nonsense'\]"
    ):
        step_cost_figure.picture(results)


def test_part_of_a_run_overwrites_no_results(capsys):
    before = {path: path.stat().st_mtime_ns for path in step_cost.IMAGE.parent.iterdir()}
    step_cost.main(
        [
            "--quick",
            "--rounds",
            "5",
            "--cases",
            "mlp-0.3M",
            "--candidates",
            "floor",
            "--losses",
            "2",
        ]
    )
    assert "Not written" in capsys.readouterr().out
    assert before == {path: path.stat().st_mtime_ns for path in step_cost.IMAGE.parent.iterdir()}


@pytest.mark.parametrize(
    ("program", "arguments", "message"),
    [
        (step_cost, ["--cases", "mlp-0.3M", "rnn"], "--cases must be of mlp-0.3M, .*; got rnn"),
        (step_cost, ["--candidates", "pcgrad"], "--candidates must be of floor, .*; got pcgrad"),
        (step_cost, ["--rounds", "2"], "--rounds must be at least 5"),
        (step_cost_figure, [], "required: source, target"),
        (step_cost_figure, ["nowhere.json", "a.png"], "`source` must be a JSON file; got nowhere"),
        (theory_figures, [], "required: folder"),
        (fuzz_subproblem, ["--only", "foo"], "`--only` must be KIND:M:SEED, .*; got 'foo'"),
        (fuzz_subproblem, ["--only", "kink:0:1"], "`--only` must be KIND:M:SEED, of the kinds"),
        (communication, ["--ranks", "0"], "`--ranks` must be 2 or more; got 0"),
        (communication, ["--losses", "2", "0"], "`--losses` must be 1 or more; got 0"),
    ],
)
def test_what_is_not_known_is_one_line_on_stderr(program, arguments, message, capsys):
    with pytest.raises(SystemExit) as stop:
        program.main(arguments)
    assert stop.value.code == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1
    assert re.search(message, err)
