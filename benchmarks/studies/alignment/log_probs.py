"""Log-probabilities of completions, and a frozen prefix that is run once per text.

Where only the last k layers are trained, what enters them never changes:

    ids -> [embedding, layers 1..L-k] -> states -> [layers L-k+1..L, norm, head] -> log-probs
           frozen: once per text                   trained: every step

and the head, with 49,152 columns a fourth of SmolLM2, sees the completion's tokens only.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedModel


@dataclass(frozen=True)
class Text:
    """A prompt and its completion, as a model reads them."""

    ids: Tensor  # token ids [T] of both
    start: int  # position of the completion's first token, at least 1
    states: Tensor | None = None  # [T, d] that enter the trained layers

    def __len__(self) -> int:
        return len(self.ids)


def completion_log_probs(model: PreTrainedModel, texts: Sequence[Text]) -> tuple[Tensor, Tensor]:
    """Log-probability of each completion given its prompt, and its number of tokens, ``[n]`` each.

    The model is the suffix of one if the texts have states; all have them, or none.
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


@torch.no_grad()
def in_batches(
    model: PreTrainedModel, texts: Sequence[Text], size: int = 32
) -> tuple[Tensor, Tensor]:
    """`completion_log_probs` of any number of texts, without a graph; similar lengths together."""
    order = sorted(range(len(texts)), key=lambda i: len(texts[i]))
    parts = [
        completion_log_probs(model, [texts[i] for i in order[at : at + size]])
        for at in range(0, len(order), size)
    ]
    back = torch.tensor(order).argsort()
    sums, counts = (torch.cat(part).cpu()[back] for part in zip(*parts, strict=True))
    return sums, counts


def split(model: PreTrainedModel, layers: int) -> tuple[PreTrainedModel, PreTrainedModel]:
    """Cuts a model in two that share its weights: the prefix, and the last `layers` layers.

    The prefix's decoder maps ids to states, the other's takes them as ``inputs_embeds``.
    """
    cut = model.config.num_hidden_layers - layers
    prefix, suffix = _part(model, slice(0, cut)), _part(model, slice(cut, None))
    prefix.get_decoder().norm = nn.Identity()
    return prefix, suffix


def _part(model: PreTrainedModel, chosen: slice) -> PreTrainedModel:
    # Shallow copies of the modules that hold what differs, everything else is shared.
    part, decoder = copy.copy(model), copy.copy(model.get_decoder())
    part._modules, decoder._modules = dict(part._modules), dict(decoder._modules)
    part.model = decoder
    decoder.layers = decoder.layers[chosen]
    config = copy.deepcopy(model.config)
    config.num_hidden_layers = len(decoder.layers)
    part.config = decoder.config = config
    return part


@torch.no_grad()
def with_states(prefix: PreTrainedModel, texts: Sequence[Text]) -> list[Text]:
    """Runs the prefix over texts; their states are in float32, on the CPU."""
    decoder = prefix.get_decoder()
    found = []
    for text in texts:
        states = decoder(text.ids[None].to(prefix.device), use_cache=False).last_hidden_state
        found.append(replace(text, states=states[0].float().cpu()))
    return found
