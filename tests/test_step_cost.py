"""The benchmark of a step: what it counts is right, its candidates do the same work, it runs."""

import copy
import json
import multiprocessing
import os
import re
import time

import pytest
import torch

pytest.importorskip("torchjd", reason="the competitor comes with the extra bench")

from benchmarks import (
    communication,
    fuzz_subproblem,
    gpu,
    harness,
    one_pass,
    solver_speed,
    step_cost,
    step_cost_figure,
    theory_figures,
)
from benchmarks.harness import Died, apart, spread
from benchmarks.step_cost_cases import (
    FLOOR,
    NAMES,
    TORCHJD,
    WEIGHTED_SUM,
    C,
    candidate,
    make,
)
from benchmarks.step_cost_measure import means
from benchmarks.step_cost_memory import measure_memory
from raco_optim import CAGrad

# Of TorchJD about attention, whose backward pass it runs under vmap.
pytestmark = pytest.mark.filterwarnings("ignore:There is a performance drop:UserWarning")

FLOAT = 4  # bytes


# -- Memory ---------------------------------------------------------------------------------------


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


def test_peak_is_that_of_the_whole_cycle_and_earlier_memory_is_not_counted():
    grads, count = {"old": torch.ones(5000)}, 0

    def step():
        nonlocal count
        count += 1
        grads["old"] = torch.ones(1000 * count)

    assert measure_memory(step, grads.clear, cycle=3) == (0, (3000 + 4000) * FLOAT)
    left = [torch.ones(1000)]
    assert measure_memory(left.clear, left.copy) == (0, 0)


# -- Candidates -----------------------------------------------------------------------------------


@pytest.fixture(params=["mlp-10M", "resnet-10M", "transformer-50M"])
def case(request):
    return step_cost.quick(step_cost.CASES[request.param])


def flat(parameters):
    found = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
    return torch.cat([g.reshape(-1) for g in found])


def test_exact_candidates_agree(case):
    model, batch = make(case, 3, seed=0)
    adamw = torch.optim.AdamW(model.parameters())
    found = {}
    for name in ("dense", "ghost", *TORCHJD):
        each = candidate(name, model, adamw)
        each.zero_grad()
        each.fill(batch)
        found[name] = flat(each.parameters)
    torch.testing.assert_close(found["ghost"], found["dense"], rtol=1e-4, atol=1e-6)
    # TorchJD doesn't clip.
    model.zero_grad()
    CAGrad(adamw, [1 / 3] * 3, c=C).backward(model(*batch)[0])
    unclipped = flat(model.parameters())
    for name in TORCHJD:
        assert float((found[name] - unclipped).norm() / unclipped.norm()) < 1e-3


@pytest.mark.parametrize("name", NAMES)
def test_candidate_moves_all_parameters_that_a_loss_reaches(case, name):
    """The floor among them: each parameter has a gradient of the last loss that reaches it."""
    model, batch = make(case, 2, seed=0)
    before = copy.deepcopy(model)
    candidate(name, model, torch.optim.AdamW(model.parameters(), lr=0.1))(batch)
    for (key, p), q in zip(model.named_parameters(), before.parameters(), strict=True):
        assert not torch.equal(p, q), key
    if name == FLOOR:
        losses = before(*batch)[0]
        for key, p in before.named_parameters():
            loss = losses[0] if key.startswith("heads.0") else losses[1]
            (expected,) = torch.autograd.grad(loss, [p], retain_graph=True)
            torch.testing.assert_close(model.get_parameter(key).grad, expected)


@pytest.mark.parametrize("name", ["mlp-10M", "resnet-10M", "transformer-50M"])
def test_trunks_have_the_size_of_their_name(name):
    model, _ = make(step_cost.CASES[name], 2, seed=0, device="meta")
    millions = sum(p.numel() for p in model.trunk.parameters()) / 1e6
    assert millions == pytest.approx(float(name.split("-")[1].removesuffix("M")), rel=0.1)


# -- Runs -----------------------------------------------------------------------------------------


def test_means_of_windows():
    assert means([1, 2, 3, 6], 1) == [1, 2, 3, 6]
    assert means([1, 2, 3, 6], 3) == [2, 11 / 3]


def test_a_process_that_dies_hangs_or_raises_is_told(monkeypatch):
    with pytest.raises(Died, match="its process ended with code 3"):
        apart(os._exit, 3, seconds=600)
    with pytest.raises(Died, match="it took longer than 0 s"):
        apart(time.sleep, 60, seconds=0.1)
    here, there = multiprocessing.Pipe(duplex=False)
    monkeypatch.setattr(os, "setsid", lambda: None)
    harness._send(there, int, ("x",))  # what the new process calls
    ok, text = here.recv()
    assert not ok
    assert "ValueError: invalid literal" in text


def test_targets_are_reached_or_missed():
    def row(case, m, over, memory):
        dense = {"over_floor": spread([over, over]), "memory_over_bound": memory}
        return {"case": case, "m": m, "candidates": {"dense": dense}}

    rows = [row("mlp-10M", 8, 1.25, 1.1), row("mlp-64", 40, 1.41, 2.0), row("mlp-64", 3, 9.0, 2.0)]
    verdicts = [(v["case"], v["what"], v["verdict"]) for v in step_cost.judge(rows)]
    assert verdicts == [
        ("mlp-10M", "time over floor", "reached"),
        ("mlp-10M", "memory over bound", "missed"),
        ("mlp-64", "time over floor", "missed"),
    ]


def test_quick_run_writes_table_json_and_picture(tmp_path, capsys):
    step_cost.main(["--quick", "--cases", "mlp-10M", "--output", str(tmp_path)])
    results = json.loads((tmp_path / "step_cost.json").read_text())
    assert (tmp_path / "step-cost.png").read_bytes().startswith(b"\x89PNG")
    assert results["environment"]["versions"].keys() >= {"torch", "torchjd"}
    assert [row["m"] for row in results["rows"]] == [2, 4]
    out = capsys.readouterr().out
    for row in results["rows"]:
        assert row["candidates"].keys() == set(NAMES)
        assert row["left_out"] == {}
        dense = row["candidates"]["dense"]["over_floor"]["median"]
        assert re.search(rf'mlp-10M, "dense", the default \|.* {dense:.2f} \|', out)
        for name, found in row["candidates"].items():
            windows = 2 if name == "gram_every" else 5
            assert found["seconds"]["n"] == found["over_floor"]["n"] == windows
            assert found["peak_gradients"] > 0
        assert row["candidates"][WEIGHTED_SUM]["over_weighted_sum"]["median"] == 1
        assert row["errors"]["ghost"]["one_minus_cos"] < 1e-9
    figure = step_cost_figure.draw_figure(tmp_path / "again.png", results)
    (legend,) = figure.legends
    assert len(legend.get_texts()) == len(NAMES)


def test_a_case_that_died_is_listed_and_the_rest_goes_on(tmp_path, monkeypatch):
    def dies(case, m, *_, **__):
        raise Died("its process ended with code -9")

    monkeypatch.setattr(step_cost, "apart", dies)
    step_cost.main(["--cases", "mlp-256", "--output", str(tmp_path)])
    results = json.loads((tmp_path / "step_cost.json").read_text())
    assert results["rows"] == []
    assert [x["m"] for x in results["left_out"]] == [2, 4, 8]
    assert "code -9" in results["left_out"][0]["why"]


def test_part_of_a_run_overwrites_no_results(capsys, monkeypatch):
    monkeypatch.setattr(step_cost, "write_json", lambda *_: pytest.fail("it was written"))
    monkeypatch.setattr(step_cost, "NAMES", ("floor",))
    step_cost.main(["--quick", "--cases", "mlp-64"])
    assert "Not written" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("program", "arguments", "message"),
    [
        (step_cost, ["--cases", "mlp-64", "rnn"], "argument --cases: invalid choice: 'rnn'"),
        (theory_figures, [], "required: folder"),
        (fuzz_subproblem, ["--only", "foo"], "`--only` must be KIND:M:SEED, .*; got 'foo'"),
        (fuzz_subproblem, ["--only", "kink:0:1"], "`--only` must be KIND:M:SEED, of the kinds"),
        (communication, ["--ranks", "2"], "unrecognized arguments: --ranks 2"),
        (solver_speed, ["--quik"], "unrecognized arguments: --quik"),
        (one_pass, ["--device", "tpu"], "argument --device: invalid choice: 'tpu'"),
        (gpu, ["--device", "cpu"], "`--output` must be named with --device cpu"),
    ],
)
def test_what_is_not_known_is_one_line_on_stderr(program, arguments, message, capsys):
    with pytest.raises(SystemExit) as stop:
        program.main(arguments)
    assert stop.value.code == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1
    assert re.search(message, err)
