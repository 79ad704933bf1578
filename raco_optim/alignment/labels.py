"""Which pairs an objective labels, and the mean over them."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from raco_optim.alignment._checks import check_tensor


def labelled(
    argument: str, signs: Tensor, shape: Mapping[str, int | None], like: Tensor
) -> list[tuple[Tensor, Tensor]]:
    """Returns, for each column of signs, the indices of the pairs that it labels and their signs.

    Pairs are selected, not multiplied by 0: one without a label may be NaN and still leaves loss
    and gradient alone. Which they are is known after one copy of all the signs to the host; there
    their values are checked too. The results are on the device of `like` and of its dtype.
    """
    check_tensor(argument, signs, shape)
    host = signs.detach().cpu()
    if host.is_complex() or host.dtype == torch.bool:
        raise ValueError(
            f"`{argument}` must be numbers, +1, -1 or 0; got {host.dtype}. 0 is no label: turn "
            f"a False that is a label into -1."
        )
    wrong = ((host != 0) & (host.abs() != 1)).nonzero().tolist()
    if wrong:
        raise ValueError(
            f"`{argument}` must be +1, -1 or 0 (tie or missing); got "
            f"{host[tuple(wrong[0])].item()} at {wrong[0]}."
        )
    found = []
    for column in host.T if host.dim() == 2 else [host]:
        index = column.nonzero()[:, 0]
        sign = column[index].to(like.device, like.dtype, non_blocking=True)
        found.append((index.to(like.device, non_blocking=True), sign))
    return found


def average(losses: Tensor, count: Tensor | float | None) -> Tensor | None:
    """Returns the mean of the losses, or their sum over the count; None if there are none."""
    if not len(losses):
        return None
    if isinstance(count, Tensor):
        count = count.to(losses.device, losses.dtype, non_blocking=True)
    return losses.mean() if count is None else losses.sum() / count
