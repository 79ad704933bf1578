"""Stage 2: the Gram matrix of per-loss gradients."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import combinations_with_replacement
from typing import Any

import numpy as np
import torch
from torch import Tensor

Column = Sequence[Tensor | None]

# 64k numbers per row stay in the cache, and a float64 sum over them rounds less than one float32
# number.
_CHUNK = 65536
# On an accelerator each chunk costs launches: 1 B parameters would be 16,000 chunks.
_CHUNK_OF_ACCELERATOR = 2**20
# Float32 holds these, at twice the speed of float64.
_SHORT = {torch.float32, torch.bfloat16, torch.float16}
# Numbers of small columns that are multiplied at once: 2 MB of float64.
_BLOCK = 2**18
# Up to 3 rows, float32 products of all pairs are faster than products of matrices.
_PAIRS = 3


class Workspace:
    """Multiplies gradients; keeps scratch memory and a plan between steps.

    The plan depends on shapes, dtypes, devices and missing tensors, which every call compares.
    """

    def __init__(self) -> None:
        self._key: list[Any] = []

    @torch.no_grad()
    @np.errstate(all="ignore")  # the caller handles NaN and Inf
    def gram(self, rows: Sequence[Sequence[Tensor | None]]) -> Tensor:
        """Returns the Gram matrix, ``[m, m]``, of checked rows; see `gram_matrix`."""
        key: list[Any] = [
            g if g is None else (g.shape, g.dtype, g.device) for row in rows for g in row
        ]
        key.append(len(rows))
        if key != self._key:
            self._key = []
            self._plan(rows)
            self._key = key
        m = len(rows)
        if self._others:
            gram = _exactly([[row[j] for row in rows] for j in self._others], m)
            if not gram.is_cpu:
                return (gram + gram.T) / 2
            H = gram.numpy()
        else:
            H = np.zeros((m, m))
        for views, places, products in self._batches:
            sources: Any = [rows[i][j] for i, j in places]
            torch._foreach_copy_(views, sources)
            for where, left, right, out, found in products:
                # Not by numpy: its BLAS has threads of its own, which cost 20 ms of CPU time.
                torch.mm(left, right, out=out)
                H[where] += found
        if self._large:
            small = H.copy()
            for j, losses, where in self._large:
                column = [g for i in losses if (g := rows[i][j]) is not None]
                product = _pairs if len(column) <= _PAIRS else self._stacked
                H[where] += product(column)
            if not _is_well_conditioned(H, self._sizes):
                columns = [[row[j] for row in rows] for j, *_ in self._large]
                H = small + _exactly(columns, m).numpy()
        # The two triangles of a matrix product may differ in the last bit.
        H = (H + H.T) / 2
        _mend(H, rows)
        return torch.from_numpy(H)

    def _plan(self, rows: Sequence[Sequence[Tensor | None]]) -> None:
        """Decides how to multiply each column.

        Small columns are grouped by the losses that reach them; each group is one or more float64
        matrices of limited size (m = 8 and 22 parameters take 0.2 ms, and 0.6 ms separately). The
        head of a single loss adds a squared norm, without m^2 products.
        """
        groups: dict[tuple[int, ...], list[tuple[int, torch.Size]]] = {}
        self._sizes = [sum(g.numel() for g in row if g is not None) for row in rows]
        self._others: list[int] = []
        self._large: list[tuple[int, tuple[int, ...], Any]] = []
        longest = total = 0
        for j, column in enumerate(zip(*rows, strict=True)):
            losses = tuple(i for i, g in enumerate(column) if g is not None)
            there = [g for g in column if g is not None]
            n = there[0].numel() if there else 0
            if any(g.device.type != "cpu" for g in there):
                self._others.append(j)
            elif 0 < n < _CHUNK:
                groups.setdefault(losses, []).append((j, there[0].shape))
                longest, total = max(longest, n), total + n * len(losses)
            elif n and all(g.dtype in _SHORT for g in there):
                self._large.append((j, losses, _square(losses)))
            elif n:
                self._others.append(j)
        size = min(max(_BLOCK, len(rows) * longest), total)
        scratch = torch.empty(size, dtype=torch.float64, device="cpu")
        self._batches: list[tuple[list[Tensor], list[tuple[int, int]], list[Any]]] = []
        out = torch.empty(len(rows) ** 2, dtype=torch.float64, device="cpu")
        end = size
        for losses, columns in groups.items():
            k, left = len(losses), columns[::-1]
            while left:
                if end + k * left[-1][1].numel() > size:
                    self._batches.append(([], [], []))
                    end = 0
                taken, width = [], 0
                while left and end + k * (width + left[-1][1].numel()) <= size:
                    taken.append(left.pop())
                    width += taken[-1][1].numel()
                matrix = scratch[end : end + k * width].view(k, width)
                end += k * width
                views, places, products = self._batches[-1]
                product = out[: k * k].view(k, k)
                products.append((_square(losses), matrix, matrix.T, product, product.numpy()))
                for i, row in zip(losses, matrix, strict=True):
                    parts = torch.split(row, [shape.numel() for _, shape in taken])
                    views += [x.view(shape) for x, (_, shape) in zip(parts, taken, strict=True)]
                    places += [(i, j) for j, _ in taken]
        self._scratch: dict[int, tuple[Tensor, Tensor]] = {}

    def _stacked(self, column: Sequence[Tensor]) -> Any:  # noqa: ANN401  # a numpy array
        """Multiplies short pieces of float32 rows in batches, and sums in float64.

        BLAS sums a piece sequentially: with elements of equal magnitude, 128 of them (64 in the
        kernel for more rows) are off by 5e-7 (1e-6), 1,024 by 4e-6. 10 M elements and m = 4 / 8 /
        40 take 17 / 48 / 600 ms; all pairs 22 / 73, float64 1,140.
        """
        k, dtype = len(column), torch.float32
        piece, chunk = (128, _CHUNK) if k <= 8 else (64, _CHUNK if k <= 16 else _CHUNK // 2)
        if k not in self._scratch:
            out = torch.empty(chunk // piece, k, k, dtype=dtype, device="cpu")
            self._scratch[k] = torch.empty(k, chunk, dtype=dtype, device="cpu"), out
        scratch, out = self._scratch[k]
        total, filled = torch.zeros(k, k, dtype=torch.float64, device="cpu"), 0
        for parts in zip(*(torch.split(g.reshape(-1), chunk) for g in column), strict=True):
            if len(parts[0]) != filled:
                filled = len(parts[0])
                n = -(-filled // piece)
                rows, rest = scratch[:, :filled].unbind(), scratch[:, filled : n * piece]
                left, out = (
                    scratch[:, : n * piece].view(k, n, piece).transpose(0, 1),
                    out[:n],
                )
            torch._foreach_copy_(rows, parts)
            rest.zero_()
            # `out`, because autocast would round the factors of a product without it.
            total += torch.bmm(left, left.mT, out=out).sum(0, dtype=torch.float64)
        return total.numpy()


def _square(losses: tuple[int, ...]) -> Any:  # noqa: ANN401  # an index
    """Returns the index of the entries of H for these losses, as slices if possible."""
    first, last = losses[0], losses[-1] + 1
    if last - first > len(losses):
        return np.ix_(losses, losses)
    return slice(first, last), slice(first, last)


def _pairs(column: Sequence[Tensor]) -> Any:  # noqa: ANN401  # a numpy array
    """Multiplies float32 rows pair by pair, which is faster than stacking a few."""
    upper = np.zeros((len(column), len(column)))
    product = torch.empty(_CHUNK, dtype=torch.float32, device="cpu")
    for parts in zip(*(torch.split(g.reshape(-1), _CHUNK) for g in column), strict=True):
        rows, out = enumerate(part.float() for part in parts), product[: len(parts[0])]
        for (i, a), (j, b) in combinations_with_replacement(rows, 2):
            # torch adds in a tree: any sum is off by only a few bits.
            upper[i, j] += torch.mul(a, b, out=out).sum().item()
    return upper + np.triu(upper, 1).T


def _exactly(columns: Sequence[Column], m: int) -> Tensor:
    """Multiplies in float64, chunk by chunk: gradients of any dtype, layout and device."""
    there = [g for column in columns for g in column if g is not None]
    device = there[0].device if there else torch.device("cpu")
    gram = torch.zeros(m, m, dtype=torch.float64, device=device)
    chunk = _CHUNK if device.type == "cpu" else _CHUNK_OF_ACCELERATOR
    longest = min(max((g.numel() for g in there), default=0), chunk)
    scratch = torch.empty(m, longest, dtype=torch.float64, device=device)
    for column in columns:
        pieces = [None if g is None else torch.split(g.reshape(-1), chunk) for g in column]
        for k, piece in enumerate(next(x for x in pieces if x is not None)):
            block = scratch[:, : len(piece)]
            for row, of_row in zip(block, pieces, strict=True):
                if of_row is None:
                    row.zero_()
                else:
                    row.copy_(of_row[k])
            gram.addmm_(block, block.T)
    return gram


def _is_well_conditioned(H: Any, sizes: Sequence[int]) -> bool:  # noqa: ANN401  # a numpy array
    """Returns whether an H from float32 sums is as good as one from float64."""
    present = [i for i, n in enumerate(sizes) if n > 0]
    if len(present) < len(H):
        H = H[np.ix_(present, present)]
    squares = H.diagonal()
    # Float32 products lose bits below this, and everything below 1e-38.
    least = [1e-30 * sizes[i] for i in present]
    if not (math.isfinite(H.sum()) and (squares > least).all()):
        return False
    lengths = np.sqrt(squares)
    cosines = H / lengths[:, None] / lengths
    # For nearly dependent gradients, the solution depends on the last digits of H. The factor
    # exists if and only if all eigenvalues are above 1e-3, and is faster than computing them.
    cosines[np.diag_indices_from(cosines)] -= 1e-3
    return int(torch.linalg.cholesky_ex(torch.from_numpy(cosines)).info) == 0


def _mend(H: Any, rows: Sequence[Sequence[Tensor | None]]) -> None:  # noqa: ANN401
    """Makes entries of equal gradients bitwise equal, which matrix products (BLAS) may not.

    Otherwise the subproblem has a single random solution instead of many. Tensors are compared only
    if the entries show two gradients to be equal up to rounding.
    """
    squares = H.diagonal()
    if math.isnan(squares.sum()):  # NaN times None is NaN, too
        bad = np.isnan(squares)
        H[bad] = H[:, bad] = np.nan
    close = np.maximum.outer(squares, squares) * (1 - 1e-9) < H
    if np.count_nonzero(close) > len(H):
        for j, i in zip(*np.nonzero(np.tril(close, -1)), strict=True):
            if all(map(_are_equal, rows[i], rows[j])):
                H[j] = H[i]
                H[:, j] = H[:, i]


def _are_equal(a: Tensor | None, b: Tensor | None) -> bool:
    if a is None or b is None:
        return a is b
    return a is b or (a.dtype == b.dtype and torch.equal(a, b))
