"""Stages 1, 2 and 5 of a step as functions: gradients, Gram matrix, combination."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from raco_optim._checks import checked_parameters
from raco_optim.gradients.combine import combine_rows, write_gradients
from raco_optim.gradients.dense import check_losses, check_parameters, iterate_gradients
from raco_optim.gradients.gram import Workspace
from raco_optim.objectives import Gradient, Loss, as_list, check_any_present


def per_loss_gradients(
    losses: Iterable[Loss | None], parameters: Iterable[Tensor]
) -> list[Gradient]:
    r"""Computes the gradient of every loss with respect to every parameter.

    .. math:: g_i = \nabla_\theta L_i, \quad i = 1, \ldots, m

    The gradients stay lists of tensors and are never copied into one ``[m, n]`` matrix. The last
    backward pass frees the graph; with callables, each graph is freed before the next forward pass.
    ``.grad`` is neither read nor written, so hooks on its accumulation, such as those of
    DistributedDataParallel, do not run.

    Args:
        losses: m scalar tensors, whose graphs may overlap, or callables without arguments that
            return one, evaluated one at a time; None for a loss that is absent from this batch and
            has a zero gradient.
        parameters: Leaf tensors, real, on one device. Frozen ones get no gradient.

    Returns:
        m lists with a tensor per parameter in its shape and dtype, or None if the loss does not
        reach the parameter.

    Raises:
        TypeError: A loss is neither a tensor nor a callable nor None.
        ValueError: A loss is not a scalar, is complex, has no graph or reaches no parameter; all
            losses are None; no parameter is trainable, or one is complex; devices differ; a
            gradient is sparse.
        RuntimeError: Reentrant activation checkpointing hides parameters from a backward pass.
        Exception: An error in a backward pass keeps its class; a note names the loss and the
            remedy.

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
    names = [str(i) for i in range(len(ordered))]
    chosen = checked_parameters("parameters", parameters)
    check_parameters(chosen)
    check_losses(ordered, chosen, names)
    return [gradient for _, gradient in iterate_gradients(ordered, chosen, names)]


def gram_matrix(gradients: Sequence[Sequence[Tensor | None] | Tensor] | Tensor) -> Tensor:
    r"""Computes the Gram matrix of m gradients.

    .. math:: H_{ij} = \langle g_i, g_j \rangle

    It is computed in float64, chunk by chunk: products of float32, bfloat16 and float16 numbers are
    exact, nothing overflows, and the error does not grow with the number of elements (a float32
    product over 50 M elements is off by up to 14 %). It does not wait for an accelerator.

    On a CPU, parameters with at least 65,536 elements and gradients of at most float32 are
    multiplied in float32, in half to two thirds of the time, and summed in float32 over at most 128
    elements (64 if more than 8 losses reach the parameter; a tree of sums for up to 3). Relative to
    :math:`|g_i| |g_j|`, the error is 1e-8 for random elements and below 1e-6 if all elements have
    the same magnitude. Everything is recomputed in float64 if an entry is not finite, a gradient is
    zero or has a root mean square below 1e-15, or the matrix of cosines has an eigenvalue below
    1e-3 (nearly dependent gradients). On a CPU, equal gradients have bitwise equal entries.

    Args:
        gradients: m rows with a tensor per parameter, in the same order in all rows, on one device,
            of any real dtype and shape; None means zeros. A row may also be a single tensor, such
            as a row of a Jacobian ``[m, n]``.

    Returns:
        H, ``[m, m]``, float64, symmetric, on the gradients' device.

    Raises:
        TypeError: A row holds something other than tensors and None.
        ValueError: There is no row, the rows differ in the number or shapes of tensors, or a tensor
            is complex.

    Example:
        >>> import torch
        >>> from raco_optim import gram_matrix
        >>> rows = [[torch.tensor([1.0, 2.0]), None], [torch.tensor([3.0, 0.0]), torch.ones(4)]]
        >>> gram_matrix(rows)
        tensor([[ 5.,  3.],
                [ 3., 13.]], dtype=torch.float64)
    """
    rows: list[list[Tensor | None]] = [
        [row] if isinstance(row, Tensor) or not isinstance(row, Iterable) else list(row)
        for row in gradients
    ]
    _check(rows)
    return Workspace().gram(rows)


@torch.no_grad()
def add_combined_gradient(
    parameters: Sequence[Tensor], gradients: Sequence[list[Tensor | None]], coefficients: Tensor
) -> None:
    r"""Adds the combined gradient to ``.grad``, as ``loss.backward()`` does.

    .. math:: \theta.\mathrm{grad} += \sum_i \alpha_i g_i

    Gradients in lower precision are summed in float32 and rounded once. If no loss reaches a
    parameter, its ``.grad`` is unchanged, also None, so weight decay does not move it.
    Post-accumulate-grad hooks of the parameters run once, at the end.

    Args:
        parameters: The parameters.
        gradients: m rows with a tensor or None per parameter. The function sets entries to None as
            it combines them, which keeps the peak of memory at m gradients.
        coefficients: alpha, ``[m]``. On an accelerator they stay there.

    Raises:
        TypeError: `parameters` or a row of `gradients` holds something other than tensors.
        ValueError: There is no row, or the numbers or shapes of tensors differ.

    Example:
        >>> import torch
        >>> from raco_optim import add_combined_gradient
        >>> x = torch.zeros(2, requires_grad=True)
        >>> rows = [[torch.tensor([1.0, 0.0])], [torch.tensor([0.0, 2.0])]]
        >>> add_combined_gradient([x], rows, torch.tensor([0.5, 0.25]))
        >>> x.grad
        tensor([0.5000, 0.5000])
    """
    parameters = checked_parameters("parameters", parameters)
    given: Sequence[Any] = gradients
    rows = [row if isinstance(row, list) else list(row) for row in given]
    _check(rows and [parameters, *rows])
    if getattr(coefficients, "shape", None) != (len(rows),):
        raise ValueError(
            f"`coefficients` must be a tensor of shape [{len(rows)}], one number per row of "
            f"`gradients`; got {coefficients!r}."
        )
    combined = combine_rows(rows, coefficients, coefficients, [True] * len(parameters))
    write_gradients(parameters, combined)


def _check(rows: Sequence[Sequence[Any]]) -> None:
    if not rows:
        raise ValueError("`gradients` must hold at least one gradient; got none.")
    lengths = [len(row) for row in rows]
    if len(set(lengths)) > 1:
        raise ValueError(
            f"`gradients` must have one tensor (or None) per parameter in every row; got rows of "
            f"{lengths} entries."
        )
    for j, column in enumerate(zip(*rows, strict=True)):
        present = [g for g in column if g is not None]
        for g in present:
            if not isinstance(g, Tensor):
                raise TypeError(
                    f"`gradients` must be rows of tensors (or None), one row per loss; got a row "
                    f"with {type(g).__name__} in it."
                )
        if any(g.is_complex() for g in present):
            raise ValueError(f"`gradients` must be real; got complex ones for parameter {j}.")
        if len({g.shape for g in present}) > 1:
            shapes = sorted({tuple(g.shape) for g in present})
            raise ValueError(
                f"`gradients` must agree in shape for every parameter; got {shapes} for parameter "
                f"{j}."
            )
