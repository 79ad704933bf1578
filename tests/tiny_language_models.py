"""Random-weight language models of the three families of the paper, a tokenizer, and pairs."""

from __future__ import annotations

import random
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen3Config,
    Qwen3ForCausalLM,
)

_TEXT = "the a paper model data we show propose method result on of and large small new"
WORDS = _TEXT.split()
SPECIAL = ["<pad>", "<bos>", "<eos>", "<unk>"]
FAMILIES = ("qwen3", "llama", "gemma3")


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """One token a word."""
    vocabulary = {word: i for i, word in enumerate(SPECIAL + WORDS)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        bos_token="<bos>",
        eos_token="<eos>",
        unk_token="<unk>",
    )


def tiny_model(family: str = "llama", *, seed: int = 0, layers: int = 2) -> PreTrainedModel:
    """A model with random weights, in float32."""
    shape: dict[str, Any] = {
        "vocab_size": len(SPECIAL) + len(WORDS),
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": layers,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 8,
        "max_position_embeddings": 64,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    torch.manual_seed(seed)
    if family == "qwen3":
        return Qwen3ForCausalLM(Qwen3Config(**shape))
    if family == "gemma3":
        return Gemma3ForCausalLM(Gemma3TextConfig(**shape, sliding_window=8))
    if family == "mixtral":  # its auxiliary loss counts
        experts = {"num_local_experts": 4, "router_aux_loss_coef": 0.5}
        return MixtralForCausalLM(MixtralConfig(**shape, **experts, output_router_logits=False))
    return LlamaForCausalLM(LlamaConfig(**shape))


def tiny_pairs(
    count: int,
    objectives: tuple[str, ...] = ("helpful", "harmless"),
    *,
    seed: int = 0,
    missing: float = 0.0,
) -> list[dict[str, Any]]:
    """Rows of a preference data set; `missing` is the share of labels that are 0 or null."""
    generator = random.Random(seed)

    def text(low: int, high: int) -> str:
        return " ".join(generator.choices(WORDS, k=generator.randint(low, high)))

    rows = []
    for _ in range(count):
        row: dict[str, Any] = {
            "prompt": text(2, 5) + " ",
            "chosen": text(2, 8),
            "rejected": text(2, 8),
        }
        for objective in objectives:
            sign: int | None = generator.choice((1, -1))
            if generator.random() < missing:
                sign = generator.choice((0, None))
            row[f"pref_{objective}"] = sign
        rows.append(row)
    for objective in objectives:  # never without a label
        rows[0][f"pref_{objective}"] = 1
    return rows
