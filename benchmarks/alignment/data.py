"""Papers with human highlights -> pairs of sentences with one preference per objective.

The `aclsum` package (MIT) holds 250 papers of the ACL Anthology: abstract, introduction and
conclusion, for every sentence whether a human highlighted it as the paper's challenge, approach or
outcome, and a human summary of each of the three. No label needs a reward model:

- ``challenge``, ``approach``, ``outcome``: the highlighted sentence is preferred;
- ``short``: the one with fewer words;
- ``coverage``: the one that holds more of the words of the human summaries (recall);
- ``faithful``: the one of whose word pairs more are found in the paper.

The last two are weaker: they count words and don't read. Every sentence of a paper is faithful to
it, so where one of these two is asked for, the human summaries become candidates as well. A summary
is not highlighted or not: the first three don't label its pairs. Nor is it scored by itself:
its coverage is measured against the summaries of the other two aspects.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import random
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from aclsum.aclsum import ASPECTS, Document

from benchmarks.demo.data import WORDS, draw_in_turns, load_papers

COUNTED = ("coverage", "faithful")
OBJECTIVES = (*ASPECTS, "short", *COUNTED)
SPLITS = ("train", "val", "test")


@dataclass(frozen=True)
class Candidate:
    """A text about a paper, and what each objective thinks of it.

    Attributes:
        text: The text.
        scores: For each objective a score, the higher the better; None where there is no label.
    """

    text: str
    scores: Mapping[str, float | None]


@dataclass(frozen=True)
class Pair:
    """Two texts about one paper, and what each objective says of them.

    Attributes:
        paper: Anthology identifier of the paper.
        title: Its title.
        chosen: Text of one candidate; chosen by a coin, not by an objective.
        rejected: Text of the other.
        differences: For each objective the score of `chosen` minus that of `rejected`; None where
            either has no label.
    """

    paper: str
    title: str
    chosen: str
    rejected: str
    differences: Mapping[str, float | None]

    def sign(self, objective: str) -> int | None:
        """+1 if the objective prefers `chosen`, -1 if `rejected`, 0 for a tie, None: no label."""
        difference = self.differences[objective]
        return None if difference is None else (difference > 0) - (difference < 0)

    def margin(self, objective: str, scale: Mapping[str, float]) -> float | None:
        """The difference of the scores over the objective's scale; None: no label."""
        difference = self.differences[objective]
        return None if difference is None else difference / scale[objective]

    @property
    def prompt(self) -> str:
        """What a model is asked; the completion starts with a space."""
        return f'A sentence from the paper "{self.title}":'


def words(text: str) -> list[str]:
    """Words of a text in lower case, without punctuation."""
    return re.findall(r"\w+", text.lower())


def bigrams(text: str) -> set[tuple[str, str]]:
    """Pairs of consecutive words."""
    return set(itertools.pairwise(words(text)))


def coverage(text: str, summaries: Iterable[str]) -> float:
    """Share of the words of the summaries that the text holds (recall of distinct unigrams)."""
    wanted = set(words(" ".join(summaries)))
    return len(wanted & set(words(text))) / len(wanted)


def faithfulness(text: str, source: set[tuple[str, str]]) -> float | None:
    """Share of the text's distinct bigrams that the source holds; None if it has no bigram."""
    own = bigrams(text)
    return len(own & source) / len(own) if own else None


def candidates(paper: Document, *, summaries: bool) -> list[Candidate]:
    """Sentences of a paper and, where asked for, its human summaries, with their scores.

    A sentence that occurs twice (in the abstract and in the conclusion, say) counts as highlighted
    if either occurrence is. Texts with a number of words outside `WORDS` are left out.
    """
    # Sentence by sentence: a bigram across two sentences is none of the paper's.
    source = set().union(*(bigrams(text) for text in paper.get_all_sentences()))
    highlights: dict[str, dict[str, bool]] = {}
    for aspect in ASPECTS:
        labels = paper.get_all_highlights(aspect)
        for text, label in zip(paper.get_all_sentences(), labels, strict=True):
            known = highlights.setdefault(text, dict.fromkeys(ASPECTS, False))
            known[aspect] |= bool(label)

    def counted(text: str, own_aspect: str | None = None) -> dict[str, float | None]:
        others = [paper.summaries[aspect] for aspect in ASPECTS if aspect != own_aspect]
        return {
            "short": -float(len(text.split())),
            "coverage": coverage(text, others),
            "faithful": faithfulness(text, source),
        }

    found = [Candidate(text, {**labels, **counted(text)}) for text, labels in highlights.items()]
    if summaries:
        for aspect, text in paper.summaries.items():
            found.append(Candidate(text, dict.fromkeys(ASPECTS) | counted(text, aspect)))
    return [candidate for candidate in found if len(candidate.text.split()) in WORDS]


def sample_pairs(
    papers: Iterable[Document],
    objectives: Sequence[str],
    count: int,
    generator: random.Random,
) -> list[Pair]:
    """Draws pairs of candidates of one paper, without replacement.

    At least one objective other than ``short`` prefers one of the two (any objective, if there is
    no other). Papers take turns, so that one with many sentences weighs no more than others.

    Args:
        papers: Papers to draw from.
        objectives: Some of `OBJECTIVES`; the pairs know these.
        count: Number of pairs.
        generator: Source of randomness.

    Returns:
        `count` pairs in random order of papers and of the two texts.

    Raises:
        ValueError: An objective is unknown, or the papers hold fewer than `count` pairs.
    """
    unknown = [name for name in objectives if name not in OBJECTIVES]
    if unknown or not objectives:
        raise ValueError(f"`objectives` must be some of {OBJECTIVES}; got {tuple(objectives)}.")
    telling = [name for name in objectives if name != "short"] or list(objectives)
    queues = []
    for paper in papers:
        texts = candidates(paper, summaries=any(name in COUNTED for name in objectives))
        queue = [
            pair
            for x, y in itertools.combinations(texts, 2)
            # In random order: were the better one always first, a constant would be an answer.
            for pair in [_pair(paper, *generator.sample((x, y), 2), objectives)]
            if any(pair.sign(name) for name in telling)
        ]
        generator.shuffle(queue)
        queues.append(queue)
    return draw_in_turns(queues, count, generator)


def _pair(paper: Document, x: Candidate, y: Candidate, objectives: Sequence[str]) -> Pair:
    def difference(name: str) -> float | None:
        scores = x.scores[name], y.scores[name]
        return None if None in scores else float(scores[0] - scores[1])

    return Pair(paper.id, paper.title, x.text, y.text, {o: difference(o) for o in objectives})


def scales(pairs: Sequence[Pair]) -> dict[str, float]:
    """Root mean square of each objective's score differences; 1 where all are zero or missing.

    The order within a pair is random, so the mean difference is zero but for chance and is not
    subtracted: swapping a pair must flip its margin's sign.
    """
    found = {}
    for name in pairs[0].differences:
        known = [d for pair in pairs if (d := pair.differences[name]) is not None]
        found[name] = math.sqrt(sum(d * d for d in known) / max(len(known), 1)) or 1.0
    return found


def rows(pairs: Iterable[Pair], scale: Mapping[str, float]) -> Iterator[dict[str, Any]]:
    """Rows for ``raco-optim align``: prompt, chosen, rejected and, per objective, sign and margin.

    ``margin_<name>``, which only MODPO reads, is the difference of the scores over `scale`, which
    comes from the training pairs: scores in units of what a pair usually differs by.
    """
    for pair in pairs:
        yield {
            "prompt": pair.prompt,
            "chosen": f" {pair.chosen}",
            "rejected": f" {pair.rejected}",
            **{f"pref_{name}": pair.sign(name) for name in scale},
            **{f"margin_{name}": pair.margin(name, scale) for name in scale},
            "paper": pair.paper,
        }


def statistics(pairs: Sequence[Pair]) -> dict[str, Any]:
    """How much is labelled, how much is in conflict, and what conflict leaves to any model.

    A model orders a pair one way or the other. With n_i pairs labelled by objective i it wins 1/n_i
    of accuracy i for each of them that it orders as i does; hence the highest sum of the accuracies
    is the sum over pairs of the larger of the two gains.

    Returns:
        ``pairs``; ``labelled`` and ``ties``, shares of all pairs; ``conflict``: for two objectives
        the share of the pairs that both label, without ties, on which they disagree;
        ``any_conflict``: share of the pairs on which some two disagree; ``accuracy_sum``.
    """
    names = list(pairs[0].differences)
    signs = [{name: pair.sign(name) for name in names} for pair in pairs]
    decided = {name: sum(bool(sign[name]) for sign in signs) for name in names}

    def share(part: int, whole: int) -> float | None:
        return round(part / whole, 4) if whole else None

    def gain(sign: Mapping[str, int | None], order: int) -> float:
        return sum(1 / decided[name] for name in names if sign[name] == order)

    conflict = {}
    for a, b in itertools.combinations(names, 2):
        both = [sign[a] * sign[b] for sign in signs if sign[a] and sign[b]]
        conflict[f"{a}/{b}"] = share(sum(product < 0 for product in both), len(both))
    return {
        "pairs": len(pairs),
        "papers": len({pair.paper for pair in pairs}),
        "labelled": {name: share(decided[name], len(pairs)) for name in names},
        "ties": {name: share(sum(sign[name] == 0 for sign in signs), len(pairs)) for name in names},
        "conflict": conflict,
        "any_conflict": share(sum({1, -1} <= set(sign.values()) for sign in signs), len(pairs)),
        "accuracy_sum": sum(max(gain(sign, 1), gain(sign, -1)) for sign in signs),
    }


def write(
    folder: Path, objectives: Sequence[str], counts: Mapping[str, int], seed: int
) -> dict[str, Any]:
    """Writes ``<split>.jsonl`` for every split in `counts`, and ``statistics.json``.

    Args:
        folder: Where to; made if missing. Files of the same name are replaced.
        objectives: Some of `OBJECTIVES`.
        counts: Number of pairs per split; ``"train"`` must be one, it gives the margins' scale.
        seed: Of the drawing.

    Returns:
        What ``statistics.json`` holds: `statistics` per split, and the scale of the margins.
    """
    drawn = {
        split: sample_pairs(load_papers(split), objectives, count, random.Random(seed))
        for split, count in counts.items()
    }
    scale = scales(drawn["train"])
    folder.mkdir(parents=True, exist_ok=True)
    for split, pairs in drawn.items():
        lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in rows(pairs, scale)]
        (folder / f"{split}.jsonl").write_text("".join(lines), encoding="utf-8")
    found = {"scale": scale} | {split: statistics(pairs) for split, pairs in drawn.items()}
    (folder / "statistics.json").write_text(json.dumps(found, indent=1) + "\n")
    return found


def main(arguments: Sequence[str] | None = None) -> None:
    """Writes preference data for ``raco-optim align`` and prints what is in it."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.alignment.data",
        description="Writes pairs of aclsum, one JSONL file a split, for raco-optim align.",
    )
    parser.add_argument("--objectives", nargs="+", default=["outcome", "short"], choices=OBJECTIVES)
    parser.add_argument("--output", type=Path, default=Path("build/alignment/data"), help="folder")
    parser.add_argument("--train", type=int, default=1000, help="pairs (default: %(default)s)")
    parser.add_argument("--val", type=int, default=400, help="pairs (default: %(default)s)")
    parser.add_argument("--test", type=int, default=400, help="pairs (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)
    counts = {split: getattr(options, split) for split in SPLITS}
    try:
        found = write(options.output, options.objectives, counts, options.seed)
    except (OSError, ValueError) as error:
        parser.exit(2, f"{parser.prog}: {error}\n")
    for split in SPLITS:
        print(f"{options.output / split}.jsonl")
        for name, value in found[split].items():
            print(f"  {name}: {value}")


if __name__ == "__main__":
    main()
