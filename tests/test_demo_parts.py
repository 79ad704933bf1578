"""The parts of the demo, each against something that was computed another way."""

import collections
import dataclasses
import json
import math
import random

import pytest
import torch
import torch.nn.functional as F

pytest.importorskip("aclsum", reason="the demo needs Python 3.11, as aclsum does")

from benchmarks.demo import align, answers, data, model, results
from benchmarks.demo.experiment import Corpus, alignments
from raco_optim import LinearScalarization
from raco_optim.cli.layouts.known import layout_of


@pytest.fixture(scope="module")
def corpus():
    return Corpus(test_pairs=12)


@pytest.fixture(scope="module")
def base(corpus):
    torch.manual_seed(0)
    return model.build_model(corpus.tokenizer.get_vocab_size())


@pytest.fixture(scope="module")
def tensors(corpus, base):
    return align.pair_tensors(corpus.held_out, corpus.tokenizer, base)


# -- data.py --------------------------------------------------------------------------------------


IMPROVES = "Combining it with a phrasebased statistical engine leads to significant improvements ."


@pytest.mark.parametrize(
    ("first", "second", "signs"),
    [  # from E09-1056, the first paper of the test split; read, and words counted, by a person
        (
            IMPROVES,
            "This work opens up several avenues .",
            (1, -1),  # 12 words that state the outcome, 7 that don't: conflict
        ),
        (
            "First , we will test our approach on terminologies from different domains , varying "
            "the size of the training material .",
            "The approach rates comparably across the 10 translation directions we considered .",
            (-1, -1),  # 21 words that don't, 12 that do: agreement
        ),
        (
            IMPROVES,
            "Analogical learning has recently regained some interest in the NLP community .",
            (1, 0),  # 12 words each
        ),
        (
            "Handling terminology is an important matter in a translation workflow .",
            "We conclude this study and discuss future work in Section 5 .",
            (0, 1),  # neither states the outcome; 11 and 12 words
        ),
    ],
)
def test_labels_of_real_pairs(first, second, signs):
    paper = data.load_papers("test")[0]
    assert paper.id == "E09-1056"
    by_text = {sentence.text: sentence for sentence in data.sentences(paper)}
    assert data.preference_signs(by_text[first], by_text[second]) == signs
    assert data.preference_signs(by_text[second], by_text[first]) == tuple(-s for s in signs)


def test_a_repeated_sentence_is_an_outcome_if_it_is_highlighted_once():
    paper = data.Document(
        id="x",
        title="",
        summaries={},
        sentences={"abstract": ["a b"], "introduction": ["c"], "conclusion": ["a b", "c"]},
        highlights={"outcome": {"abstract": [0], "introduction": [0], "conclusion": [1, 0]}},
    )
    assert data.sentences(paper) == [("a b", True), ("c", False)]


def test_no_paper_is_in_training_and_test():
    train, test = data.load_papers("train", "val"), data.load_papers("test")
    assert (len(train), len(test)) == (150, 100)
    assert not {paper.id for paper in train} & {paper.id for paper in test}
    assert not {paper.title.lower() for paper in train} & {paper.title.lower() for paper in test}


def test_pairs_are_repeatable_distinct_labelled_and_spread_over_papers():
    papers = data.load_papers("test")
    pairs = data.sample_pairs(papers, 200, random.Random(3))
    assert pairs == data.sample_pairs(papers, 200, random.Random(3))
    assert pairs != data.sample_pairs(papers, 200, random.Random(4))
    assert len({frozenset((pair.paper, pair.first, pair.second)) for pair in pairs}) == 200
    assert all(pair.signs[0] in (1, -1) for pair in pairs)
    assert {pair.signs[1] for pair in pairs} == {1, -1, 0}
    assert 80 < sum(pair.signs[0] for pair in pairs) + 200 < 320, "first and second are no label"
    assert max(collections.Counter(pair.paper for pair in pairs).values()) <= 3


def test_both_objectives_matter():
    """Without conflict there would be nothing to trade off, without agreement nothing to learn."""
    for splits in (("train", "val"), ("test",)):
        pairs = data.sample_pairs(data.load_papers(*splits), 400, random.Random(0))
        assert 0.5 < results.accuracy_ceiling(pairs).conflicting / 400 < 0.65


def test_too_many_pairs_are_refused():
    with pytest.raises(ValueError, match=r"`count` must be at most the \d+ pairs of these papers"):
        data.sample_pairs(data.load_papers("test")[:2], 10_000, random.Random(0))


# -- model.py -------------------------------------------------------------------------------------


def test_no_pair_is_cut_off(corpus):
    pairs = data.sample_pairs(corpus.train_papers, 4000, random.Random(0))
    texts = [text for pair in pairs for text in (pair.first, pair.second)]
    assert model.tokenize(corpus.tokenizer, texts).shape[1] < model.MAX_TOKENS


def test_model_has_fewer_than_a_million_parameters(base):
    assert sum(parameter.numel() for parameter in base.parameters()) < 1_000_000


def test_tokenizer_gives_back_the_text(corpus):
    text = "BLEU rises by 5.3 points ( “ naïve ” baseline ) ."
    ids = model.tokenize(corpus.tokenizer, [text, "x"])
    assert ids[:, 0].tolist() == [model.BOS, model.BOS]
    assert corpus.tokenizer.decode(ids[0].tolist()) == text
    assert ids[1, -1] == model.PAD


@torch.no_grad()
def test_log_probs_against_one_token_at_a_time(corpus, base):
    texts = ["We conclude .", "Handling terminology is an important matter ."]
    ids = model.tokenize(corpus.tokenizer, texts)
    expected = torch.zeros(2)
    for row, text in enumerate(texts):
        alone = model.tokenize(corpus.tokenizer, [text])[0].tolist()
        for t in range(1, len(alone)):
            logits = base(input_ids=torch.tensor([alone[:t]])).logits[0, -1]
            expected[row] += logits.log_softmax(0)[alone[t]]
    torch.testing.assert_close(model.token_log_probs(base, ids).sum(1), expected)


def test_pretraining_learns(corpus, base):
    ids = model.tokenize(corpus.tokenizer, corpus.texts[:64])
    fresh = model.build_model(corpus.tokenizer.get_vocab_size())
    first, last = (model.pretrain(fresh, ids, steps=n, on_step=int, lr=2e-3) for n in (4, 12))
    assert last < first < 1.05 * math.log(1024)


# -- align.py -------------------------------------------------------------------------------------

DELTA = [3.0, -20.0, 0.0, 7.0]
SIGNS = [[1, -1], [1, 0], [-1, 1], [-1, 0]]


def _deltas(language_model, pairs):
    ratios = align.log_probs(language_model, pairs.ids) - pairs.reference
    return ratios[:, 0] - ratios[:, 1]


def test_the_reference_model_is_indifferent(base, tensors):
    for evaluation in align.evaluate(base, tensors).values():
        assert evaluation.loss == pytest.approx(math.log(2))
        assert (evaluation.margin, evaluation.accuracy) == (0, 0.5)


def test_evaluation_by_hand(base, tensors, monkeypatch):
    reference = torch.tensor([[-9.0, -3.0]] * 4)
    pairs = align.PairTensors(tensors.ids[:4], torch.tensor(SIGNS), reference)
    policy = reference + torch.tensor([[delta, 0.0] for delta in DELTA])
    monkeypatch.setattr(align, "all_log_probs", lambda *_: policy)
    scores = align.evaluate(base, pairs)
    assert scores["outcome"].accuracy == 1.5 / 4  # right, wrong, undecided, wrong
    assert scores["short"].accuracy == 0.5 / 2  # wrong, undecided
    assert scores["outcome"].margin == pytest.approx(align.BETA * (3 - 20 - 7) / 4)

    def loss(*deltas):  # ties are not in the mean
        return sum(math.log(1 + math.exp(-align.BETA * delta)) for delta in deltas) / len(deltas)

    assert scores["outcome"].loss == pytest.approx(loss(3.0, -20.0, 0.0, -7.0), rel=1e-6)
    assert scores["short"].loss == pytest.approx(loss(-3.0, 0.0), rel=1e-6)


def test_batches_cover_all_pairs_and_lose_only_padding(tensors, base):
    batches = list(tensors.batches(5))
    assert [len(batch.ids) for batch in batches] == [5, 5, 2]
    assert sum((batch.ids != model.PAD).sum() for batch in batches) == (
        (tensors.ids != model.PAD).sum()
    )
    one_by_one = torch.cat([align.log_probs(base, pair.ids) for pair in tensors.batches(1)])
    torch.testing.assert_close(one_by_one, tensors.reference, rtol=1e-4, atol=1e-4)


def test_weighted_dpo_is_plain_training_on_the_weighted_loss(base, tensors):
    before = {name: value.clone() for name, value in base.state_dict().items()}
    weights = {"outcome": 0.3, "short": 0.7}
    aligned, _ = align.align(
        base, tensors, lambda inner: LinearScalarization(inner, weights), on_step=int, batch_size=6
    )

    plain = model.build_model(base.config.vocab_size)
    plain.load_state_dict(base.state_dict())
    optimizer = torch.optim.AdamW(plain.parameters(), lr=1e-3, weight_decay=0.0)
    for batch in tensors.batches(6):
        delta = _deltas(plain, batch)
        terms = -F.logsigmoid(align.BETA * batch.signs * delta[:, None]) * batch.signs.abs()
        loss = (terms.sum(0) / batch.signs.abs().sum(0)) @ torch.tensor([0.3, 0.7])
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(plain.parameters(), 1.0)
        optimizer.step()

    for name, value in plain.state_dict().items():
        torch.testing.assert_close(aligned.state_dict()[name], value, rtol=0, atol=2e-5)
        assert torch.equal(base.state_dict()[name], before[name]), "the base model is not touched"


@pytest.mark.parametrize("weight", [0.1, 0.5, 0.9])
def test_hurting_and_conflicting_steps_against_gradients_taken_apart(base, tensors, weight):
    weights = {"outcome": weight, "short": 1 - weight}
    _, training = align.align(
        base, tensors, lambda inner: LinearScalarization(inner, weights), on_step=int, batch_size=12
    )
    delta, signs = _deltas(base, tensors), tensors.signs
    losses = [
        -F.logsigmoid(align.BETA * signs[:, i] * delta)[signs[:, i] != 0].mean() for i in range(2)
    ]
    outcome, short = (
        torch.cat(
            [
                g.flatten()
                for g in torch.autograd.grad(loss, list(base.parameters()), retain_graph=True)
            ]
        ).double()
        for loss in losses
    )
    combined = weight * outcome + (1 - weight) * short
    assert training.hurting_steps == float(min(outcome @ combined, short @ combined) < 0)
    assert training.conflicting_steps == float(outcome @ short < 0)


def test_a_batch_in_which_an_objective_has_only_ties(base, tensors):
    ties = dataclasses.replace(tensors, signs=tensors.signs * torch.tensor([1, 0]))
    for method, _, make_optimizer in alignments((0.5,)):
        aligned, training = align.align(base, ties, make_optimizer, on_step=int, batch_size=12)
        loss = align.evaluate(aligned, tensors)["outcome"].loss
        # An objective without a label takes no part: all methods train on the other one.
        assert loss < math.log(2) - 1e-3, method
        assert training == align.Training(0.0, 0.0)


def test_each_method_learns_what_it_weighs(base, tensors):
    for method, weight, make_optimizer in alignments((0.1, 0.9)):
        aligned, training = align.align(base, tensors, make_optimizer, on_step=int, batch_size=12)
        scores = align.evaluate(aligned, tensors)
        if weight is None:
            assert training.hurting_steps == 0, f"{method} never hurts"
        else:
            heavy = "outcome" if weight > 0.5 else "short"
            assert scores[heavy].loss < math.log(2), (method, weight)


# -- answers.py -----------------------------------------------------------------------------------


def test_answers_have_the_layout_of_helpsteer2_and_are_paired(tmp_path, capsys):
    answers.main([str(tmp_path)])
    rows = [json.loads(line) for line in (tmp_path / "held_out.jsonl").read_text().splitlines()]
    assert layout_of(rows[0]) == "helpsteer2"
    for a, b, c in zip(rows[::3], rows[1::3], rows[2::3], strict=True):
        assert a["prompt"] == b["prompt"] == c["prompt"]
        assert {a["helpfulness"], b["helpfulness"], c["helpfulness"]} == {0, 4}
    assert all(0 <= row["verbosity"] <= 4 for row in rows)
    assert "train.jsonl: 267 records" in capsys.readouterr().out
