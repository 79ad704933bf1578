r"""Mode "ghost": the exact Gram matrix without the gradients of large weights.

A layer :math:`y = x W^\top` with inputs :math:`x \in \mathbb{R}^{N \times a}` has the gradients
:math:`g_i = \delta_i^\top x`, where :math:`\delta_i = \partial L_i / \partial y`. A step needs only
their inner products and combination, which follow from x and :math:`\delta_i`; with
:math:`K = x x^\top`,

.. math::
    \langle g_i, g_j \rangle = \langle K \delta_i, \delta_j \rangle, \qquad
    \sum_i \alpha_i g_i = \Big( \sum_i \alpha_i \delta_i \Big)^\top x.

A convolution is such a layer of its unfolded input. An embedding's gradient is stored as the rows
that were looked up; the others are zero. The gradient of a weight with several uses is the sum over
them: inputs and output gradients of its products are concatenated, and mixed terms of products and
lookups of one weight (tied embeddings) are added.

`graph.py` finds inputs and layers in the autograd graph of the losses, without changing the model.
A weight is treated like this only if all its uses are of these kinds and it is cheaper. The
gradients of all other parameters are dense, from the same backward passes. The result is exact
either way.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge

from raco_optim.gradients import PerLossGradients
from raco_optim.gradients.combine import LOW_PRECISION, as_scales, combination, grad_dtype
from raco_optim.gradients.dense import DenseGradients, DenseMode, Memory, iterate_gradients
from raco_optim.gradients.functions import gram_matrix
from raco_optim.gradients.graph import Lookup, Product, Uses, find_uses
from raco_optim.objectives import Batch, Gradient

_SLICE = 2**17


class Layer:
    """Inputs and output gradients of a weight, which represent its m gradients.

    Its products have inputs x, ``[N, a]``, and deltas, m times ``[N, b]``; its lookups have
    indices, ``[T]``, and deltas, m times ``[T, a]``. N or T may be 0.
    """

    def __init__(self, uses: Uses, deltas: Sequence[Gradient], weight: Tensor) -> None:
        dtype = next((d.dtype for row in deltas for d in row if d is not None), weight.dtype)
        self._empty = weight.new_empty(0, dtype=torch.float32 if dtype in LOW_PRECISION else dtype)
        self._uses, self._grad_dtype = uses, grad_dtype(weight)
        no_ids = weight.new_empty(0, dtype=torch.int64)
        self._ids = torch.cat([no_ids, *(use.ids for use in uses.lookups)])
        (b, a), k = _sizes(uses), len(uses.products)
        self._product_deltas = [self._deltas(uses.products, b, row[:k]) for row in deltas]
        self._lookup_deltas = [self._deltas(uses.lookups, a, row[k:]) for row in deltas]

    def gram(self) -> Tensor:
        """Returns the Gram matrix of the gradients, ``[m, m]``, float64."""
        # Float64, because the terms of a gradient may cancel, and twice in its square.
        x, looked_up = self._x().double(), torch.stack(self._lookup_deltas).double()
        m, n = len(self._product_deltas), len(x)
        kernel = (x @ x.T).expand(m, n, n)
        total = gram_matrix(list(_rows_once(self._ids, looked_up)))
        # In slices that stay in the cache.
        width = max(1, _SLICE // max(1, m * n))
        for parts in zip(*(torch.split(d, width, 1) for d in self._product_deltas), strict=True):
            part = torch.stack(parts).double()
            # Not `kernel @ part`, whose rows may differ for equal losses.
            total += _inner(torch.bmm(kernel, part), part)
        if len(self._ids):
            # Of the products' gradients, the rows that were looked up too.
            rows = torch.stack([d[:, self._ids].double().T @ x for d in self._product_deltas])
            mixed = _inner(rows, looked_up)
            total += mixed + mixed.T
        return (total + total.T) / 2

    @torch.no_grad()
    def combine(self, coefficients: Tensor) -> Tensor:
        """Returns the combination of the gradients with coefficients ``[m]``."""
        scales = as_scales(coefficients)
        x, delta = self._x(), combination(self._product_deltas, scales)
        left, right = (delta.T, x) if self._uses.transposed else (x.T, delta)
        # `out`, because autocast would round the factors of a product without it.
        combined = torch.mm(left, right, out=x.new_empty(len(left), right.shape[1]))
        combined = combined.view(self._uses.shape)
        if len(self._ids):
            combined.index_add_(0, self._ids, combination(self._lookup_deltas, scales))
        return combined.to(self._grad_dtype)

    def _x(self) -> Tensor:
        return self._joined(_sizes(self._uses)[1], [use.x() for use in self._uses.products])

    def _deltas(self, uses: Sequence[Product | Lookup], width: int, row: Gradient) -> Tensor:
        return self._joined(
            width,
            [
                self._empty.new_zeros(use.number, width) if delta is None else use.rows(delta)
                for use, delta in zip(uses, row, strict=True)
            ],
        )

    def _joined(self, width: int, parts: Sequence[Tensor]) -> Tensor:
        """Concatenates the rows of all uses, in the dtype of the computation."""
        parts = [part.to(self._empty.dtype) for part in parts]
        return parts[0] if len(parts) == 1 else torch.cat([self._empty.view(0, width), *parts])


@dataclass
class GhostGradients(DenseGradients):
    """The layers without gradients, and the gradients of all other parameters."""

    layers: dict[int, Layer] = field(kw_only=True)
    """By the position of their weight, a shared one, among the parameters."""

    def gram(self) -> Tensor:
        """See `PerLossGradients`."""
        gram = super().gram()
        for layer in self.layers.values():
            part = layer.gram()
            gram = gram.to(part.device, non_blocking=True) + part
        # If the terms of a gradient cancel to the last digits, the rest of the products may violate
        # |H_ij| <= |g_i| |g_j|.
        squares = gram.diagonal().clamp(min=0)
        bound = squares.sqrt()[:, None] * squares.sqrt()
        gram = torch.where(gram.abs() > (1 + 1e-12) * bound, gram.sign() * bound, gram)
        gram.diagonal().copy_(squares)
        return gram

    def combine(self, alpha: Tensor, weights: Tensor) -> Gradient:
        """See `PerLossGradients`."""
        combined = super().combine(alpha, weights)
        for j in list(self.layers):
            combined[j] = self.layers.pop(j).combine(alpha)
        return combined


class GhostMode(DenseMode):
    """Computes output gradients of shared layers for which that is cheaper, and the rest."""

    name = "ghost"

    def collect(self, batch: Batch) -> PerLossGradients:
        """Gathers the gradients of this call; dense where layers can't be found."""
        reasons = {
            "several processes": batch.group is not None,
            "micro-batches": batch.pending is not None,
            "callables": batch.tensors is None,
        }
        why = next((reason for reason, holds in reasons.items() if holds), None)
        self.ran = self.name if why is None else f"dense: {why}"
        return collect(batch, self._memory) if why is None else super().collect(batch)


def collect(batch: Batch, memory: Memory) -> GhostGradients:
    """Runs the backward passes; the losses are tensors."""
    losses, parameters, shared = batch.tensors, batch.parameters.tensors, batch.parameters.shared
    assert losses is not None
    try:
        found = {
            j: uses
            for j, uses in find_uses(losses, parameters).items()
            if shared[j] and _is_cheaper(uses)
        }
    except RuntimeError:  # a tensor was freed or changed; the backward pass raises an error
        found = {}
    plain = [p for j, p in enumerate(parameters) if j not in found]
    edges = [GradientEdge(node, 0) for used in found.values() for node in used.nodes]
    values: list[Tensor | None] = []
    rows: list[Gradient] = []
    deltas: list[Gradient] = []
    with _given_to([edge.node for edge in edges]) as given:
        passes = iterate_gradients(losses, plain, batch.names, edges, keep_graph=batch.retain_graph)
        for value, row in memory.passes(passes, len(losses)):
            values.append(value)
            gradients = iter(row)
            rows.append([None if j in found else next(gradients) for j in range(len(parameters))])
            deltas.append([given.get(k, g) for k, g in enumerate(gradients)])
            given.clear()
    layers, start = {}, 0
    for j, used in found.items():
        stop = start + len(used.nodes)
        parts = [row[start:stop] for row in deltas]
        if any(delta is not None for part in parts for delta in part):
            layers[j] = Layer(used, parts, parameters[j])
        start = stop
    return GhostGradients(values, rows, shared, memory=memory, layers=layers)


@contextmanager
def _given_to(nodes: Sequence[Any]) -> Iterator[dict[int, Tensor | None]]:
    """Collects the gradients that nodes receive in a backward pass, after hooks on tensors.

    Autograd returns the gradient of an edge without these hooks if it runs its node too.
    """
    given: dict[int, Tensor | None] = {}

    def keep(k: int, gradients: tuple[Tensor | None, ...]) -> None:
        given[k] = gradients[0]

    handles = [node.register_prehook(partial(keep, k)) for k, node in enumerate(nodes)]
    try:
        yield given
    finally:
        for handle in handles:
            handle.remove()


def _is_cheaper(uses: Uses) -> bool:
    """Returns whether deltas take less time than m gradients."""
    b, a = _sizes(uses)
    m, n, t = uses.losses, sum(u.number for u in uses.products), sum(u.number for u in uses.lookups)
    if not uses.products:
        return m * t < (m - 1) * b
    # Twice, because these products are in float64, at half the speed.
    return 2 * (n * (a + m * b) + m * t * a) < (m - 1) * a * b


def _sizes(uses: Uses) -> tuple[int, int]:
    """Returns b and a: the features of a product's output and of its input."""
    first, others = uses.shape[0], uses.shape[1:].numel()
    return (first, others) if uses.transposed else (others, first)


def _inner(a: Tensor, b: Tensor) -> Tensor:
    """Returns <a_i, b_j>, ``[m, m]``."""
    return a.flatten(1) @ b.flatten(1).T


def _rows_once(ids: Tensor, deltas: Tensor) -> Tensor:
    """Sums deltas ``[m, T, a]`` of one index; rows beyond the number of indices are zero."""
    if not len(ids):
        return deltas
    ordered, order = ids.sort()
    row = torch.cat([ids.new_zeros(1), (ordered.diff() != 0).cumsum(0)])
    return torch.zeros_like(deltas).index_add_(1, row, deltas[:, order])
