"""The experiment: every method at every weight, for several seeds."""

from __future__ import annotations

import functools
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from tokenizers import Tokenizer

from benchmarks.demo.align import Evaluation, Training, align, evaluate, pair_tensors
from benchmarks.demo.data import PreferencePair, load_papers, sample_pairs, sentences
from benchmarks.demo.model import build_model, pretrain, tokenize, train_tokenizer
from raco_optim import MGDA, CAGrad, CAGradClip, LinearScalarization, MultiObjectiveOptimizer

C = 0.4  # radius of CAGrad and CAGrad-Clip

WEIGHTED_METHODS: dict[str, Callable[..., MultiObjectiveOptimizer]] = {
    "Weighted DPO": LinearScalarization,
    "CAGrad": functools.partial(CAGrad, c=C),
    "CAGrad-Clip": functools.partial(CAGradClip, c=C),
}


@dataclass(frozen=True)
class Settings:
    """Size of the experiment, for two CPU cores and less than three minutes.

    These and the learning rates were chosen by results on the validation papers. A seed has its own
    initial weights, pretraining batches and training pairs; the tokenizer and the held-out pairs
    are the same for all.
    """

    seeds: tuple[int, ...] = (0, 1, 2)
    outcome_weights: tuple[float, ...] = (0.2, 0.5, 0.8)  # ``short`` gets the rest
    pretraining_steps: int = 100  # batches of next-token prediction
    alignment_steps: int = 40  # batches of preference pairs, each pair used once
    batch_size: int = 16  # preference pairs
    test_pairs: int = 400  # held out

    @property
    def total_steps(self) -> int:
        """Optimizer steps of the whole experiment, for a progress bar."""
        runs = len(list(alignments(self.outcome_weights)))
        return len(self.seeds) * (self.pretraining_steps + runs * self.alignment_steps)


@dataclass(frozen=True)
class Run:
    """One alignment; `outcome_weight` is None for MGDA, which takes no weights."""

    seed: int
    method: str
    outcome_weight: float | None
    evaluation: dict[str, Evaluation]
    training: Training


class Corpus:
    """What all seeds share: papers, their sentences, the tokenizer, and the held-out pairs."""

    def __init__(self, test_pairs: int) -> None:
        self.train_papers = load_papers("train", "val")
        self.texts = [sentence.text for paper in self.train_papers for sentence in sentences(paper)]
        self.tokenizer: Tokenizer = train_tokenizer(self.texts)
        # Long enough for nearly all sentences of the pairs; of longer ones the beginning will do.
        self.ids = tokenize(self.tokenizer, self.texts)[:, :64]
        # Sorted by length, so that batches of them carry little padding.
        self.held_out: list[PreferencePair] = sorted(
            sample_pairs(load_papers("test"), test_pairs, random.Random(0)),
            key=lambda pair: max(len(pair.first), len(pair.second)),
        )


def run_experiment(
    settings: Settings, corpus: Corpus, on_step: Callable[[], object]
) -> Iterator[Run]:
    """Yields the runs of all seeds, as they end; calls `on_step` `settings.total_steps` times."""
    for seed in settings.seeds:
        torch.manual_seed(seed)
        base = build_model(corpus.tokenizer.get_vocab_size())
        pretrain(base, corpus.ids, steps=settings.pretraining_steps, on_step=on_step)

        count = settings.alignment_steps * settings.batch_size
        pairs = sample_pairs(corpus.train_papers, count, random.Random(seed))
        train = pair_tensors(pairs, corpus.tokenizer, base)
        test = pair_tensors(corpus.held_out, corpus.tokenizer, base)
        for method, weight, make_optimizer in alignments(settings.outcome_weights):
            model, training = align(
                base, train, make_optimizer, batch_size=settings.batch_size, on_step=on_step
            )
            yield Run(seed, method, weight, evaluate(model, test), training)


def alignments(
    outcome_weights: tuple[float, ...],
) -> Iterator[tuple[str, float | None, Callable[[torch.optim.Optimizer], MultiObjectiveOptimizer]]]:
    """Every method at every weight: name, weight of ``outcome``, wrapper of an inner optimizer."""
    for method, optimizer_class in WEIGHTED_METHODS.items():
        for weight in outcome_weights:
            weights = {"outcome": weight, "short": 1 - weight}
            yield method, weight, functools.partial(optimizer_class, weights=weights)
    # MGDA's direction does not depend on the weights: they only name the losses.
    yield "MGDA", None, functools.partial(MGDA, weights={"outcome": 0.5, "short": 0.5})
