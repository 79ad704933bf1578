"""Text -> a byte-pair tokenizer and a Qwen3 language model of 0.16 M parameters, from scratch."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch import Tensor
from transformers import Qwen3Config, Qwen3ForCausalLM

PAD, BOS, EOS = 0, 1, 2
MAX_TOKENS = 128


def train_tokenizer(texts: Sequence[str], vocab_size: int = 1024) -> Tokenizer:
    """Trains a byte-level BPE tokenizer.

    It makes ``<bos> text <eos>`` of a text, and cuts it to `MAX_TOKENS`.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=["<pad>", "<bos>", "<eos>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<bos> $A <eos>", special_tokens=[("<bos>", BOS), ("<eos>", EOS)]
    )
    tokenizer.enable_padding(pad_id=PAD, pad_token="<pad>")
    tokenizer.enable_truncation(MAX_TOKENS)
    return tokenizer


def tokenize(tokenizer: Tokenizer, texts: Sequence[str]) -> Tensor:
    """Token ids ``[len(texts), longest]``, padded on the right with `PAD`."""
    return torch.tensor([encoding.ids for encoding in tokenizer.encode_batch(texts)])


def build_model(vocab_size: int) -> Qwen3ForCausalLM:
    """A two-layer Qwen3 with random weights from torch's global generator."""
    return Qwen3ForCausalLM(
        Qwen3Config(
            vocab_size=vocab_size,
            hidden_size=64,
            intermediate_size=192,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=16,
            max_position_embeddings=MAX_TOKENS,
            tie_word_embeddings=True,
            use_cache=False,
            pad_token_id=PAD,
            bos_token_id=BOS,
            eos_token_id=EOS,
            attn_implementation="eager",  # at 60 tokens on a CPU faster than the fused kernel
        )
    )


def token_log_probs(model: Qwen3ForCausalLM, ids: Tensor) -> Tensor:
    """Log-probability ``[n, T]`` of each token given those before it, for ids ``[n, T]``.

    A text starts with `BOS` and is padded on the right with `PAD`; at position t is that of token
    t + 1, 0 where there is none.
    """
    # Tokens don't see what is right of them, padding included: no attention mask is needed.
    logits = model(input_ids=ids).logits
    # One target too many, which is ignored, is cheaper than a copy of the logits without the last.
    targets = F.pad(ids[:, 1:], (0, 1), value=PAD)
    return -F.cross_entropy(
        logits.flatten(0, 1), targets.flatten(), ignore_index=PAD, reduction="none"
    ).view_as(ids)


def pretrain(
    model: Qwen3ForCausalLM,
    ids: Tensor,
    *,
    steps: int,
    on_step: Callable[[], object],
    batch_size: int = 32,
    lr: float = 5e-3,
) -> float:
    """Trains the model on next-token prediction, in place.

    Batches are drawn with replacement by torch's global generator; `lr` is the peak of a one-cycle
    schedule. Returns the cross-entropy per token (nats) of the last batch, before its step.
    """
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=steps, pct_start=0.1)
    for _ in range(steps):
        batch = trim(ids[torch.randint(len(ids), (batch_size,))])
        loss = -token_log_probs(model, batch).sum() / (batch[:, 1:] != PAD).sum()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        on_step()
    return loss.item()


def trim(ids: Tensor) -> Tensor:
    """`ids` ``[..., T]`` without the columns that are padding in every row."""
    return ids[..., : int((ids != PAD).sum(-1).max())]
