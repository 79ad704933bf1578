"""Stage 5: gradients and coefficients -> ``.grad``; the only writer of ``.grad``."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

_LOW_PRECISION = (torch.float16, torch.bfloat16)


@torch.no_grad()
def add_combined_gradient(
    parameters: Sequence[Tensor], gradients: Sequence[list[Tensor | None]], coefficients: Tensor
) -> None:
    r"""Adds the combined gradient to ``.grad``, as ``loss.backward()`` does.

    .. math:: \theta.\mathrm{grad} \mathrel{+}= \sum_i \alpha_i g_i

    The sum is formed in float32 where the gradients are of lower precision and rounded once. A
    parameter that no loss reaches keeps its ``.grad`` as it is, None included, so that weight
    decay does not move it.

    Args:
        parameters: The parameters.
        gradients: m rows, one tensor or None per parameter. They are consumed: entries become
            None as they are combined, so that the peak of memory stays at m gradients.
        coefficients: alpha, ``[m]``. On an accelerator it is used there without a copy to the
            host.

    Example:
        >>> import torch
        >>> from raco_optim import add_combined_gradient
        >>> x = torch.zeros(2, requires_grad=True)
        >>> rows = [[torch.tensor([1.0, 0.0])], [torch.tensor([0.0, 2.0])]]
        >>> add_combined_gradient([x], rows, torch.tensor([0.5, 0.25]))
        >>> x.grad
        tensor([0.5000, 0.5000])
    """
    # Python numbers where they are at hand: a multiplication by a tensor is slower.
    scales: list[Any] = (
        coefficients.tolist() if coefficients.device.type == "cpu" else list(coefficients.unbind())
    )
    for j, parameter in enumerate(parameters):
        combined: Tensor | None = None
        for row, scale in zip(gradients, scales, strict=True):
            g, row[j] = row[j], None
            if g is None:
                continue
            if g.dtype in _LOW_PRECISION:
                g = g.float()
            if combined is None:
                # Never in place: autograd may return one tensor for two parameters, an expanded
                # one, or one that the user's code still holds.
                combined = g * scale
            elif isinstance(scale, float):
                combined.add_(g, alpha=scale)
            else:
                combined.add_(g * scale)
        if combined is None:
            continue
        combined = combined.to(parameter.dtype)
        if parameter.grad is None:
            parameter.grad = combined
        else:
            parameter.grad.add_(combined)
