"""Preference data from real papers: labels by hand, drawing, the files for `raco-optim align`."""

import collections
import itertools
import json
import math
import random

import pytest

pytest.importorskip("aclsum", reason="aclsum needs Python 3.11")

from aclsum.aclsum import Document

from benchmarks.alignment import answers, data, sampling
from raco_optim.cli.layouts.known import layout_of


def _paper():
    """A paper of which every label can be read off."""
    return Document(
        id="P1",
        title="On Cats",
        summaries={
            "challenge": "Cats are hard.",
            "approach": "We pet cats.",
            "outcome": "Cats purr.",
        },
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


def _scores(text, paper=None, *, summaries=True):
    found = data.candidates(paper or _paper(), summaries=summaries)
    return next(candidate.scores for candidate in found if candidate.text == text)


def test_scores_of_a_sentence_by_hand():
    assert _scores("Cats are hard to pet .") == {
        "challenge": True,  # highlighted where it occurs the second time
        "approach": False,
        "outcome": False,
        "short": -6.0,
        "coverage": 4 / 6,  # cats, are, hard, pet of cats, are, hard, we, pet, purr
        "faithful": 1.0,
    }


def test_a_human_summary_is_scored_by_the_others_and_not_highlighted(monkeypatch):
    monkeypatch.setattr(data, "WORDS", range(1, 25))
    scores = _scores("Cats are hard.")
    assert scores["coverage"] == 1 / 4  # cats of we, pet, cats, purr: its own words don't count
    assert [scores[aspect] for aspect in data.ASPECTS] == [None, None, None]
    assert scores["short"] == -3
    assert scores["faithful"] == 1.0  # cats are, are hard
    assert _scores("We pet cats.")["faithful"] == 1 / 2  # "pet cats" is nowhere
    assert _scores("Cats purr.")["faithful"] == 1.0
    assert all(
        "." not in c.text[-1:] or " ." in c.text for c in data.candidates(_paper(), summaries=False)
    )


def test_texts_of_other_lengths_are_left_out():
    texts = [candidate.text for candidate in data.candidates(_paper(), summaries=True)]
    assert texts == ["Cats are hard to pet .", "We pet all of the cats .", "All of the cats purr !"]


def test_bigrams_do_not_cross_sentences_or_see_punctuation():
    assert data.bigrams("A cat , a dog .") == {("a", "cat"), ("cat", "a"), ("a", "dog")}
    assert data.faithfulness("One", {("a", "b")}) is None
    assert _scores("All of the cats purr !")["faithful"] == 1.0


@pytest.mark.parametrize(
    ("differences", "signs"),
    [
        ({"outcome": 1.0, "short": -3.0, "faithful": None}, (1, -1, None)),
        ({"outcome": 0.0, "short": 0.5, "faithful": -0.25}, (0, 1, -1)),
    ],
)
def test_signs_of_score_differences(differences, signs):
    pair = data.Pair("P1", "T", "x", "y", differences)
    assert tuple(pair.sign(name) for name in differences) == signs


def _all_pairs(objectives):
    papers = data.load_papers("val")
    return data.sample_pairs(papers, objectives, 300, random.Random(0))


@pytest.mark.parametrize(
    "objectives",
    [
        ("outcome", "short"),
        ("approach", "outcome", "short"),
        data.ASPECTS,
        ("coverage", "faithful"),
    ],
)
def test_drawn_pairs_are_of_one_paper_distinct_and_in_random_order(objectives):
    pairs = _all_pairs(objectives)
    papers = {paper.id: paper for paper in data.load_papers("val")}
    for pair in pairs:
        texts = {*papers[pair.paper].get_all_sentences(), *papers[pair.paper].summaries.values()}
        assert {pair.chosen, pair.rejected} <= texts
        assert any(pair.sign(name) for name in objectives if name != "short")
        assert len(pair.prompt.split()) + 2 * 24 < 100
    assert len({frozenset((pair.paper, pair.chosen, pair.rejected)) for pair in pairs}) == 300
    balance = sum(pair.sign(objectives[0]) == 1 for pair in pairs)
    labelled = sum(bool(pair.sign(objectives[0])) for pair in pairs)
    assert abs(balance - labelled / 2) < 4 * math.sqrt(labelled) / 2
    assert max(collections.Counter(pair.paper for pair in pairs).values()) <= 10


def test_labels_of_pairs_are_those_of_the_humans():
    papers = {paper.id: paper for paper in data.load_papers("val")}
    for pair in _all_pairs(("approach", "outcome", "short")):
        paper = papers[pair.paper]
        for aspect in ("approach", "outcome"):
            chosen, rejected = (
                text in paper.get_all_highlighted_sentences(aspect)
                for text in (pair.chosen, pair.rejected)
            )
            assert pair.sign(aspect) == chosen - rejected
        lengths = [len(text.split()) for text in (pair.chosen, pair.rejected)]
        assert pair.sign("short") == (lengths[0] < lengths[1]) - (lengths[0] > lengths[1])


def test_only_counted_objectives_bring_in_the_summaries():
    def from_summaries(objectives):
        papers = {paper.id: paper.summaries.values() for paper in data.load_papers("val")}
        return sum(pair.chosen in papers[pair.paper] for pair in _all_pairs(objectives))

    assert from_summaries(("outcome", "short")) == 0
    assert from_summaries(("faithful", "short", "outcome")) > 0


def test_no_paper_is_in_two_splits():
    ids = [{paper.id for paper in data.load_papers(split)} for split in data.SPLITS]
    assert [len(split) for split in ids] == [100, 50, 100]
    assert all(not a & b for a, b in itertools.combinations(ids, 2))


@pytest.mark.parametrize("objectives", [("helpful",), ()])
def test_unknown_objectives_are_refused(objectives):
    with pytest.raises(ValueError, match=r"`objectives` must be some of .*; got"):
        data.sample_pairs([], objectives, 1, random.Random(0))


def test_too_many_pairs_are_refused():
    papers = data.load_papers("val")[:2]
    with pytest.raises(ValueError, match=r"`count` must be at most the \d+ pairs .*; got 100000"):
        data.sample_pairs(papers, ("outcome",), 100_000, random.Random(0))


def _pair(**differences):
    return data.Pair("P1", "T", "x", "y", differences)


def test_scales_and_margins_by_hand():
    pairs = [_pair(a=3.0, b=None), _pair(a=-4.0, b=0.0), _pair(a=0.0, b=None)]
    scale = data.scales(pairs)
    assert scale == {"a": math.sqrt(25 / 3), "b": 1.0}
    first, second, _ = data.rows(pairs, scale)
    assert first == {
        "prompt": 'A sentence from the paper "T":',
        "chosen": " x",
        "rejected": " y",
        "pref_a": 1,
        "pref_b": None,
        "margin_a": 3 / math.sqrt(25 / 3),
        "margin_b": None,
        "paper": "P1",
    }
    assert (second["pref_a"], second["pref_b"], second["margin_b"]) == (-1, 0, 0.0)


@pytest.mark.parametrize("seed", range(10))
def test_accuracy_ceiling_against_all_orderings(seed):
    generator = random.Random(seed)
    signs = [generator.choices((-1, 0, 1, None), k=3) for _ in range(7)] + [[1, 1, -1]] * 2
    pairs = [_pair(**dict(zip("abc", row, strict=True))) for row in signs]
    labelled = [sum(bool(row[i]) for row in signs) for i in range(3)]
    best = max(
        sum(
            sum((row[i] or 0) * order > 0 for row, order in zip(signs, orders, strict=True))
            / labelled[i]
            for i in range(3)
        )
        for orders in itertools.product((1, -1), repeat=len(signs))
    )
    assert data.statistics(pairs)["accuracy_sum"] == pytest.approx(best, abs=1e-12)


def test_statistics_by_hand():
    pairs = [_pair(a=1.0, b=-1.0), _pair(a=1.0, b=1.0), _pair(a=0.0, b=1.0), _pair(a=1.0, b=None)]
    found = data.statistics(pairs)
    assert found["labelled"] == {"a": 0.75, "b": 0.75}
    assert found["ties"] == {"a": 0.25, "b": 0.0}
    assert (found["conflict"], found["any_conflict"]) == ({"a/b": 0.5}, 0.25)
    assert data.statistics([_pair(a=1.0, b=0.0)])["conflict"] == {"a/b": None}


def _read(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_command_writes_what_raco_align_reads(tmp_path, capsys):
    arguments = ["--objectives", "outcome", "faithful", "--train", "30", "--val", "10"]
    data.main([*arguments, "--test", "20", "--output", str(tmp_path / "new")])
    rows = _read(tmp_path / "new" / "train.jsonl")
    assert len(rows) == 30
    assert {row["pref_outcome"] for row in rows} == {1, -1, None}
    assert all((row["pref_outcome"] is None) == (row["margin_outcome"] is None) for row in rows)
    papers = {
        split: {row["paper"] for row in _read(tmp_path / "new" / f"{split}.jsonl")}
        for split in data.SPLITS
    }
    assert not papers["train"] & papers["test"]
    found = json.loads((tmp_path / "new" / "statistics.json").read_text())
    assert (found["test"]["pairs"], set(found["scale"])) == (20, {"outcome", "faithful"})
    assert "test.jsonl\n  pairs: 20" in capsys.readouterr().out


def test_command_refuses_a_folder_that_is_a_file(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    sizes = ["--train", "4", "--val", "4", "--test", "4"]
    with pytest.raises(SystemExit) as stop:
        data.main([*sizes, "--output", str(tmp_path / "file" / "folder")])
    assert stop.value.code == 2
    assert capsys.readouterr().err.count("\n") == 1


# -- sampling.py ----------------------------------------------------------------------------------


def test_questions_have_the_next_sentence_first_and_strangers_behind():
    abstracts = [[f"{i}.{j}" for j in range(n)] for i, n in enumerate((3, 1, 2, 4))]
    found = sampling.draw_questions(abstracts, random.Random(0))
    assert [before for before, _ in found] == ["0.0", "2.0", "3.0", "0.1", "3.1", "3.2"]
    for before, options in found:
        paper, at = before.split(".")
        assert options[0] == f"{paper}.{int(at) + 1}"
        assert len(set(options)) == sampling.OPTIONS
        assert all(not x.startswith(f"{paper}.") and not x.endswith(".0") for x in options[1:])


def test_held_out_material_is_of_held_out_papers():
    sizes = sampling.Sizes(2, 3, held_out=20, curve=5, texts=120, questions=30)
    papers = {paper.id: paper for paper in data.load_papers("test")}
    train, held_out, scale = sampling.draw_pairs(("outcome", "short"), 7, sizes, sampling.FINAL)
    assert (len(train), len(held_out), set(scale)) == (6, 20, {"outcome", "short"})
    assert {pair.paper for pair in held_out} <= papers.keys()
    assert not {pair.paper for pair in train} & papers.keys()
    again = sampling.draw_pairs(("outcome", "short"), 8, sizes, sampling.FINAL)
    assert (again[1], again[0] == train) == (held_out, False)

    texts = sampling.summaries(sizes, sampling.FINAL)
    assert len(texts) == 120
    assert {text for _, text in texts} <= {
        text for paper in papers.values() for text in paper.summaries.values()
    }
    sentences = {text for paper in papers.values() for text in paper.sentences["abstract"]}
    for before, options in sampling.questions(sizes, sampling.FINAL):
        assert {before, *options} <= sentences


def test_answers_have_the_layout_of_helpsteer2_and_are_paired(tmp_path, capsys):
    answers.main([str(tmp_path)])
    rows = [json.loads(line) for line in (tmp_path / "held_out.jsonl").read_text().splitlines()]
    assert layout_of(rows[0]) == "helpsteer2"
    for a, b, c in zip(rows[::3], rows[1::3], rows[2::3], strict=True):
        assert a["prompt"] == b["prompt"] == c["prompt"]
        assert {a["helpfulness"], b["helpfulness"], c["helpfulness"]} == {0, 4}
    assert all(0 <= row["verbosity"] <= 4 for row in rows)
    assert "train.jsonl: 267 records" in capsys.readouterr().out
