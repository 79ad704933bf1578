"""Stage 2: per-loss gradients -> Gram matrix."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from itertools import combinations_with_replacement

import torch
from torch import Tensor

Column = tuple[Tensor | None, ...]

# 64k numbers a row stay in the cache, and the rounding error of a float64 sum over so few is below
# that of one float32 number.
_CHUNK = 65536
# What float32 holds, at twice the speed of float64.
_SHORT = {torch.float32, torch.bfloat16, torch.float16}
# Up to 8 rows, float32 products of all pairs are faster than one float64 matrix product.
_PAIRS = 8


def gram_matrix(gradients: Sequence[Sequence[Tensor | None] | Tensor] | Tensor) -> Tensor:
    r"""Computes the Gram matrix of m gradients.

    .. math:: H_{ij} = \langle g_i, g_j \rangle

    In float64, chunk by chunk: the products of float32, bfloat16 and float16 numbers are exact
    there, nothing overflows, and the sum does not drift with the number of elements (a float32
    product over 50 M elements is off by up to 14 %). Nothing is waited for on an accelerator.

    On a CPU and for m up to 8, large parameters (65,536 elements and more) with gradients of
    float32 or shorter are multiplied and summed over a chunk in float32, in half to two thirds of
    the time. That is off, relative to :math:`|g_i| |g_j|`, by 1e-7 for 65,536 random elements,
    1e-8 for 5 M, and up to 6e-7 if all elements have one magnitude. Where more is needed, all is
    computed again in float64: if an entry is not finite, a gradient is zero or has a root mean
    square below 1e-15, or the matrix of cosines has an eigenvalue below 1e-3 (nearly dependent
    gradients, duplicates).

    Args:
        gradients: m rows, each one gradient as tensors per parameter, in the same order in all
            rows, on one device, of any real dtype and shape; None stands for zeros. A row may
            also be one tensor, as those of a Jacobian ``[m, n]`` are.

    Returns:
        H, ``[m, m]``, float64, symmetric, on the gradients' device.

    Raises:
        TypeError: A row holds something other than tensors and None.
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
        [row] if isinstance(row, Tensor) or not isinstance(row, Iterable) else list(row)
        for row in gradients
    ]
    if not rows:
        raise ValueError("`gradients` must hold at least one gradient; got none.")
    columns = list(_columns(rows))
    fast = [len(rows) <= _PAIRS and _may_be_float32(column) for column in columns]
    if any(fast):
        gram = _sum_of_products(columns, fast, len(rows))
        if _is_well_conditioned(gram, rows):
            return gram
    return _sum_of_products(columns, [False] * len(columns), len(rows))


def _sum_of_products(columns: list[Column], fast: list[bool], m: int) -> Tensor:
    device = next((g.device for column in columns for g in column if g is not None), None)
    gram = torch.zeros(m, m, dtype=torch.float64, device=device)
    longest = max((_length(column) for column in columns), default=0)
    scratch = torch.empty(m, min(longest, _CHUNK), dtype=torch.float64, device=device)
    for column, is_fast in zip(columns, fast, strict=True):
        if is_fast:
            gram += _products_of_pairs(column)
            continue
        for parts in _chunks(column):
            block = scratch[:, : _length(parts)]
            for i, part in enumerate(parts):
                if part is None:
                    block[i].zero_()
                else:
                    block[i].copy_(part)
            gram.addmm_(block, block.T)
    # The two triangles of a matrix product may differ in the last bit.
    return (gram + gram.T) / 2


def _chunks(column: Column) -> Iterator[list[Tensor | None]]:
    flat = [None if g is None else g.detach().reshape(-1) for g in column]
    for start in range(0, _length(column), _CHUNK):
        yield [None if g is None else g[start : start + _CHUNK] for g in flat]


def _products_of_pairs(column: Column) -> Tensor:
    m = len(column)
    sums = [[0.0] * m for _ in range(m)]
    for parts in _chunks(column):
        rows = [(i, part.float()) for i, part in enumerate(parts) if part is not None]
        for (i, a), (j, b) in combinations_with_replacement(rows, 2):
            # torch adds in a tree: a sum is off by a few bits, however many numbers it has.
            sums[i][j] += (a * b).sum().item()
    upper = torch.tensor(sums, dtype=torch.float64, device="cpu")
    return upper + upper.triu(1).T


def _is_well_conditioned(gram: Tensor, rows: list[list[Tensor | None]]) -> bool:
    """Whether an H from float32 sums serves as well as one from float64; None is exactly zero."""
    sizes = [sum(g.numel() for g in row if g is not None) for row in rows]
    present = [i for i, n in enumerate(sizes) if n > 0]
    H = gram[present][:, present]
    # Smaller squares lose bits, as those below 1e-38 do altogether.
    least = 1e-30 * H.new_tensor([sizes[i] for i in present])
    if not bool(H.isfinite().all() & (H.diagonal() > least).all()):
        return False
    scale = H.diagonal().rsqrt()
    # A solution depends on the last digits of H where gradients are nearly dependent; duplicates
    # must even have entries that are equal to the last bit.
    return bool(torch.linalg.eigvalsh(scale[:, None] * H * scale)[0] > 1e-3)


def _may_be_float32(column: Column) -> bool:
    return _length(column) >= _CHUNK and all(
        g is None or (g.device.type == "cpu" and g.dtype in _SHORT) for g in column
    )


def _columns(rows: list[list[Tensor | None]]) -> Iterator[Column]:
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
        yield column


def _length(tensors: Sequence[Tensor | None]) -> int:
    return next((g.numel() for g in tensors if g is not None), 0)
