"""Stages 1 and 5 of a step as functions."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from raco_optim.gradients.combine import combine_rows, write_gradients
from raco_optim.gradients.dense import check_losses, check_parameters, iterate_gradients
from raco_optim.objectives import Gradient, Loss, as_list, check_any_present


def per_loss_gradients(
    losses: Iterable[Loss | None], parameters: Iterable[Tensor]
) -> list[Gradient]:
    r"""Computes the gradient of every loss with respect to every parameter.

    .. math:: g_i = \nabla_\theta L_i, \quad i = 1, \dots, m

    The gradients stay lists of per-parameter tensors and are never copied into one
    ``[m, n]`` matrix. The last backward pass frees the graph; with callables each graph is
    freed before the next forward pass. ``.grad`` is neither read nor written, so hooks on the
    accumulation of ``.grad`` (those of DistributedDataParallel among them) do not run.

    Args:
        losses: m scalar tensors that share a graph or not, or callables without arguments that
            return one, evaluated one at a time; None stands for a loss that is absent from this
            batch and has a zero gradient.
        parameters: Leaf tensors, real, on one device. Frozen ones have no gradient.

    Returns:
        m lists, one tensor per parameter in its shape and dtype, or None where the loss does not
        reach the parameter.

    Raises:
        TypeError: A loss is neither a tensor nor a callable nor None.
        ValueError: A loss is not a scalar, is complex, has no graph or reaches no parameter; all
            losses are None; no parameter is trainable, or one is complex; devices differ; a
            gradient is sparse.
        RuntimeError: Reentrant activation checkpointing hides parameters from a backward pass.
            What a backward pass raises keeps its class; a note names the loss and the remedy.

    Example:
        >>> import torch
        >>> from raco_optim import per_loss_gradients
        >>> x = torch.tensor([3.0, 4.0], requires_grad=True)
        >>> y = torch.tensor([1.0], requires_grad=True)
        >>> per_loss_gradients([(x**2).sum(), (x[0] * y).sum()], [x, y])
        [[tensor([6., 8.]), None], [tensor([1., 0.]), tensor([3.])]]

    References:
        Algorithm 1, line 3, of arXiv 2602.02495.
    """
    ordered = as_list(losses)
    check_any_present(ordered)
    names, chosen = [str(i) for i in range(len(ordered))], list(parameters)
    check_parameters(chosen)
    check_losses(ordered, chosen, names)
    return [gradient for _, gradient in iterate_gradients(ordered, chosen, names)]


@torch.no_grad()
def add_combined_gradient(
    parameters: Sequence[Tensor], gradients: Sequence[list[Tensor | None]], coefficients: Tensor
) -> None:
    r"""Adds the combined gradient to ``.grad``, as ``loss.backward()`` does.

    .. math:: \theta.\mathrm{grad} \mathrel{+}= \sum_i \alpha_i g_i

    The sum is formed in float32 where the gradients have lower precision, and rounded once. A
    parameter that no loss reaches keeps its ``.grad``, None included, so that weight decay does
    not move it. Post-accumulate-grad hooks of the parameters run once, at the end.

    Args:
        parameters: The parameters.
        gradients: m rows, one tensor or None per parameter. They are consumed: entries become
            None as they are combined, so that the peak of memory stays at m gradients.
        coefficients: alpha, ``[m]``. On an accelerator they stay there.

    Example:
        >>> import torch
        >>> from raco_optim import add_combined_gradient
        >>> x = torch.zeros(2, requires_grad=True)
        >>> rows = [[torch.tensor([1.0, 0.0])], [torch.tensor([0.0, 2.0])]]
        >>> add_combined_gradient([x], rows, torch.tensor([0.5, 0.25]))
        >>> x.grad
        tensor([0.5000, 0.5000])
    """
    shared = [True] * len(parameters)
    write_gradients(parameters, combine_rows(gradients, coefficients, coefficients, shared))
