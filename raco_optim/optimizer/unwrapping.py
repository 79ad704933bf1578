"""The optimizer inside wrappers that hide its methods."""

from __future__ import annotations

from typing import Any

from raco_optim.objectives import Losses
from raco_optim.optimizer.multi_objective import MultiObjectiveOptimizer


def unwrap(optimizer: Any) -> MultiObjectiveOptimizer:  # noqa: ANN401  # or any wrapper of one
    """Returns the `MultiObjectiveOptimizer` inside other wrappers.

    Accelerate's ``AcceleratedOptimizer``, for one, hides the methods that torch optimizers lack.
    The result has them: ``backward``, ``report``, ``weights``, ``c``.

    Args:
        optimizer: The optimizer, or a wrapper that holds it as its attribute ``optimizer``.

    Raises:
        TypeError: There is no `MultiObjectiveOptimizer` inside.

    Example:
        >>> import torch, raco_optim
        >>> x = torch.nn.Parameter(torch.tensor([1.0, 1.0]))
        >>> opt = raco_optim.CAGradClip(torch.optim.SGD([x], lr=0.1), [0.5, 0.5], c=0.0)
        >>> raco_optim.unwrap(opt) is opt
        True
    """
    found = optimizer
    # Lightning's and Fabric's wrappers are instances too: the innermost one is meant.
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


def backward(optimizer: Any, losses: Losses, **options: Any) -> None:  # noqa: ANN401
    """Calls ``backward`` of the optimizer that `unwrap` finds; see there.

    Args:
        optimizer: The optimizer, or a wrapper of it.
        losses: See `MultiObjectiveOptimizer.backward`.
        **options: As there.

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
    unwrap(optimizer).backward(losses, **options)
