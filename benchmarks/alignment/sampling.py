"""What a trial is made of, for every model alike: pairs, human text, multiple-choice questions."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

from benchmarks.alignment import data

# Sentences of at most this many words become questions and their options.
QUESTION_WORDS = range(4, 41)
OPTIONS = 4


@dataclass(frozen=True)
class Sizes:
    """How much of everything.

    Attributes:
        steps: Steps of alignment; every pair is used once.
        batch_size: Pairs per step.
        held_out: Held-out pairs.
        curve: How many of them are measured along the way.
        texts: Human summaries for the perplexity, at most.
        questions: Multiple-choice questions, at most.
        pretraining_steps: Batches of next-token prediction; for a model from scratch.
    """

    steps: int
    batch_size: int
    held_out: int
    curve: int
    texts: int
    questions: int
    pretraining_steps: int = 0


@dataclass(frozen=True)
class Splits:
    """Which papers are trained on and which are held out.

    Attributes:
        train: Splits of aclsum for everything that is trained.
        held_out: Split for everything that is measured.
    """

    train: tuple[str, ...] = ("train", "val")
    held_out: str = "test"


FINAL = Splits()
TUNING = Splits(("train",), "val")


def draw_pairs(
    objectives: Sequence[str], seed: int, sizes: Sizes, splits: Splits
) -> tuple[list[data.Pair], list[data.Pair], dict[str, float]]:
    """Training pairs of a seed, held-out pairs (the same for all seeds), scale of the margins."""
    count = sizes.steps * sizes.batch_size
    papers = data.load_papers(*splits.train)
    train = data.sample_pairs(papers, objectives, count, random.Random(seed))
    return train, held_out_pairs(objectives, sizes.held_out, splits), data.scales(train)


def held_out_pairs(objectives: Sequence[str], count: int, splits: Splits) -> list[data.Pair]:
    """The held-out pairs, the same at every call."""
    papers = data.load_papers(splits.held_out)
    return data.sample_pairs(papers, objectives, count, random.Random(0))


def summaries(sizes: Sizes, splits: Splits) -> list[tuple[str, str]]:
    """Prompt and human summary of held-out papers: one aspect of every paper, then the next."""
    return [
        (f'The paper "{paper.title}" in one sentence:', paper.summaries[aspect])
        for aspect in data.ASPECTS
        for paper in data.load_papers(splits.held_out)
    ][: sizes.texts]


def questions(sizes: Sizes, splits: Splits) -> list[tuple[str, list[str]]]:
    """Questions about the abstracts of held-out papers, the same at every call."""
    abstracts = [
        [text for text in paper.sentences["abstract"] if len(text.split()) in QUESTION_WORDS]
        for paper in data.load_papers(splits.held_out)
    ]
    return draw_questions(abstracts, random.Random(0))[: sizes.questions]


def draw_questions(
    abstracts: Sequence[Sequence[str]], generator: random.Random
) -> list[tuple[str, list[str]]]:
    """Questions "which sentence comes next?".

    Args:
        abstracts: Sentences of one abstract each.
        generator: Source of randomness.

    Returns:
        A sentence, and `OPTIONS` options: first the sentence that follows it, then sentences of
        other abstracts, from anywhere but their beginning. Abstracts take turns.
    """
    followers = [(i, text) for i, abstract in enumerate(abstracts) for text in abstract[1:]]
    found = []
    for at in range(max(map(len, abstracts)) - 1):
        for i, abstract in enumerate(abstracts):
            if at + 1 < len(abstract):
                others = [text for j, text in followers if j != i]
                wrong = generator.sample(others, OPTIONS - 1)
                found.append((abstract[at], [abstract[at + 1], *wrong]))
    return found
