"""The optimizer inside wrappers that hide its methods."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from raco_optim.optimizer import MultiObjectiveOptimizer
from raco_optim.weights import Losses


def backward(
    optimizer: Any,  # noqa: ANN401  # an optimizer or any wrapper of it
    losses: Losses,
    *,
    accumulate: bool = False,
    representation: Tensor | None = None,
) -> None:
    """Calls ``backward`` of a `MultiObjectiveOptimizer` inside another wrapper.

    Accelerate's ``AcceleratedOptimizer``, for one, forwards the methods of torch optimizers only.

    Args:
        optimizer: The optimizer, or a wrapper that holds it as its attribute ``optimizer``.
        losses: See `MultiObjectiveOptimizer.backward`.
        accumulate: As there.
        representation: As there.

    Raises:
        TypeError: There is no `MultiObjectiveOptimizer` inside.

    Example:
        >>> import torch, raco_optim
        >>> x = torch.nn.Parameter(torch.tensor([1.0, 1.0]))
        >>> opt = raco_optim.CAGradClip(torch.optim.SGD([x], lr=0.1), [0.5, 0.5], c=0.0)
        >>> raco_optim.backward(opt, [x[0], x[1]])
        >>> x.grad
        tensor([0.5000, 0.5000])
    """
    inside(optimizer).backward(losses, accumulate=accumulate, representation=representation)


def inside(optimizer: Any) -> MultiObjectiveOptimizer:  # noqa: ANN401  # as above
    """Returns the `MultiObjectiveOptimizer` inside other wrappers, or raises `TypeError`."""
    found = optimizer
    # Lightning's wrapper is an instance too, with a state of its own: the innermost one is meant.
    while not isinstance(found, MultiObjectiveOptimizer) or isinstance(
        found.optimizer, MultiObjectiveOptimizer
    ):
        try:
            found = found.optimizer
        except AttributeError:
            raise TypeError(
                f"`optimizer` must be a MultiObjectiveOptimizer such as CAGradClip, or a wrapper "
                f"of one; got {type(optimizer).__name__}."
            ) from None
    return found
