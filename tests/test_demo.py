"""What the demo reports, and the demo as a whole at a small size."""

import dataclasses
import itertools
import json
import random
from pathlib import Path

import pytest
import torch

pytest.importorskip("aclsum", reason="the demo needs Python 3.11, as aclsum does")

from benchmarks.demo import __main__ as demo
from benchmarks.demo import align, data, results
from benchmarks.demo.experiment import Corpus, Run, Settings, run_experiment

TINY = Settings(
    seeds=(0, 1),
    outcome_weights=(0.2, 0.8),
    pretraining_steps=2,
    alignment_steps=2,
    batch_size=4,
    test_pairs=12,
)


# -- results.py -----------------------------------------------------------------------------------


def _pairs(signs):
    return [data.PreferencePair("paper", "x", "y", pair) for pair in signs]


@pytest.mark.parametrize("seed", range(20))
def test_accuracy_ceiling_against_all_orderings(seed):
    generator = random.Random(seed)
    signs = [(1, 1), (1, -1), *((generator.choice((-1, 0, 1)),) * 2 for _ in range(2))]
    signs += [tuple(generator.choices((-1, 0, 1), k=2)) for _ in range(7)]
    labelled = [sum(pair[i] != 0 for pair in signs) for i in range(2)]
    best = max(
        sum(
            sum(pair[i] * order > 0 for pair, order in zip(signs, orders, strict=True))
            / labelled[i]
            for i in range(2)
        )
        for orders in itertools.product((1, -1), repeat=len(signs))
    )
    assert results.accuracy_ceiling(_pairs(signs)).accuracy_sum == pytest.approx(best, abs=1e-12)


def test_accuracy_ceiling_without_ties_is_two_minus_the_share_of_conflict():
    ceiling = results.accuracy_ceiling(_pairs([(1, 1), (1, -1), (-1, 1), (-1, -1), (1, 1)]))
    assert ceiling == (5, (5, 5), 2, 2 - 2 / 5)


def _run(method, weight, outcome, short, seed=0):
    evaluation = {
        "outcome": align.Evaluation(0.0, 0.0, outcome),
        "short": align.Evaluation(0.0, 0.0, short),
    }
    return Run(seed, method, weight, evaluation, align.Training(0.0, 0.0))


def test_hypervolume_of_accuracies_by_hand():
    runs = [_run("A", 0.2, 0.5, 0.8), _run("A", 0.8, 0.75, 0.5), _run("MGDA", None, 0.5, 0.5)]
    runs.append(_run("A", 0.2, 1.0, 1.0, seed=1))
    assert results.hypervolumes(runs) == {
        "A": [pytest.approx(0.5 * 0.8 + 0.25 * 0.5), pytest.approx(1.0)],
        "MGDA": [pytest.approx(0.25)],
    }


def test_estimate_says_nothing_of_spread_that_it_cannot_know():
    assert results.Estimate.of([0.25]).text(2) == "0.25"
    assert results.Estimate.of([0.0, 1.0]).text(3) == "0.500±0.707"


# -- the whole ------------------------------------------------------------------------------------


def test_end_to_end(tmp_path, capsys):
    demo.run(TINY, tmp_path)
    printed = capsys.readouterr()

    record = json.loads((tmp_path / "results.json").read_text())
    assert (tmp_path / "tradeoff.png").read_bytes().startswith(b"\x89PNG")
    assert len(record["runs"]) == 2 * (3 * 2 + 1)
    assert {run["method"] for run in record["runs"] if run["outcome_weight"] is None} == {"MGDA"}
    assert record["settings"]["seeds"] == [0, 1]
    assert record["environment"]["versions"]["torch"] == torch.__version__
    assert all(
        sum(score["accuracy"] for score in run["evaluation"].values())
        <= record["held_out"]["accuracy_sum"] + 1e-6
        for run in record["runs"]
    )

    rows = [line.split(" | ") for line in printed.out.splitlines()]
    row = next(row for row in rows if row[:2] == ["| CAGrad-Clip", "0.8"])
    accuracies = [
        run["evaluation"]["short"]["accuracy"]
        for run in record["runs"]
        if (run["method"], run["outcome_weight"]) == ("CAGrad-Clip", 0.8)
    ]
    assert row[7].startswith(f"{sum(accuracies) / 2:.2f}±")
    assert "of 2 seeds; 12 held-out pairs" in printed.out
    assert f"{TINY.total_steps}/{TINY.total_steps}" in printed.err, "the bar covers the whole job"


def test_runs_are_repeatable_and_one_seed_shows_no_spread():
    corpus = Corpus(TINY.test_pairs)
    settings = dataclasses.replace(TINY, seeds=(1,), outcome_weights=(0.5,))
    first, second = (list(run_experiment(settings, corpus, on_step=int)) for _ in range(2))
    assert first == second
    text = results.table(first, results.accuracy_ceiling(corpus.held_out))
    assert "±" not in text
    assert "no spread is known from 1 seed;" in text


def test_unwritable_output_is_one_line_before_any_work(tmp_path, capsys):
    blocked = tmp_path / "file"
    blocked.write_text("")
    for path in (blocked, blocked / "folder"):
        with pytest.raises(SystemExit) as stop:
            demo.main(["--output", str(path)])
        assert stop.value.code == 2
        error = capsys.readouterr().err
        assert error.startswith(f"demo: `--output` must be a folder to write to; got {path} (")
        assert error.count("\n") == 1


def test_command_line_defaults(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    asked = []
    monkeypatch.setattr(demo, "run", lambda *arguments: asked.append(arguments))
    demo.main([])
    demo.main(["--seeds", "7"])
    output = Path("build/demo")
    assert asked == [(Settings(), output), (Settings(seeds=(7,)), output)]
    assert list(output.iterdir()) == []
