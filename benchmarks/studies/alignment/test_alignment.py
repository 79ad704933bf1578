"""The study on preference pairs, in parts: each against something computed another way."""

import copy
import dataclasses
import itertools
import math
import random

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from aclsum.aclsum import Document
from peft import LoraConfig, get_peft_model

from benchmarks.demo.data import load_papers
from benchmarks.studies.alignment import log_probs, pairs, study, summary, training, trials
from benchmarks.studies.alignment.__main__ import main
from tests.tiny_language_models import tiny_model

# peft 0.21 asks transformers 5.23 by its old name.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")

OBJECTIVES = ("a", "b")
EQUAL = {"a": 0.5, "b": 0.5}


def tiny():
    return tiny_model(layers=4).eval()


def texts(count=5, seed=1):
    generator = torch.Generator().manual_seed(seed)
    lengths = [6 + 3 * n % 7 for n in range(count)]
    return [
        log_probs.Text(torch.randint(1, 20, (length,), generator=generator), start=1 + n % 4)
        for n, length in enumerate(lengths)
    ]


# Pairs


def paper():
    """A paper of which every label can be read off."""
    return Document(
        id="P1",
        title="On Cats",
        summaries=dict.fromkeys(("challenge", "approach", "outcome"), "Cats."),
        sentences={
            "abstract": ["Cats are hard to pet .", "We pet all of the cats ."],
            "introduction": ["Too short .", "Cats are hard to pet ."],
            "conclusion": ["All of the cats purr !"],
        },
        highlights={
            "challenge": {"abstract": [0, 0], "introduction": [0, 1], "conclusion": [0]},
            "approach": {"abstract": [0, 1], "introduction": [0, 0], "conclusion": [0]},
            "outcome": {"abstract": [0, 0], "introduction": [0, 0], "conclusion": [1]},
        },
    )


def test_scores_of_sentences_by_hand():
    assert pairs.candidates(paper()) == {
        # Highlighted where it occurs the second time.
        "Cats are hard to pet .": {"challenge": 1, "approach": 0, "outcome": 0, "short": -6},
        "We pet all of the cats .": {"challenge": 0, "approach": 1, "outcome": 0, "short": -7},
        "All of the cats purr !": {"challenge": 0, "approach": 0, "outcome": 1, "short": -6},
    }


@pytest.mark.parametrize("objectives", study.OBJECTIVES.values())
def test_drawn_pairs_are_distinct_in_random_order_and_labelled_by_the_humans(objectives):
    of = {paper.id: paper for paper in load_papers(*pairs.TRAIN)}
    found = pairs.sample_pairs(of.values(), objectives, 300, random.Random(0))
    assert of.keys().isdisjoint(pair.paper for pair in pairs.held_out_pairs(objectives, 20))
    assert len({frozenset((p.paper, p.chosen, p.rejected)) for p in found}) == 300
    for pair in found:
        assert any(pair.sign(name) for name in objectives if name != "short")
        lengths = [len(text.split()) for text in (pair.chosen, pair.rejected)]
        assert pair.sign("short") == (lengths[0] < lengths[1]) - (lengths[0] > lengths[1])
        for aspect in objectives[:-1]:
            known = of[pair.paper].get_all_highlighted_sentences(aspect)
            assert pair.sign(aspect) == (pair.chosen in known) - (pair.rejected in known)
    labelled = [pair.sign(objectives[0]) for pair in found if pair.sign(objectives[0])]
    assert abs(sum(labelled)) < 4 * math.sqrt(len(labelled))


def test_scales_are_root_mean_squares():
    found = [pairs.Pair("P", "T", "x", "y", d) for d in ({"a": 3.0, "b": 0}, {"a": -4.0, "b": 0})]
    assert pairs.scales(found) == {"a": math.sqrt(25 / 2), "b": 1.0}


# Log-probabilities


@torch.no_grad()
def test_completion_log_probs_against_one_text_and_one_token_at_a_time():
    model = tiny()
    sums, counts = log_probs.completion_log_probs(model, texts())
    for text, total, count in zip(texts(), sums, counts, strict=True):
        expected = 0.0
        for t in range(text.start, len(text.ids)):
            logits = model(input_ids=text.ids[None, :t]).logits[0, -1]
            expected += logits.log_softmax(0)[text.ids[t]].item()
        assert total.item() == pytest.approx(expected, abs=1e-4)
        assert count == len(text.ids) - text.start
    found = log_probs.in_batches(model, texts(), size=2)
    torch.testing.assert_close(found, (sums, counts), rtol=0, atol=1e-4)


def adapted(model, layers):
    """LoRA with random weights on both matrices, so that every gradient is there."""
    torch.manual_seed(3)
    config = LoraConfig(r=2, target_modules=trials.LINEAR, layers_to_transform=layers)
    found = get_peft_model(model, config)
    lora = [p for name, p in found.named_parameters() if "lora_" in name]
    for parameter in lora:
        torch.nn.init.normal_(parameter, std=0.2)
    return found.get_base_model(), lora


@pytest.mark.parametrize("layers", [1, 3, 4])
def test_prefix_and_suffix_equal_the_whole_model_with_gradients(layers):
    model = tiny()
    first, last = log_probs.split(copy.deepcopy(model), layers)
    with_states = log_probs.with_states(first, texts())
    assert with_states[0].states.shape == (len(with_states[0]), 16)

    whole, of_whole = adapted(model, list(range(4 - layers, 4)))
    suffix, of_suffix = adapted(last, list(range(layers)))
    expected, _ = log_probs.completion_log_probs(whole, texts())
    found, _ = log_probs.completion_log_probs(suffix, with_states)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)

    direction = torch.tensor([1.0, -2.0, 0.5, 3.0, -1.0])
    mine = torch.autograd.grad(expected @ direction, of_whole)
    theirs = torch.autograd.grad(found @ direction, of_suffix)
    assert len(mine) == 2 * 7 * layers
    torch.testing.assert_close(theirs, mine, rtol=1e-4, atol=1e-5)


# One run


def encoded(model, count, seed):
    generator = torch.Generator().manual_seed(seed)
    drawn = [
        pairs.Pair(f"paper {n % 12}", "", "", "", dict(zip(OBJECTIVES, row.tolist(), strict=True)))
        for n, row in enumerate(torch.randint(-1, 2, (count, 2), generator=generator))
    ]
    scale = {"a": 0.5, "b": 2.0}
    found = texts(2 * count, seed)
    return trials.encoded_pairs(drawn, scale, lambda _: found, model), drawn


def toy_trial(objectives=OBJECTIVES, seed=0, sizes=None):
    model = tiny()
    return trials.Trial(
        objectives=tuple(objectives),
        train=encoded(model, 12, seed)[0],
        held_out=encoded(model, 20, seed + 100)[0],
        text=texts(4),
        new_policy=lambda: copy.deepcopy(model),
    )


@pytest.fixture(scope="module")
def trial():
    return toy_trial()


def recipe(method, weights=None, **others):
    c = 0.4 if method in ("raco", "cagrad") else None
    settings = {"lr": 1e-2, "batch_size": 4, "c": c} | others
    return training.Recipe(method, weights or EQUAL, **settings)


def ratios(model, of):
    sums = [log_probs.completion_log_probs(model, x)[0] for x in (of.chosen, of.rejected)]
    return sums[0] - sums[1]


def test_encoded_pairs_keep_order_signs_and_margins():
    found, drawn = encoded(tiny(), 3, 0)
    assert found.signs.tolist() == [list(pair.differences.values()) for pair in drawn]
    assert found.margins.tolist() == [[2 * a, b / 2] for a, b in found.signs.tolist()]
    with torch.no_grad():
        expected, _ = log_probs.completion_log_probs(tiny(), found.chosen)
    torch.testing.assert_close(found.reference[:, 0], expected, rtol=0, atol=1e-5)


def test_weighted_dpo_is_plain_training_on_the_weighted_loss(trial):
    policy, found = training.train(trial, recipe("linear", {"a": 0.3, "b": 0.7}))
    plain = trial.new_policy()
    optimizer = torch.optim.AdamW(plain.parameters(), lr=1e-2, weight_decay=0.0)
    for batch in trial.train.batches(4):
        delta = ratios(plain, batch) - ratios(trial.new_policy(), batch).detach()
        terms = -F.logsigmoid(0.1 * batch.signs * delta[:, None]) * batch.signs.abs()
        loss = (terms.sum(0) / batch.signs.abs().sum(0)) @ torch.tensor([0.3, 0.7])
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(plain.parameters(), 1.0)
        optimizer.step()
    assert found["steps"] == 3
    torch.testing.assert_close(policy.state_dict(), plain.state_dict(), rtol=0, atol=1e-4)


def test_losses_of_the_methods_by_formula(trial):
    held_out = trial.held_out
    policy, _ = training.train(trial, recipe("linear"))
    scored = held_out.scored(policy)
    tokens = [
        torch.tensor([len(t) - t.start for t in x]) for x in (held_out.chosen, held_out.rejected)
    ]
    delta = scored.chosen - scored.rejected - held_out.reference[:, 0] + held_out.reference[:, 1]
    means = scored.chosen / tokens[0] - scored.rejected / tokens[1]

    def loss(margin, k):
        return -F.logsigmoid(held_out.signs[:, k] * margin)[held_out.signs[:, k] != 0].mean()

    for method, margin in (("raco", 0.1 * delta), ("amopo", 2.0 * means)):
        found = training.losses(recipe(method, amopo_beta=2.0), scored, held_out)
        for k in range(2):
            torch.testing.assert_close(found[k], loss(margin, k))
    # arXiv 2310.03708: the other objective's margin, in shares of one's own weight.
    (found,) = training.losses(recipe("modpo", {"a": 0.2, "b": 0.8}), scored, held_out)
    torch.testing.assert_close(found, loss((0.1 * delta - 0.8 * held_out.margins[:, 1]) / 0.2, 0))


@pytest.mark.parametrize("method", training.TRAINED)
def test_every_method_trains_and_says_what_happened(method, trial):
    weights = {"a": 1.0, "b": 0.0} if method == "single" else EQUAL
    policy, found = training.train(trial, recipe(method, weights))
    assert (found["hurting_steps"] is None) == (method == "modpo")
    assert (found["vertex_share"] is None) == (method not in ("cagrad", "raco", "mgda"))
    if method == "mgda":
        assert found["hurting_steps"] == 0
    again, _ = training.train(trial, recipe(method, weights))
    moved = trial.new_policy().state_dict()
    for name, value in policy.state_dict().items():
        assert torch.equal(value, again.state_dict()[name])
        if "up_proj" in name:
            assert not torch.equal(value, moved[name])


@torch.no_grad()
def test_what_is_measured_by_hand(trial):
    assert training.log_ratios(trial.new_policy(), trial) == [0.0] * 20
    policy = trial.new_policy()
    for parameter in policy.parameters():
        parameter.mul_(1.1)
    found = ratios(policy, trial.held_out) - ratios(trial.new_policy(), trial.held_out)
    assert training.log_ratios(policy, trial) == pytest.approx(found.tolist(), abs=0.006)
    total = sum(log_probs.completion_log_probs(policy, [text])[0].item() for text in texts(4))
    tokens = sum(len(text) - text.start for text in texts(4))
    assert training.nats_per_token(policy, trial) == pytest.approx(-total / tokens, rel=1e-5)


# The study

PLAN = study.Plan(
    sizes=trials.Sizes(steps=3, batch_size=4, held_out=20, texts=4),
    seeds=(0, 1),
    weights={2: ((0.2, 0.8), (0.5, 0.5))},
    lr=dict.fromkeys(training.TRAINED, 1e-2),
    radii=(0.9,),
)


@pytest.fixture
def toy(monkeypatch):
    monkeypatch.setitem(study.TRIALS, "toy", toy_trial)
    monkeypatch.setitem(study.OBJECTIVES, 2, OBJECTIVES)


def told(records):
    """What does not depend on the clock."""
    return [(r["point"], r["extra"], {**r["training"], "seconds": 0}) for r in records]


def test_a_study_that_is_stopped_goes_on_to_the_same_results(toy, tmp_path, monkeypatch):
    plan = dataclasses.replace(PLAN, seeds=(0,), weights={2: ((0.2, 0.8),)}, radii=())
    whole = told(study.run("toy", 2, plan, tmp_path / "whole"))
    assert len(whole) == 10
    calls, run = itertools.count(1), study.Study.run

    def stopped(self, point):
        if next(calls) == 8:  # at the soup, whose ingredients are then trained again
            raise KeyboardInterrupt
        return run(self, point)

    with monkeypatch.context() as patch:
        patch.setattr(study.Study, "run", stopped)
        with pytest.raises(KeyboardInterrupt):
            study.run("toy", 2, plan, tmp_path / "parts")
    assert told(study.run("toy", 2, plan, tmp_path / "parts")) == whole


def test_a_soup_is_the_mean_of_the_single_objective_models(toy, trial):
    found = study.Study("toy", OBJECTIVES, PLAN).run(study.Point("soup", {"a": 0.25, "b": 0.75}, 0))
    policy = trial.new_policy()
    singles = [
        training.train(trial, recipe("single", w))[0].state_dict()
        for w in ({"a": 1.0, "b": 0.0}, {"a": 0.0, "b": 1.0})
    ]
    policy.load_state_dict({k: 0.25 * singles[0][k] + 0.75 * singles[1][k] for k in singles[0]})
    expected = training.log_ratios(policy, trial)
    assert found["extra"]["delta"] == pytest.approx(expected, abs=0.011)


@pytest.mark.parametrize("arguments", [["--output", "/dev/null/x"], ["--size", "large"]])
def test_what_cannot_be_done_is_refused_in_one_line(arguments, capsys):
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    assert stop.value.code == 2
    [line] = capsys.readouterr().err.splitlines()
    assert arguments[0] in line and arguments[1] in line


# The summary

WEIGHTS = ((0.25, 0.75), (0.5, 0.5))


def held_out():
    """60 pairs of 12 papers; the objectives disagree about a third of them."""
    differences = [(1.0, 1.0), (1.0, -1.0), (-1.0, 0.0), (-1.0, -1.0), (-1.0, 1.0), (0.0, 1.0)]
    return [
        pairs.Pair(f"paper {i % 12}", "t", "x", "y", dict(zip(OBJECTIVES, d, strict=True)))
        for i, d in enumerate(differences * 10)
    ]


SIGNS = np.array([[pair.sign(name) for name in OBJECTIVES] for pair in held_out()])


def record(method, weights, seed, delta, c=None):
    nats = {"initial": 3.0, "raco": 3.1, "single": 3.5}.get(method, 3.2) + 0.01 * seed
    named = dict(zip(OBJECTIVES, weights, strict=True))
    return {
        "point": {"method": method, "weights": named, "seed": seed, "c": c},
        "settings": {"size": "toy", "objectives": list(OBJECTIVES), "beta": 0.1},
        "training": {"hurting_steps": 0.25, "conflicting_steps": 0.5, "vertex_share": None},
        "extra": {"delta": delta.tolist(), "nats_per_token": nats, "commit": "abc"},
        "environment": {},
    }


def delta_of(method, seed):
    """CAGrad-Clip is right wherever the objectives agree, the others hardly more than chance."""
    skill = {"raco": 6.0, "initial": 0.0}.get(method, 0.3)
    noise = np.random.default_rng(seed).normal(size=60)
    return skill * SIGNS.sum(1) + (method != "initial") * noise


@pytest.fixture(scope="module")
def records():
    points = {"single": ((1.0, 0.0), (0.0, 1.0)), "mgda": WEIGHTS[1:], "initial": WEIGHTS[1:]}
    found = []
    for seed, method in itertools.product((0, 1, 2), summary.TITLES):
        radii = (0.4, 0.9) if method in ("raco", "cagrad") else (None,)
        for w, c in itertools.product(points.get(method, WEIGHTS), radii):
            if w == WEIGHTS[1] or c != 0.9:
                found.append(record(method, w, seed, delta_of(method, seed), c))
    return found


@pytest.fixture(scope="module")
def results(records):
    return summary.Results(records, held_out(), replicates=100)


def test_costs_are_those_of_the_records(records, results):
    for i, key in enumerate(results.keys):
        mine = [r["extra"]["delta"] for r in records if summary._key(r) == key]
        for k in range(2):
            margins = [0.1 * (SIGNS[:, k] * delta)[SIGNS[:, k] != 0] for delta in mine]
            losses = np.mean([np.log1p(np.exp(-x)).mean() for x in margins])
            wrong = np.mean([((1 - np.sign(x)) / 2).mean() for x in margins])
            assert results.means["loss"][i, 0, k] == pytest.approx(losses)
            assert results.means["accuracy"][i, 0, k] == pytest.approx(wrong)


def test_intervals_are_as_wide_as_papers_and_seeds_vary():
    """Papers that are all right or all wrong: the bootstrap's variance is p (1 - p) / papers."""
    both = dict.fromkeys(OBJECTIVES, 1.0)
    drawn = [pairs.Pair(f"{i % 50}", "t", "x", "y", both) for i in range(200)]
    delta = np.array([1.0 if i % 50 < 35 else -1.0 for i in range(200)])
    records = [record("linear", (0.5, 0.5), seed, delta) for seed in range(3)]
    errors = summary.Results(records, drawn, replicates=4000).means["accuracy"][0, :, 0]
    assert errors[0] == pytest.approx(0.3)
    assert errors[1:].std() == pytest.approx(math.sqrt(0.7 * 0.3 / 50), rel=0.05)


def test_measures_by_hand(results, monkeypatch):
    i, j = (results.row("soup", w) for w in WEIGHTS)
    raco = results.row("raco", WEIGHTS[0])
    errors = np.ones_like(results.costs["accuracy"])
    errors[i], errors[j], errors[raco] = (0.5, 0.25), (0.25, 0.5), (0.3, 0.4)
    means = errors.mean(1)
    monkeypatch.setitem(results.costs, "accuracy", errors)
    monkeypatch.setitem(results.means, "accuracy", means)
    monkeypatch.setitem(results.distances, "accuracy", results._distances(means))
    found = {name: x[0] for name, x in results.measures("soup").items()}
    assert found["hypervolume accuracy"] == pytest.approx(0.5 * 0.75 + 0.25 * 0.5)
    assert found["distance accuracy"] == 0
    assert found["weighted accuracy"] == pytest.approx((0.25 * 0.5 + 0.75 * 0.75 + 0.625) / 2)
    assert found["least accuracy"] == 0.5  # at the weights that have a least one
    assert found["accuracy of a"] == pytest.approx((0.5 + 0.75) / 2)


def test_what_users_get_who_have_these_weights(results):
    assert results.keys[results.row("single", WEIGHTS[0])].weights == (0.0, 1.0)
    assert results.keys[results.row("mgda", WEIGHTS[0])].method == "mgda"
    assert results.keys[results.row("raco", WEIGHTS[1], 0.9)].c == 0.9
    assert results.tax("raco") == pytest.approx(0.1)
    assert results.tax("linear") == pytest.approx(0.2)


def test_claims_follow_the_data(records, results):
    def verdicts(found):
        return {c["claim"].split(":")[0]: c["verdict"] for c in found["claims"]}

    found = results.as_dict()
    told = verdicts(found)
    raco = "CAGrad-Clip (RACO) beats"
    for other in ("weighted DPO", "CAGrad", "MODPO"):
        assert told[f"{raco} {other} by distance accuracy"] == "reproduced"
    assert told[f"{raco} CAGrad by accuracies"] == "reproduced"
    assert told[f"{raco} single-objective DPO by nats per token"] == "reproduced"
    tie = "CAGrad beats weighted DPO by distance accuracy"
    assert told[tie] == "not reproduced: no difference that the data can tell"
    assert {c["source"] for c in found["claims"]} == {"summary", "paper, Figures 2 to 4"}

    swap = {"raco": ("linear", None), "linear": ("raco", 0.4)}
    swapped = []
    for old in records:
        method, c = swap.get(old["point"]["method"], (old["point"]["method"], old["point"]["c"]))
        if old["point"]["c"] != 0.9:
            swapped.append({**old, "point": {**old["point"], "method": method, "c": c}})
    told = verdicts(summary.Results(swapped, held_out(), 100).as_dict())
    for measure in ("distance accuracy", "accuracies", "nats per token"):
        assert told[f"{raco} weighted DPO by {measure}"] == "not reproduced: the opposite"

    two = [old for old in records if old["point"]["seed"] < 2]
    told = verdicts(summary.Results(two, held_out(), 10).as_dict())
    assert told[f"{raco} weighted DPO by nats per token"] == "too few seeds"


def test_a_study_in_progress_can_be_summarised(records):
    part = [r for r in records if (r["point"]["seed"], r["point"]["method"]) != (1, "amopo")]
    found = summary.Results(part, held_out(), 20).as_dict()
    assert found["methods"].keys() == summary.TITLES.keys() - {"amopo"}
    assert not any("AMoPO" in claim["claim"] for claim in found["claims"])


def test_table_and_picture(results, tmp_path):
    found = results.as_dict()
    shown = summary.table(found)
    assert all(f"| {title} |" in shown for title in summary.TITLES.values())
    assert [row["c"] for row in found["radii"]] == [0.4, 0.9]
    summary.draw(tmp_path / "a.png", found)
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")
