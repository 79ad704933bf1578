"""The pairs that an objective labels, and the mean over them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from raco_optim.alignment._checks import check_tensor


@dataclass(frozen=True)
class Labelled:
    """The n pairs that an objective labels; ``[n]``, on the device of the log-probabilities."""

    index: Tensor
    label: Tensor  # in [-1, 1], never 0
    weight: Tensor | None  # > 0; None if all are 1
    is_soft: bool  # whether any label is not +1 or -1

    def expectation(self, losses: Callable[[Tensor], Tensor]) -> Tensor:
        """Returns the expected losses if the sign is +1 with probability (1 + label) / 2."""
        if not self.is_soft:
            return losses(self.label)
        sign, sure = self.label.sign(), (1 + self.label.abs()) / 2
        return sure * losses(sign) + (1 - sure) * losses(-sign)

    def mean(self, x: Tensor) -> Tensor:
        """Returns the weighted mean."""
        return x.mean() if self.weight is None else (self.weight * x).sum() / self.weight.sum()

    def average(self, losses: Tensor, count: Tensor | float | None) -> Tensor | None:
        """Returns the weighted mean, or the weighted sum / count; None without a loss."""
        if not len(losses):
            return None
        if count is None:
            return self.mean(losses)
        if isinstance(count, Tensor):
            count = count.to(losses.device, losses.dtype, non_blocking=True)
        return (losses if self.weight is None else self.weight * losses).sum() / count


def labelled(
    argument: str,
    signs: Tensor,
    shape: Mapping[str, int | None],
    like: Tensor,
    *,
    weights: Tensor | None = None,
    soft: bool = True,
) -> list[Labelled]:
    """Returns the labelled pairs of each column of signs; device and dtype are those of `like`.

    Pairs are selected, not multiplied by 0, because an unlabelled pair may be NaN. One copy of all
    signs to the CPU serves the selection and the checks.
    """
    check_tensor(argument, signs, shape)
    host = signs.detach().cpu()
    if host.is_complex() or host.dtype == torch.bool:
        raise ValueError(
            f"`{argument}` must be numbers in [-1, 1], where 0 means no label; got {host.dtype}. "
            f"Convert labels True and False to 1 and -1."
        )
    right = host.abs() <= 1 if soft else (host == 0) | (host.abs() == 1)  # NaN is not
    if not right.all():
        where = (~right).nonzero()[0].tolist()
        raise ValueError(
            f"`{argument}` must be {'in [-1, 1]' if soft else '+1, -1 or 0'}, where 0 means a tie "
            f"or no label; got {host[tuple(where)].item()} at {where}."
        )
    labels = host != 0
    if weights is not None:
        name = "pair_weights" if host.dim() == 2 else "pair_weight"
        check_tensor(name, weights, shape)
        weights = weights.detach().cpu()
        right = (weights >= 0) & weights.isfinite()
        if not right.all():
            where = (~right).nonzero()[0].tolist()
            got = weights[tuple(where)].item()
            raise ValueError(f"`{name}` must be finite and not negative; got {got} at {where}.")
        labels = labels & (weights > 0)
    found = []
    for k in range(host.shape[1] if host.dim() == 2 else 1):
        column, chosen = (x[:, k] if x.dim() == 2 else x for x in (host, labels))
        index = chosen.nonzero()[:, 0]
        weight = None
        if weights is not None:
            weight = (weights[:, k] if weights.dim() == 2 else weights)[index]
            weight = weight.to(like.device, like.dtype, non_blocking=True)
        label = column[index]
        is_soft = bool((label.abs() != 1).any())
        label = label.to(like.device, like.dtype, non_blocking=True)
        index = index.to(like.device, non_blocking=True)
        found.append(Labelled(index, label, weight, is_soft))
    return found
