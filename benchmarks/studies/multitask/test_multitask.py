"""The study on real sets: its data, its methods, its records and its measures."""

import copy
import dataclasses
import json

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits
from sklearn.metrics import r2_score, roc_auc_score
from torch.nn import functional

from benchmarks.studies.multitask import data as sets
from benchmarks.studies.multitask import summary
from benchmarks.studies.multitask.__main__ import main
from benchmarks.studies.multitask.data import SETS, Sizes, Task
from benchmarks.studies.multitask.methods import METHODS
from benchmarks.studies.multitask.study import (
    FEWER_LEARNING_RATES,
    LEARNING_RATES,
    Plan,
    Study,
    best_trial,
)
from benchmarks.studies.multitask.training import Recipe, Run, losses, score
from raco_optim.cli import UsageError

SIZES = Sizes(train=60, val=40, test=80)
PLAN = Plan(
    seeds=(0, 1),
    methods=("linear", "raco"),
    recipe=Recipe(width=4, batch_size=8, steps=4, every=2, patience=2),
    sizes=SIZES,
)


@pytest.fixture(scope="module", params=SETS)
def drawn(request):
    """One set as two seeds split it."""
    return [SETS[request.param](seed, SIZES) for seed in (0, 1)]


# Data


def test_no_source_is_in_two_splits_and_all_seeds_share_the_test(drawn):
    for data in drawn:
        train, val, test = (
            frozenset().union(*split.sources) for split in (data.train, data.val, data.test)
        )
        assert not train & val and not train & test and not val & test
    first, second = drawn
    torch.testing.assert_close(first.test.inputs, second.test.inputs, rtol=0, atol=0)
    assert first.test.sources == second.test.sources
    assert first.train.sources != second.train.sources


def test_sources_of_all_seeds_stay_out_of_the_test(drawn):
    """The tuning seed has its own training data; its tests are everybody's."""
    known = frozenset().union(*drawn[1].train.sources, *drawn[1].val.sources)
    assert not known & frozenset().union(*drawn[0].test.sources)


def test_inputs_are_finite_and_every_task_has_a_target(drawn):
    data = drawn[0]
    assert len(data.train.inputs) == SIZES.train
    for split in (data.train, data.val, data.test):
        assert split.inputs.isfinite().all()
        assert [len(target) for target in split.targets] == [len(split.inputs)] * len(data.tasks)


def test_canvas_is_two_digits_overlaid_with_an_offset():
    images, labels = load_digits(return_X_y=True)
    split = sets.digits(0, SIZES).train
    for canvas, a, b, source in zip(split.inputs, *split.targets, split.sources, strict=True):
        i, *rest = source
        j = rest[0] if rest else i
        first, second = (i, j) if labels[i] == a and labels[j] == b else (j, i)
        fits = []
        for top, bottom in ((first, second), (second, first)):
            expected = np.zeros((11, 11))
            expected[:8, :8] = images[top].reshape(8, 8) / 16
            expected[3:, 3:] = np.maximum(expected[3:, 3:], images[bottom].reshape(8, 8) / 16)
            agree = labels[top] == a and labels[bottom] == b
            fits.append(agree and np.allclose(canvas.reshape(11, 11), expected, atol=1e-6))
        assert any(fits)


def test_constant_predictions_have_the_losses_and_scores_of_constant_predictions(drawn):
    data = drawn[0]
    found = zip(
        data.tasks,
        data.train.targets,
        data.test.targets,
        sets.constant_losses(data),
        sets.constant_scores(data),
        strict=True,
    )
    for task, known, asked, loss, value in found:
        n = len(asked)
        if task.kind == "classes":
            known_shares = torch.bincount(known, minlength=10) / len(known)
            expected = functional.cross_entropy(known_shares.log().expand(n, -1), asked)
            outputs = known_shares.expand(n, -1)
        else:
            mean = known.mean()
            outputs = (mean / (1 - mean)).log().expand(n) if task.kind == "yes or no" else mean
            outputs = outputs.expand(n)
            of_kind = {
                "value": functional.mse_loss,
                "yes or no": functional.binary_cross_entropy_with_logits,
            }
            expected = of_kind[task.kind](outputs, asked)
        assert loss == pytest.approx(float(expected), rel=1e-4)
        if task.kind != "value":  # R^2 of the training mean is a little below 0
            assert value == pytest.approx(score(outputs, task, asked))


def test_scores_are_those_of_scikit_learn():
    generator = torch.Generator().manual_seed(0)
    output, target = torch.randn(2, 50, generator=generator)
    assert score(output, Task("t", "value"), target) == pytest.approx(
        r2_score(target, output), abs=1e-6
    )
    output, yes = output.round(decimals=1), (target > 0.3).float()  # with ties
    assert score(output, Task("t", "yes or no"), yes) == pytest.approx(roc_auc_score(yes, output))


# Methods


def gradients(run, batch):
    """The trunk's and the heads' gradients of each loss by plain backward passes."""
    rows = []
    for i in range(len(run.data.tasks)):
        run.model.zero_grad()
        batch()[i].backward()
        rows.append([None if p.grad is None else p.grad.clone() for p in run.model.parameters()])
    run.model.zero_grad()
    return rows


@pytest.mark.parametrize("name", METHODS)
def test_heads_get_weighted_gradients_and_the_trunk_the_rule(name):
    data, weights, method = sets.digits(0, SIZES), [0.2, 0.8], METHODS[name]
    for parameter in method.values or (None,):
        run = Run(data, method, weights, 0, 0.1, parameter, PLAN.recipe)

        def batch(run=run):
            run._batches.manual_seed(3)
            return run.batch()

        rows = gradients(run, batch)
        run._batches.manual_seed(3)
        torch.manual_seed(0)
        run.step()
        head = {id(p) for p in run.model.heads.parameters()}
        for p, *per_loss in zip(run.model.parameters(), *rows, strict=True):
            weighted = sum(w * g for w, g in zip(weights, per_loss, strict=True) if g is not None)
            if id(p) in head or name == "linear":
                torch.testing.assert_close(p.grad, weighted, rtol=1e-4, atol=1e-7)
            else:
                alpha = run.optimizer.report.coefficients
                factors = [2 * w for w in weights] if method.scales(parameter) else [1.0, 1.0]
                combined = sum(
                    float(a) * f * g for a, f, g in zip(alpha, factors, per_loss, strict=True)
                )
                torch.testing.assert_close(p.grad, combined, rtol=1e-4, atol=1e-7)


def test_nash_mtl_solves_its_equation_whatever_the_scale_of_a_loss():
    rule = METHODS["nashmtl"]
    x = torch.nn.Parameter(torch.zeros(3, dtype=torch.float64))
    J = torch.tensor([[0.1, 0.2, 0.0], [-0.5, 0.1, 0.4]], dtype=torch.float64)
    directions = []
    for factor in (1.0, 20.0):
        rows = J * torch.tensor([[1.0], [factor]], dtype=torch.float64)
        opt = rule.make(torch.optim.SGD([x], 0.1), [0.5, 0.5], [x], None)
        opt.zero_grad()
        opt.backward(list(rows @ x))
        products = opt.report.coefficients * (rows @ x.grad)
        torch.testing.assert_close(products[0], products[1], rtol=1e-3, atol=0)
        directions.append(x.grad / x.grad.norm())
    torch.testing.assert_close(directions[0], directions[1], rtol=1e-3, atol=1e-4)


def test_every_method_has_as_many_trials():
    for method in METHODS.values():
        rates = FEWER_LEARNING_RATES if method.values else LEARNING_RATES
        assert len(rates) * max(1, len(method.values)) == 8
        assert (min(rates), max(rates)) == (1e-3, 3e-2)


# Records


def told(records):
    """What does not depend on the clock."""
    return [
        (r["point"], r["evaluation"], {**r["training"], "seconds": 0}, r["extra"]["constant"])
        for r in records
    ]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    return folder, Study("digits", PLAN, folder).run()


def test_interrupted_study_goes_on_and_loses_nothing(whole, tmp_path, capsys):
    folder, records = whole
    tuning = (folder / "digits_tuning.jsonl").read_bytes()
    done = (folder / "digits.jsonl").read_bytes()
    # Killed in the tuning, and later in the middle of a line of the runs.
    (tmp_path / "digits_tuning.jsonl").write_bytes(tuning[: len(tuning) * 2 // 3])
    study = Study("digits", PLAN, tmp_path)
    study.tune()
    (tmp_path / "digits.jsonl").write_bytes(done[: len(done) // 2])
    whole_lines = done[: len(done) // 2].count(b"\n")
    resumed = study.run()
    assert told(resumed) == told(records)
    kept = (tmp_path / "digits.jsonl").read_bytes().split(b"\n")[:whole_lines]
    assert kept == done.split(b"\n")[:whole_lines]  # not run again


def test_finished_study_runs_nothing(whole, monkeypatch):
    folder, records = whole
    monkeypatch.setattr(Run, "train", lambda self: pytest.fail("a run that was done"))
    assert Study("digits", PLAN, folder).run() == records


def test_methods_added_later_leave_the_others_as_they_were(whole, tmp_path):
    folder, records = whole
    for name in ("digits.jsonl", "digits_tuning.jsonl"):
        (tmp_path / name).write_bytes((folder / name).read_bytes())
    plan = dataclasses.replace(PLAN, methods=("linear", "raco", "upgrad"))
    found = Study("digits", plan, tmp_path).run()
    assert found[: len(records)] == records
    assert {r["point"]["method"] for r in found[len(records) :]} == {"upgrad"}


def test_records_of_other_settings_are_refused(whole):
    folder, _ = whole
    before = (folder / "digits.jsonl").read_bytes()
    other = dataclasses.replace(PLAN, sizes=Sizes(train=50, val=40, test=80))
    with pytest.raises(UsageError, match="other settings"):
        Study("digits", other, folder).run()
    assert (folder / "digits.jsonl").read_bytes() == before


def refusal(arguments, capsys):
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    assert stop.value.code == 2
    [line] = capsys.readouterr().err.strip().splitlines()
    return line


def test_command_line_refuses_in_one_line(whole, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(Run, "train", lambda self: pytest.fail("a run before the refusal"))
    assert "'magic'" in refusal(["--methods", "magic"], capsys)
    assert "'mnist'" in refusal(["--sets", "mnist"], capsys)
    blocked = tmp_path / "file"
    blocked.write_text("")
    assert "`--output`" in refusal(["--output", str(blocked / "below")], capsys)
    mixed = refusal(["--sets", "digits", "--output", str(whole[0])], capsys)
    assert "other settings" in mixed and "digits.jsonl" in mixed
    for name in ("digits.jsonl", "digits_tuning.jsonl"):
        (tmp_path / name).write_text("not a record\n")
        not_one = refusal(["--sets", "digits", "--output", str(tmp_path)], capsys)
        assert "not JSON" in not_one and name in not_one
        (tmp_path / name).unlink()


def test_tuning_takes_the_lowest_sum_over_the_weights():
    def record(c, **validation):
        training = {lr: {"validation": value} for lr, value in validation.items()}
        return {"point": {"method": "raco", "c": c}, "training": training}

    records = [
        record(0.4, **{"0.1": 1.0, "0.2": 3.0}),
        record(0.4, **{"0.1": 3.0, "0.2": 0.5}),
        record(0.8, **{"0.1": 2.0, "0.2": 9.0}),
        record(0.8, **{"0.1": 2.0, "0.2": 9.0}),
    ]
    assert best_trial(records, "raco") == {"lr": 0.2, "parameter": 0.4}


# Measures


def made_up(losses_of, weights, seeds=(0, 1), constant=(2.0, 4.0)):
    """Records with given losses; the scores are 1 minus a tenth of them."""
    return [
        {
            "point": {"method": k, "weights": {"a": w[0], "b": w[1]}, "seed": s, "c": None},
            "settings": {"set": "digits"},
            "evaluation": {
                task: {"loss": x, "score": 1 - x / 10}
                for task, x in zip("ab", losses_of(k, w, s), strict=True)
            },
            "training": {"lr": 0.1, "conflicting_steps": 0.5, "steps": 10},
            "extra": {"constant": [list(constant), [0.5, 0.5]]},
        }
        for k in ("linear", "raco")
        for w in weights
        for s in seeds
    ]


def test_measures_of_a_small_case_by_hand():
    table = {
        ("linear", (0.5, 0.5)): (1.0, 1.0),
        ("linear", (0.25, 0.75)): (1.6, 0.4),
        ("raco", (0.5, 0.5)): (1.2, 1.0),
        ("raco", (0.25, 0.75)): (1.0, 2.0),
    }
    records = made_up(lambda k, w, s: table[k, w], [(0.5, 0.5), (0.25, 0.75)])
    results = summary.Results(records, replicates=20)
    measures = {name: values[:, 0].tolist() for name, values in results.measures().items()}
    # Relative losses: linear (.5, .25), (.8, .1); raco (.6, .25), (.5, .5).
    assert measures["hypervolume, loss"] == pytest.approx([0.5 * 0.75 + 0.2 * 0.15, 0.3 + 0.05])
    assert measures["distance, loss"] == pytest.approx([0.0, (0.1 + 0.25) / 2])
    # At .25/.75: 0.7 and 1.75.
    assert measures["gap"] == pytest.approx([0.0, (0.1 + 1.5) / 2])
    assert measures["least weight"] == pytest.approx([0.8, 0.5])
    assert measures["mean rank"] == pytest.approx([(1 + 1.5 + 2 + 1) / 4, (2 + 1.5 + 1 + 2) / 4])


def test_intervals_are_of_paired_seeds():
    """What all methods share cancels in the differences."""
    records = made_up(
        lambda k, w, s: (1.0 + s, 1.0 + s + 0.1 * (k == "raco")), [(0.5, 0.5), (0.2, 0.8)]
    )
    found = summary.summarise(records)
    row = found["methods"]["raco"]
    assert row["least weight"]["high"] - row["least weight"]["low"] > 0.1
    assert row["against"]["linear"]["least weight"] == pytest.approx(
        {"value": 0, "low": 0, "high": 0}
    )
    assert found["winners"]["gap"] == {"best": "linear", "not told apart": []}


def test_seeds_that_are_not_complete_are_left_out():
    records = made_up(lambda k, w, s: (1.0 + s, 1.0), [(0.5, 0.5)])
    assert summary.Results(records[:-1], replicates=2).seeds == (0,)
    with pytest.raises(UsageError, match="no seed"):
        summary.Results([records[0], records[-1]], replicates=2)


def test_a_partial_run_of_another_seed_changes_no_summary():
    records = made_up(lambda k, w, s: (1.0 + s, 1.0), [(0.5, 0.5), (0.2, 0.8)])
    more = [copy.deepcopy(records[-1])]
    more[0]["point"]["seed"] = 7
    more[0]["extra"]["constant"][1] = [0.9, 0.1]
    assert summary.summarise(records + more) == summary.summarise(records)


def test_table_of_a_study(whole):
    found = summary.summarise(whole[1])
    json.dumps(found, allow_nan=False)
    assert found["seeds"] == [0, 1] and set(found["methods"]) == {"linear", "raco"}
    assert "| CAGrad-Clip |" in summary.table(found)


def test_a_part_of_the_study_leaves_the_summary_of_the_whole(whole, tmp_path, monkeypatch):
    monkeypatch.setattr(Study, "run", lambda self: whole[1])
    monkeypatch.setattr("benchmarks.studies.multitask.__main__.RESULTS", tmp_path / "results")
    main(["--sets", "digits", "--seeds", "0", "1", "--output", str(tmp_path)])
    assert not (tmp_path / "results").exists()
    found = json.loads((tmp_path / "digits_summary.json").read_text())
    assert found["methods"]["raco"]["title"] == "CAGrad-Clip"


def test_losses_are_means_over_examples():
    outputs, targets = torch.tensor([0.0, 2.0]), torch.tensor([1.0, 0.0])
    [found] = losses([outputs], [Task("t", "value")], [targets])
    assert float(found) == pytest.approx(2.5)
