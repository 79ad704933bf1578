"""Finds the optimizer inside wrappers that hide its methods."""

from __future__ import annotations

from typing import Any

from raco_optim.objectives import Losses
from raco_optim.optimizer.multi_objective import MultiObjectiveOptimizer


def unwrap(optimizer: Any) -> MultiObjectiveOptimizer:  # noqa: ANN401  # or any wrapper of one
    """Returns the `MultiObjectiveOptimizer` inside other wrappers.

    Wrappers such as Accelerate's ``AcceleratedOptimizer`` hide the methods and attributes that
    torch optimizers lack: ``backward``, ``report``, ``weights``, ``c``.

    Args:
        optimizer: The optimizer, or a wrapper with the attribute ``optimizer``.

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
    # Lightning's and Fabric's wrappers are instances too; find the innermost one.
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
    """Calls ``backward`` of the optimizer inside a wrapper; see `unwrap`.

    Args:
        optimizer: The optimizer, or a wrapper of it.
        losses: See `MultiObjectiveOptimizer.backward`.
        **options: Other arguments of `MultiObjectiveOptimizer.backward`.

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
