"""The real size: SmolLM2-135M (or Gemma 3 270M), LoRA on its last layers, a frozen prefix."""

from __future__ import annotations

import copy
import functools
from collections.abc import Sequence
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from benchmarks.alignment import models, sampling
from benchmarks.alignment.prefix import Text, split, with_states
from benchmarks.alignment.sampling import FINAL, Sizes, Splits
from benchmarks.alignment.training import EncodedPairs, Trial

CACHE = Path("build/alignment/states")
LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def encode(tokenizer: PreTrainedTokenizerBase, prompt: str, completion: str, *, end: bool) -> Text:
    """Prompt, a space, completion and, if `end`, the end token: what TRL makes of them."""
    first = tokenizer(prompt).input_ids  # with a token for the beginning where a model has one
    second = tokenizer(f" {completion}", add_special_tokens=False).input_ids
    ids = [*first, *second, *([tokenizer.eos_token_id] if end else [])]
    return Text(torch.tensor(ids), start=len(first))


def adapter(suffix: PreTrainedModel, seed: int, rank: int) -> PreTrainedModel:
    """A copy of the suffix with a new LoRA adapter, which changes nothing yet."""
    torch.manual_seed(seed)
    config = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=LINEAR)
    return get_peft_model(copy.deepcopy(suffix), config).get_base_model()


@functools.lru_cache(maxsize=1)
def _parts(
    model: str, layers: int
) -> tuple[PreTrainedModel, PreTrainedModel, PreTrainedTokenizerBase]:
    whole, tokenizer = models.load(model)
    return *split(whole, layers), tokenizer


def trial(
    objectives: Sequence[str],
    seed: int,
    sizes: Sizes,
    splits: Splits = FINAL,
    *,
    model: str = "smollm2",
    layers: int = 4,
    rank: int = 8,
) -> Trial:
    """Everything that runs with one seed share.

    A seed has its own adapter and training pairs; held-out pairs, texts and questions are the same
    for all.

    Args:
        objectives: Some of `data.OBJECTIVES`.
        seed: The seed.
        sizes: How much of everything.
        splits: The papers.
        model: ``"smollm2"`` or ``"gemma3"``.
        layers: Number of layers, counted from the end, that LoRA adapts.
        rank: Of LoRA.
    """
    prefix, suffix, tokenizer = _parts(model, layers)
    train, held_out, scale = sampling.draw_pairs(objectives, seed, sizes, splits)
    encoded = []
    for pairs in (train, held_out):
        texts = [
            encode(tokenizer, pair.prompt, text, end=True)
            for pair in pairs
            for text in (pair.chosen, pair.rejected)
        ]
        texts = with_states(prefix, texts, CACHE)
        encoded.append(EncodedPairs.of(pairs, texts, scale).with_reference(suffix))
    summaries = [
        encode(tokenizer, prompt, text, end=False)
        for prompt, text in sampling.summaries(sizes, splits)
    ]
    questions = [
        encode(tokenizer, before, option, end=False)
        for before, options in sampling.questions(sizes, splits)
        for option in options
    ]
    return Trial(
        objectives=tuple(objectives),
        train=encoded[0],
        held_out=encoded[1],
        curve=encoded[1].select(range(sizes.curve)),
        text=with_states(prefix, summaries, CACHE),
        questions=with_states(prefix, questions, CACHE),
        new_policy=functools.partial(adapter, suffix, seed, rank),
        bf16=True,
    )
