"""The one forward pass of a batch: token ids -> log-probabilities of the completions."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from raco_optim.integrations.preference_data import MARGINS, SIGNS

_NOT_FOR_THE_MODEL = ("completion_mask", "ref_chosen_logps", "ref_rejected_logps", SIGNS, MARGINS)


def completion_log_probs(model: Any, inputs: Mapping[str, Tensor]) -> Tensor:  # noqa: ANN401
    """Log-probability of every completion, summed over its tokens.

    Args:
        model: A language model with TRL's fused head, or a wrapper of one.
        inputs: A batch of TRL's collator for preferences: 2 B sequences, first the chosen ones.

    Returns:
        ``[2 B]``, with a graph.
    """
    mask = inputs["completion_mask"]
    outputs = model(
        **{key: value for key, value in inputs.items() if key not in _NOT_FOR_THE_MODEL},
        labels=inputs["input_ids"].masked_fill(mask == 0, -100),
        use_cache=False,
        fused_lm_head=True,
    )
    # The last positions: prompt-learning adapters put virtual tokens before them.
    summed: Tensor = outputs.log_probs[:, 1 - mask.size(1) :].sum(1)
    return summed
