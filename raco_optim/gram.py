"""Stage 2: per-loss gradients -> Gram matrix."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

# 64k float64 numbers a row stay in the cache, and the rounding error of a sum over so few is
# below that of one float32 number.
_CHUNK = 65536


def gram_matrix(gradients: Sequence[Sequence[Tensor | None] | Tensor] | Tensor) -> Tensor:
    r"""Computes the Gram matrix of m gradients.

    .. math:: H_{ij} = \langle g_i, g_j \rangle

    Chunks of at most 65,536 elements are converted to float64 and multiplied there: the products
    of float32, bfloat16 and float16 numbers are then exact, nothing overflows, and the sum does
    not drift with the number of elements (a float32 product over 50 M elements is off by up to
    14 %). Nothing is waited for on an accelerator.

    Args:
        gradients: m rows, each one gradient as tensors per parameter, in the same order in all
            rows, on one device, of any real dtype and shape; None stands for zeros. A row may
            also be one tensor, as those of a Jacobian ``[m, n]`` are.

    Returns:
        H, ``[m, m]``, float64, symmetric, on the gradients' device.

    Raises:
        ValueError: There is no row, the rows differ in their number or shapes of tensors, or a
            tensor is complex.

    Example:
        >>> import torch
        >>> from raco_optim import gram_matrix
        >>> rows = [[torch.tensor([1.0, 2.0]), None], [torch.tensor([3.0, 0.0]), torch.ones(4)]]
        >>> gram_matrix(rows)
        tensor([[ 5.,  3.],
                [ 3., 13.]], dtype=torch.float64)
    """
    rows: list[list[Tensor | None]] = [
        [row] if isinstance(row, Tensor) else list(row) for row in gradients
    ]
    if not rows:
        raise ValueError("`gradients` must hold at least one gradient; got none.")
    columns = list(_columns(rows))
    device = next((g.device for column in columns for g in column if g is not None), None)
    m = len(rows)
    gram = torch.zeros(m, m, dtype=torch.float64, device=device)
    longest = max((_length(column) for column in columns), default=0)
    scratch = torch.empty(m, min(longest, _CHUNK), dtype=torch.float64, device=device)
    for column in columns:
        flat = [None if g is None else g.detach().reshape(-1) for g in column]
        length = _length(column)
        for start in range(0, length, _CHUNK):
            stop = min(start + _CHUNK, length)
            block = scratch[:, : stop - start]
            for i, g in enumerate(flat):
                if g is None:
                    block[i].zero_()
                else:
                    block[i].copy_(g[start:stop])
            gram.addmm_(block, block.T)
    # The two triangles of a matrix product may differ in the last bit.
    return (gram + gram.T) / 2


def _columns(rows: list[list[Tensor | None]]) -> Iterator[tuple[Tensor | None, ...]]:
    lengths = [len(row) for row in rows]
    if len(set(lengths)) > 1:
        raise ValueError(
            f"`gradients` must have one tensor (or None) per parameter in every row; got rows of "
            f"{lengths} entries."
        )
    for j, column in enumerate(zip(*rows, strict=True)):
        if any(g is not None and g.is_complex() for g in column):
            raise ValueError(f"`gradients` must be real; got complex ones for parameter {j}.")
        shapes = {tuple(g.shape) for g in column if g is not None}
        if len(shapes) > 1:
            raise ValueError(
                f"`gradients` must agree in shape for every parameter; got {sorted(shapes)} for "
                f"parameter {j}."
            )
        yield column


def _length(column: tuple[Tensor | None, ...]) -> int:
    return next((g.numel() for g in column if g is not None), 0)
