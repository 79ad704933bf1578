"""Papers with human highlights -> pairs of sentences with one preference per objective.

The `aclsum` package (MIT) holds the abstract, introduction and conclusion of 250 papers of the ACL
Anthology. For every sentence a human marked whether it states the outcome of the paper. Two
sentences of one paper make a pair with two labels, neither of which needs a reward model:

- ``outcome``: the sentence that states the outcome is preferred to the one that doesn't;
- ``short``: the sentence with fewer words is preferred.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple, TypeVar

from aclsum import ACLSum
from aclsum.aclsum import Document

Drawn = TypeVar("Drawn")

OBJECTIVES = ("outcome", "short")

# Fewer words are often a heading or a fragment that the PDF parser took for a sentence; more would
# make the batches too long for a CPU.
WORDS = range(4, 25)


class Sentence(NamedTuple):
    """A sentence and its human label."""

    text: str
    states_outcome: bool

    @property
    def words(self) -> int:
        """Length in words; the text comes tokenized, so punctuation marks count as words."""
        return len(self.text.split())


@dataclass(frozen=True)
class PreferencePair:
    """Two sentences of one paper, and what each objective says about them."""

    paper: str  # its identifier in the anthology
    first: str
    second: str
    signs: tuple[int, ...]  # by objective: +1 if it prefers `first`, -1 if `second`, 0 if neither


def load_papers(*splits: str) -> list[Document]:
    """Papers of splits of aclsum: ``"train"``, ``"val"``, ``"test"``; no two share a paper."""
    return [paper for split in splits for paper in ACLSum(split).documents]


def sentences(paper: Document) -> list[Sentence]:
    """Distinct sentences of a paper, in order.

    A sentence that occurs twice (in the abstract and in the conclusion, say) states the outcome if
    either occurrence is highlighted.
    """
    labels: dict[str, bool] = {}
    highlights = paper.get_all_highlights("outcome")
    for text, highlighted in zip(paper.get_all_sentences(), highlights, strict=True):
        labels[text] = labels.get(text, False) or bool(highlighted)
    return list(itertools.starmap(Sentence, labels.items()))


def preference_signs(first: Sentence, second: Sentence) -> tuple[int, int]:
    """Sign of each objective's preference: +1 for `first`, -1 for `second`, 0 for a tie."""
    outcome = first.states_outcome - second.states_outcome
    short = (first.words < second.words) - (first.words > second.words)
    return outcome, short


def draw_in_turns(
    queues: Sequence[list[Drawn]], count: int, generator: random.Random
) -> list[Drawn]:
    """Draws `count` items from queues, one a paper, that take turns in random order."""
    shuffled = list(queues)
    generator.shuffle(shuffled)
    turns = itertools.chain.from_iterable(itertools.zip_longest(*shuffled))
    drawn = list(itertools.islice(filter(None, turns), count))
    if len(drawn) < count:
        raise ValueError(
            f"`count` must be at most the {len(drawn)} pairs of these papers; got {count}. Ask "
            "for fewer, or name more splits."
        )
    return drawn


def sample_pairs(
    papers: Iterable[Document], count: int, generator: random.Random
) -> list[PreferencePair]:
    """Draws pairs of a sentence that states the outcome and one that doesn't, without replacement.

    Papers take turns, so that one with many sentences weighs no more than others.
    """
    queues = []
    for paper in papers:
        usable = [sentence for sentence in sentences(paper) if sentence.words in WORDS]
        outcomes = [sentence for sentence in usable if sentence.states_outcome]
        others = [sentence for sentence in usable if not sentence.states_outcome]
        queue = [(paper.id, outcome, other) for outcome in outcomes for other in others]
        generator.shuffle(queue)
        queues.append(queue)

    pairs = []
    for paper_id, *pair in draw_in_turns(queues, count, generator):
        # In random order: were the outcome always first, a constant would be the best answer.
        generator.shuffle(pair)
        first, second = pair
        pairs.append(
            PreferencePair(paper_id, first.text, second.text, preference_signs(first, second))
        )
    return pairs
