"""Papers with human highlights -> pairs of sentences with one preference per objective.

The `aclsum` package (MIT) holds 250 papers of the ACL Anthology: abstract, introduction and
conclusion, and for every sentence whether a human highlighted it as the paper's challenge, approach
or outcome. No label needs a reward model:

- ``challenge``, ``approach``, ``outcome``: the highlighted sentence is preferred;
- ``short``: the one with fewer words.
"""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from aclsum.aclsum import ASPECTS, Document

from benchmarks.demo.data import WORDS, draw_in_turns, load_papers

# Splits of aclsum; no two share a paper.
TRAIN, HELD_OUT = ("train", "val"), "test"


@dataclass(frozen=True)
class Pair:
    """Two sentences of one paper, and what each objective says of them."""

    paper: str  # its identifier in the anthology
    title: str
    chosen: str  # by a coin, not by an objective
    rejected: str
    differences: Mapping[str, float]  # by objective, the score of `chosen` minus that of `rejected`

    def sign(self, objective: str) -> int:
        """+1 if the objective prefers `chosen`, -1 if `rejected`, 0 for a tie."""
        difference = self.differences[objective]
        return (difference > 0) - (difference < 0)

    @property
    def prompt(self) -> str:
        """What a model is asked; the completion starts with a space."""
        return f'A sentence from the paper "{self.title}":'


def candidates(paper: Document) -> dict[str, dict[str, float]]:
    """The distinct sentences of a paper with their score for each objective.

    A sentence that occurs twice (in the abstract and in the conclusion, say) counts as highlighted
    if either occurrence is. Those with a number of words outside `WORDS` are left out.
    """
    found: dict[str, dict[str, float]] = {}
    for aspect in ASPECTS:
        labels = paper.get_all_highlights(aspect)
        for text, label in zip(paper.get_all_sentences(), labels, strict=True):
            scores = found.setdefault(text, dict.fromkeys(ASPECTS, 0.0))
            scores[aspect] = max(scores[aspect], float(bool(label)))
    return {
        text: {**scores, "short": -float(len(text.split()))}
        for text, scores in found.items()
        if len(text.split()) in WORDS
    }


def sample_pairs(
    papers: Iterable[Document], objectives: Sequence[str], count: int, generator: random.Random
) -> list[Pair]:
    """Draws pairs of sentences of one paper, without replacement.

    At least one objective other than ``short`` prefers one of the two (any objective, if there is
    no other). Papers take turns, so that one with many sentences weighs no more than others.
    """
    telling = [name for name in objectives if name != "short"] or list(objectives)
    queues = []
    for paper in papers:
        queue = []
        for two in itertools.combinations(candidates(paper).items(), 2):
            # In random order: were the better one always first, a constant would be an answer.
            (x, first), (y, second) = generator.sample(two, 2)
            differences = {name: first[name] - second[name] for name in objectives}
            if any(differences[name] for name in telling):
                queue.append(Pair(paper.id, paper.title, x, y, differences))
        generator.shuffle(queue)
        queues.append(queue)
    return draw_in_turns(queues, count, generator)


def held_out_pairs(objectives: Sequence[str], count: int) -> list[Pair]:
    """The held-out pairs, the same at every call."""
    return sample_pairs(load_papers(HELD_OUT), objectives, count, random.Random(0))


def scales(pairs: Sequence[Pair]) -> dict[str, float]:
    """Root mean square of each objective's score differences; 1 where all are zero.

    The order within a pair is random, so the mean difference is zero but for chance and is not
    subtracted: swapping a pair must flip its margin's sign.
    """
    return {
        name: math.sqrt(sum(pair.differences[name] ** 2 for pair in pairs) / len(pairs)) or 1.0
        for name in pairs[0].differences
    }


def human_summaries(count: int) -> list[tuple[str, str]]:
    """Prompt and human summary of held-out papers: one aspect of every paper, then the next."""
    return [
        (f'The paper "{paper.title}" in one sentence:', paper.summaries[aspect])
        for aspect in ASPECTS
        for paper in load_papers(HELD_OUT)
    ][:count]
