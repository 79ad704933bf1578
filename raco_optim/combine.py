"""Stage 5: gradients and coefficients -> ``.grad``; the only writer of ``.grad``."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

LOW_PRECISION = (torch.float16, torch.bfloat16)
LARGEST = torch.finfo(torch.float32).max


@dataclass(frozen=True)
class Coefficients:
    """What the gradients of m losses are combined with, which differs by parameter.

    Attributes:
        alpha: Coefficients of the shared parameters, ``[m]``.
        weights: Coefficients of the others (task heads), ``[m]``.
        shared: Which parameters are shared.
    """

    alpha: Tensor
    weights: Tensor
    shared: Sequence[bool]

    def parts(self) -> Iterator[tuple[list[int], Tensor]]:
        """Yields the positions of the heads' parameters, then of the shared, and coefficients."""
        for part, coefficients in ((False, self.weights), (True, self.alpha)):
            yield [j for j, s in enumerate(self.shared) if s == part], coefficients


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
    scales = as_scales(coefficients)
    for j, parameter in enumerate(parameters):
        column = []
        for row, scale in zip(gradients, scales, strict=True):
            if row[j] is not None:
                column.append((row[j], scale))
                row[j] = None
        if column:
            add_gradient(parameter, combination(*zip(*column, strict=True)))


def as_scales(coefficients: Tensor) -> list[Any]:
    """Returns Python numbers where they are at hand: a tensor is slower to multiply by.

    A tensor has at most the largest number of float32, so that it is never Inf beside gradients.
    """
    if coefficients.device.type == "cpu":
        return coefficients.tolist()
    return list(coefficients.clamp(-LARGEST, LARGEST).unbind())


def combination(tensors: Sequence[Tensor], scales: Sequence[Any]) -> Tensor:
    r"""Returns :math:`\sum_i \alpha_i x_i`, formed in float32 at least."""
    # Never in place: autograd may return one tensor for two parameters, an expanded one, or one
    # that the user's code still holds.
    combined = _scaled(tensors[0], scales[0])
    for x, scale in zip(tensors[1:], scales[1:], strict=True):
        if isinstance(scale, float) and abs(scale) <= LARGEST:
            combined.add_(_at_least_single(x), alpha=scale)
        else:
            combined.add_(_scaled(x, scale))
    return combined


def _scaled(x: Tensor, scale: Any) -> Tensor:  # noqa: ANN401  # a number or a tensor
    """x times a number that float32 may not hold, as where p is on a gradient of 1e-40."""
    x = _at_least_single(x)
    wide = isinstance(scale, float) and abs(scale) > LARGEST
    scaled: Tensor = (x.double() if wide else x) * scale
    return scaled.to(x.dtype)


def _at_least_single(x: Tensor) -> Tensor:
    return x.float() if x.dtype in LOW_PRECISION else x


@torch.no_grad()
def add_gradient(parameter: Tensor, gradient: Tensor) -> None:
    """Adds a gradient, which it may keep, to ``.grad`` of the parameter."""
    gradient = gradient.to(parameter.dtype)
    if parameter.grad is None:
        # As autograd does: fused optimizers walk both in the order of memory.
        if gradient.stride() != parameter.stride():
            gradient = torch.empty_like(parameter).copy_(gradient)
        parameter.grad = gradient
    else:
        parameter.grad.add_(gradient)


@contextmanager
def stashed_gradients(parameters: Sequence[Tensor]) -> Iterator[Callable[[], list[Tensor | None]]]:
    """Puts ``.grad`` aside and yields what takes, and clears, that which a backward pass leaves."""

    def take() -> list[Tensor | None]:
        found = [p.grad for p in parameters]
        for p in parameters:
            p.grad = None
        return found

    kept = take()
    try:
        yield take
    finally:
        for p, g in zip(parameters, kept, strict=True):
            p.grad = g
