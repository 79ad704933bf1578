"""The one forward pass of a batch: token ids -> log-probabilities of the completions.

TRL's fused head computes them, and their gradients, without the layer whose weight it uses. In a
backward pass for all objectives `_FusedHead` takes its place.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor
from trl.kernels.chunked_logprob import ChunkedLogProbFunction, _addmm_fp32

from raco_optim.gradients.per_example.layers import Sensitivities, Vectors, blocks, norm
from raco_optim.gradients.per_example.watch import HIDDEN
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


class _FusedHead(torch.autograd.Function):
    """Goes back through TRL's fused head in a pass for all objectives."""

    positions: ClassVar[dict[str, int]] = {"weight": 1, "bias": 2}

    @staticmethod
    def backward(ctx: Any, g: Tensor, *_: object) -> tuple[Tensor | None, ...]:  # noqa: ANN401
        """Hands the parts of weight and bias over; returns the gradient of the hidden states."""
        rows = _Rows(ctx, g)
        ctx.run(ctx.parameters["weight"], lambda: rows)
        if not rows.swept:  # nobody wants the gradient of the weight
            deque(rows.tiles(), 0)
        if "bias" in ctx.parameters:
            ctx.run(ctx.parameters["bias"], lambda: Vectors(rows.sums[:, None]))
        return rows.grad_of_all(), *[None] * 8


class _Rows:
    r"""The part of the weight in :math:`\log p_{t_k}` of rows k, with logits :math:`f(W h_k + b)`.

    With g the gradient of the log-probability, that of a logit is :math:`g (1_{v = t} - p_v)`.
    """

    def __init__(self, ctx: Any, g: Tensor) -> None:  # noqa: ANN401
        self._all, self._weight, self._bias, targets, log_z, _ = ctx.saved_tensors
        self._dtype, self._settings = ctx.compute_dtype, ctx.kernel_args
        # In the order of the examples, and without the rows of none, as those of prompts are.
        order = ctx.owners.argsort(stable=True)
        self._order = order[int((ctx.owners < 0).sum()) :]
        counts = ctx.owners[self._order].bincount(minlength=ctx.number)
        self._counts = counts.tolist()
        self._hidden = self._all[self._order].to(self._dtype)
        self._targets, self._log_z = targets[self._order], log_z[self._order, None]
        self._g = g[self._order, None].float()
        self.swept = False
        self.grad_hidden = torch.zeros_like(self._hidden, dtype=torch.float32)
        self.sums = g.new_empty(ctx.number, len(self._weight))

    def tiles(self) -> Iterator[tuple[int, int, Sequence[Tensor]]]:
        """Yields ranges of the vocabulary, and there the gradients of every example's logits."""
        is_first, self.swept = not self.swept, True
        width = len(self._counts) * self._hidden.shape[1]
        for start, end in blocks(len(self._weight), width, self._hidden.device):
            weight = self._weight[start:end].to(self._dtype)
            delta = self._delta(weight, start, end)
            of_examples = torch.split(delta, self._counts)
            if is_first:
                _addmm_fp32(self.grad_hidden, delta, weight)
                if self._bias is not None:
                    sums = [x.sum(0, dtype=torch.float32) for x in of_examples]
                    torch.stack(sums, out=self.sums[:, start:end])
            yield start, end, of_examples

    def _delta(self, weight: Tensor, start: int, end: int) -> Tensor:
        logits = self._hidden @ weight.T
        if self._bias is not None:
            logits += self._bias[start:end].to(self._dtype)
        logits, factor = logits.float(), self._settings["logit_scale"] * self._settings["inv_t"]
        if self._settings["HAS_SOFTCAP"]:
            cap = self._settings["softcap"]
            tanh = torch.tanh(logits * (self._settings["logit_scale"] / cap))
            logits, factor = tanh * (cap * self._settings["inv_t"]), factor * (1 - tanh.square())
        else:
            logits *= factor
        delta: Tensor = logits.sub_(self._log_z).exp_().mul_(-self._g)
        there = ((self._targets >= start) & (self._targets < end)).nonzero()[:, 0]
        delta[there, self._targets[there] - start] += self._g[there, 0]
        delta *= factor
        return delta.to(self._dtype)

    def add_to(self, total: Tensor, s: Sensitivities, *, fresh: bool) -> None:
        """See `Part`."""
        of_examples = torch.split(self._hidden, self._counts)
        n, a = len(s.u[0]) // (2 if s.paired else 1), self._hidden.shape[1]
        flat = total.view(len(total), -1)
        for start, end, deltas in self.tiles():
            d = self._hidden.new_empty(n, end - start, a)
            for k, (delta, x) in enumerate(zip(deltas, of_examples, strict=True)):
                if k < n:
                    torch.mm(delta.T, x, out=d[k])
                else:  # the other text of a pair
                    d[k - n].addmm_(delta.T, x, alpha=-1)
            s.add_weighted(
                flat[:, start * a : end * a], d.view(n, -1), fresh=fresh, folded=s.paired
            )
            del d  # the next block takes its place, in the cache too

    def size(self) -> tuple[Tensor, torch.dtype]:
        """See `Part`."""
        return norm(norm(self._hidden, -1) * self._g[:, 0]), self._dtype

    def grad_of_all(self) -> Tensor:
        """Returns the gradient of all hidden states."""
        grad = torch.zeros_like(self._all)
        grad[self._order] = self.grad_hidden.to(grad.dtype)
        return grad


HIDDEN[ChunkedLogProbFunction] = _FusedHead
