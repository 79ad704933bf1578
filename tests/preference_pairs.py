"""Random log-probabilities of pairs, and signs of objectives that label some of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import pytest
import torch
from torch import Tensor

from raco_optim.alignment import PairLogProbs


def random_pairs(size: int = 12, *, dtype: torch.dtype = torch.float64) -> PairLogProbs:
    """With all fields; the policy's log-probabilities are leaves that require a gradient."""
    rng = np.random.default_rng(0)
    chosen, rejected, *reference = torch.from_numpy(rng.normal(-30, 10, (4, size))).to(dtype)
    tokens = torch.from_numpy(rng.integers(1, 40, (2, size)))
    leaves = (x.clone().requires_grad_() for x in (chosen, rejected))
    return PairLogProbs(*leaves, *reference, *tokens)


def random_signs(size: int = 12, m: int = 3) -> Tensor:
    """``[size, m]``, int64, with all three values in every column."""
    rng = np.random.default_rng(0)
    columns = [rng.permutation(np.resize([1, -1, 0, 1, -1], size)) for _ in range(m)]
    return torch.from_numpy(np.stack(columns, axis=1))


def changed(log_probs: PairLogProbs, **fields: Tensor | None) -> PairLogProbs:
    """The same with other values for some fields."""
    return PairLogProbs(**(vars(log_probs) | fields))


def gradients(loss: Tensor, log_probs: PairLogProbs) -> tuple[Tensor, ...]:
    """By the policy's log-probabilities; the graph stays."""
    return torch.autograd.grad(loss, (log_probs.chosen, log_probs.rejected), retain_graph=True)


def refused(
    fragments: Sequence[str],
    call: Callable[..., object],
    *args: object,
    exception: type[Exception] = ValueError,
    **kwargs: object,
) -> None:
    """Checks that a call raises, and that the message holds "got" and the fragments."""
    with pytest.raises(exception) as caught:
        call(*args, **kwargs)
    assert [f for f in [*fragments, "got"] if f not in str(caught.value)] == []
