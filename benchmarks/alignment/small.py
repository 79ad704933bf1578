"""The small size: the demo's Qwen3 of 0.16 M parameters, pretrained from scratch for each seed."""

from __future__ import annotations

import copy
import functools
from collections.abc import Sequence

import torch
from tokenizers import Tokenizer

from benchmarks.alignment import data, sampling
from benchmarks.alignment.prefix import Text
from benchmarks.alignment.sampling import FINAL, Sizes, Splits
from benchmarks.alignment.training import EncodedPairs, Trial
from benchmarks.demo.model import BOS, EOS, build_model, pretrain, tokenize, train_tokenizer


@functools.lru_cache(maxsize=1)
def _tokenizer(splits: tuple[str, ...]) -> tuple[Tokenizer, list[str]]:
    texts = list(
        dict.fromkeys(
            text for paper in data.load_papers(*splits) for text in paper.get_all_sentences()
        )
    )
    return train_tokenizer(texts), texts


def encode(tokenizer: Tokenizer, prompt: str, completion: str, *, end: bool) -> Text:
    """A text that starts with `BOS` and ends, if `end`, with `EOS`."""
    first, second = (tokenizer.encode(text).ids[1:-1] for text in (prompt, completion))
    ids = [BOS, *first, *second, *([EOS] if end else [])]
    return Text(torch.tensor(ids), start=1 + len(first))


def trial(objectives: Sequence[str], seed: int, sizes: Sizes, splits: Splits = FINAL) -> Trial:
    """Everything that runs with one seed share.

    A seed has its own initial weights, pretraining batches and training pairs. The tokenizer, the
    held-out pairs, texts and questions are the same for all. The model never saw a prompt, so
    neither pairs nor texts have one.

    Args:
        objectives: Some of `data.OBJECTIVES`.
        seed: The seed.
        sizes: How much of everything.
        splits: The papers; the tokenizer and the pretraining use those that are trained on.
    """
    tokenizer, sentences = _tokenizer(splits.train)
    torch.manual_seed(seed)
    base = build_model(tokenizer.get_vocab_size())
    ids = tokenize(tokenizer, sentences)[:, :64]
    pretrain(base, ids, steps=sizes.pretraining_steps, on_step=lambda: None)
    base.eval()

    train, held_out, scale = sampling.draw_pairs(objectives, seed, sizes, splits)
    encoded = []
    for pairs in (train, held_out):
        both = [text for pair in pairs for text in (pair.chosen, pair.rejected)]
        texts = [encode(tokenizer, "", text, end=True) for text in both]
        encoded.append(EncodedPairs.of(pairs, texts, scale).with_reference(base))
    return Trial(
        objectives=tuple(objectives),
        train=encoded[0],
        held_out=encoded[1],
        curve=encoded[1].select(range(sizes.curve)),
        text=[
            encode(tokenizer, "", text, end=False) for _, text in sampling.summaries(sizes, splits)
        ],
        questions=[
            encode(tokenizer, f"{before} ", option, end=False)
            for before, options in sampling.questions(sizes, splits)
            for option in options
        ],
        new_policy=lambda: copy.deepcopy(base),
    )
