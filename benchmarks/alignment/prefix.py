"""Log-probabilities of completions, and a frozen prefix that is run once per text.

Where only the last k layers are trained, what enters them never changes:

    ids -> [embedding, layers 1..L-k] -> states -> [layers L-k+1..L, norm, head] -> log-probs
           frozen: once per text, cached           trained: every step

and the head, with 49,152 columns a fourth of SmolLM2, sees the completion's tokens only.
"""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedModel


@dataclass(frozen=True)
class Text:
    """A prompt and its completion, as a model reads them.

    Attributes:
        ids: Token ids ``[T]`` of the prompt and the completion.
        start: Position of the completion's first token, at least 1.
        states: Hidden states ``[T, d]`` that enter the trained layers; None: the model reads `ids`.
    """

    ids: Tensor
    start: int
    states: Tensor | None = None

    def __len__(self) -> int:
        return len(self.ids)


def completion_log_probs(model: PreTrainedModel, texts: Sequence[Text]) -> tuple[Tensor, Tensor]:
    """Log-probabilities of completions given their prompts.

    Args:
        model: A causal language model, or the suffix of one if the texts have states.
        texts: Texts, all with states or all without.

    Returns:
        For each text the log-probability of the completion, summed over its tokens, and their
        number, ``[n]`` each, float32.
    """
    # Tokens don't see what is right of them, padding included: no attention mask is needed.
    device = model.get_output_embeddings().weight.device
    if texts[0].states is None:
        inputs = {"input_ids": pad_sequence([text.ids for text in texts], batch_first=True)}
    else:
        states = [text.states for text in texts if text.states is not None]
        inputs = {"inputs_embeds": pad_sequence(states, batch_first=True).float()}
    hidden = model.get_decoder()(
        **{name: value.to(device) for name, value in inputs.items()}, use_cache=False
    ).last_hidden_state

    lengths = torch.tensor([len(text) - text.start for text in texts])
    row = torch.repeat_interleave(torch.arange(len(texts)), lengths).to(device)
    # The state at position t predicts token t + 1.
    position = torch.cat([torch.arange(text.start - 1, len(text) - 1) for text in texts])
    targets = torch.cat([text.ids[text.start :] for text in texts]).to(device)
    logits = model.get_output_embeddings()(hidden[row, position.to(device)]).float()
    tokens = -F.cross_entropy(logits, targets, reduction="none")
    sums = torch.zeros(len(texts), device=device).index_add(0, row, tokens)
    return sums, lengths.to(device, torch.float32)


def in_batches(
    model: PreTrainedModel, texts: Sequence[Text], size: int = 32
) -> tuple[Tensor, Tensor]:
    """`completion_log_probs` of any number of texts, without a graph; similar lengths together."""
    order = sorted(range(len(texts)), key=lambda i: len(texts[i]))
    with torch.no_grad():
        parts = [
            completion_log_probs(model, [texts[i] for i in order[at : at + size]])
            for at in range(0, len(order), size)
        ]
    back = torch.tensor(order).argsort()
    sums, counts = (torch.cat(part).cpu()[back] for part in zip(*parts, strict=True))
    return sums, counts


def split(model: PreTrainedModel, layers: int) -> tuple[PreTrainedModel, PreTrainedModel]:
    """Cuts a causal language model in two that share its weights.

    Args:
        model: Llama, Qwen3 or Gemma 3, without `layers` cut off yet.
        layers: Number of layers of the second part.

    Returns:
        The prefix, whose decoder maps ids to states, and the suffix, a model whose decoder takes
        the states as ``inputs_embeds``.

    Raises:
        ValueError: `layers` is not between 1 and the number of layers that there are.
    """
    total = model.config.num_hidden_layers
    if not 1 <= layers <= total:
        raise ValueError(
            f"`layers` must be at least 1 and at most {total}, the layers that there are; got "
            f"{layers}."
        )
    cut = total - layers
    prefix, suffix = _part(model, slice(0, cut)), _part(model, slice(cut, total))
    prefix.get_decoder().norm = nn.Identity()
    return prefix, suffix


def _part(model: PreTrainedModel, chosen: slice) -> PreTrainedModel:
    # Shallow copies of the three modules that hold what differs, everything else is shared.
    part, decoder = copy.copy(model), copy.copy(model.get_decoder())
    part._modules, decoder._modules = dict(part._modules), dict(decoder._modules)
    part.model = decoder
    decoder.layers = decoder.layers[chosen]
    config = copy.deepcopy(model.config)
    config.num_hidden_layers = len(decoder.layers)
    if config.to_dict().get("layer_types") is not None:  # which attention a layer has (Gemma 3)
        config.layer_types = config.layer_types[chosen]
    part.config = decoder.config = config
    return part


@torch.no_grad()
def with_states(
    prefix: PreTrainedModel, texts: Sequence[Text], cache: Path, size: int = 32
) -> list[Text]:
    """Runs the prefix over texts, or reads what an earlier run left in `cache`.

    Args:
        prefix: First part of a model, from `split`.
        texts: Texts without states.
        cache: Folder for one file a list of texts. Its name holds a hash of the ids, of the
            prefix's configuration and of a few of its weights.
        size: Texts per batch.

    Returns:
        The texts with states in float32, on the CPU.
    """
    key = hashlib.sha256(repr([text.ids.tolist() for text in texts]).encode())
    key.update(prefix.config.to_json_string().encode())
    for parameter in prefix.get_decoder().parameters():
        key.update(parameter.detach().flatten()[:16].float().cpu().numpy().tobytes())
    path = cache / f"{key.hexdigest()[:24]}.pt"
    if path.exists():
        states = torch.load(path)
    else:
        order = sorted(range(len(texts)), key=lambda i: len(texts[i]))
        states = [torch.empty(0)] * len(texts)
        decoder = prefix.get_decoder()
        for at in range(0, len(order), size):
            chosen = order[at : at + size]
            ids = pad_sequence([texts[i].ids for i in chosen], batch_first=True)
            found = decoder(ids.to(prefix.device), use_cache=False).last_hidden_state.float().cpu()
            for i, state in zip(chosen, found, strict=True):
                states[i] = state[: len(texts[i])].clone()
        cache.mkdir(parents=True, exist_ok=True)
        partial = path.with_suffix(".partial")
        torch.save(states, partial)
        partial.replace(path)  # whole or not at all
    return [replace(text, states=state) for text, state in zip(texts, states, strict=True)]
