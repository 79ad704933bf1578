"""What the runs of one seed share: a model, its encoded pairs, held-out text."""

from __future__ import annotations

import copy
import functools
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from peft import LoraConfig, get_peft_model
from tokenizers import Tokenizer
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from benchmarks import smollm2
from benchmarks.demo.data import load_papers
from benchmarks.demo.model import BOS, EOS, build_model, pretrain, tokenize, train_tokenizer
from benchmarks.studies.alignment import pairs as papers
from benchmarks.studies.alignment.log_probs import (
    Text,
    completion_log_probs,
    in_batches,
    split,
    with_states,
)
from benchmarks.studies.alignment.pairs import Pair
from raco_optim.alignment import PairLogProbs

LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
LAYERS, RANK = 4, 8  # of SmolLM2, counted from its end, that LoRA adapts

Encode = Callable[[str, str, bool], Text]  # prompt, completion, with an end token


@dataclass(frozen=True)
class Sizes:
    """How much of everything."""

    steps: int  # of alignment; every pair is used once
    batch_size: int  # pairs per step
    held_out: int  # pairs
    texts: int  # human summaries for the perplexity, at most
    pretraining_steps: int = 0  # of a model from scratch


@dataclass(frozen=True)
class EncodedPairs:
    """Preference pairs as a model reads them."""

    chosen: Sequence[Text]
    rejected: Sequence[Text]
    signs: Tensor  # preferences [n, m] in {+1, -1, 0}
    margins: Tensor  # differences of scores [n, m], for MODPO
    reference: Tensor  # log-probabilities [n, 2] of both texts under the reference model

    def __len__(self) -> int:
        return len(self.signs)

    def batches(self, size: int) -> Iterator[EncodedPairs]:
        """Consecutive batches, in order."""
        for at in range(0, len(self), size):
            parts = (x[at : at + size] for x in (self.chosen, self.rejected, self.signs))
            yield EncodedPairs(*parts, self.margins[at : at + size], self.reference[at : at + size])

    def log_probs(self, model: PreTrainedModel) -> PairLogProbs:
        """Log-probabilities under `model`, with a graph, beside those of the reference."""
        return self._joined(*completion_log_probs(model, [*self.chosen, *self.rejected]))

    def scored(self, model: PreTrainedModel) -> PairLogProbs:
        """As `log_probs`, for any number of pairs and without a graph; on the CPU."""
        return self._joined(*in_batches(model, [*self.chosen, *self.rejected]))

    def _joined(self, sums: Tensor, tokens: Tensor) -> PairLogProbs:
        reference = self.reference.to(sums.device).T
        return PairLogProbs(*sums.view(2, -1), *reference, *tokens.view(2, -1))


@dataclass(frozen=True)
class Trial:
    """What all runs of one seed share; nothing was trained on `held_out` and `text`."""

    objectives: tuple[str, ...]
    train: EncodedPairs
    held_out: EncodedPairs
    text: Sequence[Text]
    new_policy: Callable[[], PreTrainedModel]  # equal to the reference model, the same at each call
    # Whether to train under bfloat16 autocast; the reference and every evaluation are in float32.
    # Rounding then adds noise to Delta in training, 0.25 nats (root mean square) for
    # SmolLM2, where training moves it by 10.
    bf16: bool = False


def small(objectives: Sequence[str], seed: int, sizes: Sizes) -> Trial:
    """The demo's Qwen3 of 0.16 M parameters, pretrained from scratch.

    A seed has its own initial weights, pretraining batches and training pairs. The tokenizer, the
    held-out pairs and texts are the same for all. The model never saw a prompt, so there is none.
    """
    tokenizer, sentences = _tokenizer()
    torch.manual_seed(seed)
    base = build_model(tokenizer.get_vocab_size())
    ids = tokenize(tokenizer, sentences)[:, :64]
    pretrain(base, ids, steps=sizes.pretraining_steps, on_step=lambda: None)
    base.eval()

    def encode(_: str, completion: str, end: bool) -> Text:
        second = tokenizer.encode(completion).ids[1:-1]
        return Text(torch.tensor([BOS, *second, *([EOS] if end else [])]), start=1)

    return _trial(objectives, seed, sizes, encode, base)


def real(objectives: Sequence[str], seed: int, sizes: Sizes) -> Trial:
    """SmolLM2-135M with LoRA on its last layers; a seed has its own adapter and training pairs."""
    prefix, suffix, tokenizer = _smollm2()

    def encode(prompt: str, completion: str, end: bool) -> Text:
        first = tokenizer(prompt).input_ids
        second = tokenizer(f" {completion}", add_special_tokens=False).input_ids
        ids = [*first, *second, *([tokenizer.eos_token_id] if end else [])]
        return Text(torch.tensor(ids), start=len(first))

    trial = _trial(objectives, seed, sizes, encode, suffix, prefix)
    return replace(trial, new_policy=lambda: adapter(suffix, seed), bf16=True)


def adapter(suffix: PreTrainedModel, seed: int) -> PreTrainedModel:
    """A copy of the suffix with a new LoRA adapter, which changes nothing yet."""
    torch.manual_seed(seed)
    config = LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules=LINEAR)
    return get_peft_model(copy.deepcopy(suffix), config).get_base_model()


TRIALS = {"small": small, "smollm2": real}


@functools.lru_cache(maxsize=1)
def _tokenizer() -> tuple[Tokenizer, list[str]]:
    found = [text for paper in load_papers(*papers.TRAIN) for text in paper.get_all_sentences()]
    texts = list(dict.fromkeys(found))
    return train_tokenizer(texts), texts


@functools.lru_cache(maxsize=1)
def _smollm2() -> tuple[PreTrainedModel, PreTrainedModel, PreTrainedTokenizerBase]:
    whole, tokenizer = smollm2.load()
    return *split(whole, LAYERS), tokenizer


def _trial(
    objectives: Sequence[str],
    seed: int,
    sizes: Sizes,
    encode: Encode,
    base: PreTrainedModel,
    prefix: PreTrainedModel | None = None,
) -> Trial:
    def made(texts: list[Text]) -> list[Text]:
        return with_states(prefix, texts) if prefix else texts

    count = sizes.steps * sizes.batch_size
    train = papers.sample_pairs(load_papers(*papers.TRAIN), objectives, count, random.Random(seed))
    scale = papers.scales(train)
    encoded = [
        encoded_pairs(pairs, scale, lambda texts: made([encode(*x, True) for x in texts]), base)
        for pairs in (train, papers.held_out_pairs(objectives, sizes.held_out))
    ]
    text = made([encode(*x, False) for x in papers.human_summaries(sizes.texts)])
    return Trial(tuple(objectives), *encoded, text, lambda: copy.deepcopy(base))


def encoded_pairs(
    pairs: Sequence[Pair],
    scale: dict[str, float],
    encode: Callable[[list[tuple[str, str]]], list[Text]],
    base: PreTrainedModel,
) -> EncodedPairs:
    """Pairs as a model reads them, with their log-probabilities under `base`."""
    texts = encode([(pair.prompt, text) for pair in pairs for text in (pair.chosen, pair.rejected)])
    signs = torch.tensor([[pair.sign(name) for name in scale] for pair in pairs])
    margins = torch.tensor([[p.differences[name] / scale[name] for name in scale] for p in pairs])
    sums, _ = in_batches(base, [*texts[::2], *texts[1::2]])
    return EncodedPairs(texts[::2], texts[1::2], signs, margins, sums.view(2, -1).T)
