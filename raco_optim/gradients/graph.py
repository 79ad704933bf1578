"""Finds the uses of a model's weights in the autograd graph of its losses."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.graph import get_gradient_edge

# Node of the graph -> position of the weight among its inputs.
_WEIGHT_INPUT = {
    "AddmmBackward0": 2,
    "MmBackward0": 1,
    "ConvolutionBackward0": 1,
    "EmbeddingBackward0": 0,
}
# Node that passes a weight on -> whether it transposes it.
_PASSES_ON = {"TBackward0": True, "ToCopyBackward0": False}

_Consumers = dict[Any, list[tuple[Any, int]]]


@dataclass(frozen=True)
class Product:
    """A use of a weight as :math:`y = x W^T`, with x ``[N, a]``, or an image to unfold to x."""

    node: Any
    saved: Tensor
    number: int
    unfold: dict[str, Any] | None = None

    def x(self) -> Tensor:
        """Returns the inputs, ``[N, a]``."""
        if self.unfold is None:
            return self.saved
        image = self.saved if self.saved.dim() == 4 else self.saved.unsqueeze(2)
        return F.unfold(image, **self.unfold).transpose(1, 2).flatten(0, 1)

    def rows(self, delta: Tensor) -> Tensor:
        """Returns the gradient of the output as ``[N, b]``."""
        return delta if self.unfold is None else delta.flatten(2).transpose(1, 2).flatten(0, 1)


@dataclass(frozen=True)
class Lookup:
    """A use of a weight as a table of embeddings; `padding` is the index without a gradient."""

    node: Any
    ids: Tensor
    number: int
    padding: int | None

    def rows(self, delta: Tensor) -> Tensor:
        """Returns the gradient of the output as ``[N, b]``."""
        rows = delta.reshape(self.number, -1)
        if self.padding is None:
            return rows
        return rows.masked_fill((self.ids == self.padding)[:, None], 0)


@dataclass
class Uses:
    """All uses of one weight, and the number of losses that reach it."""

    shape: torch.Size
    losses: int
    transposed: bool = False
    """Whether the weight is stored as ``[b, a]``, as in `torch.nn.Linear`, or as ``[a, b]``."""
    products: list[Product] = field(default_factory=list)
    lookups: list[Lookup] = field(default_factory=list)

    @property
    def nodes(self) -> list[Any]:
        """The nodes of the products, then of the lookups."""
        return [*(use.node for use in self.products), *(use.node for use in self.lookups)]


@torch.inference_mode(mode=False)  # which hides nodes
def find_uses(losses: Sequence[Tensor | None], parameters: Sequence[Tensor]) -> dict[int, Uses]:
    """Finds parameters, by position, that are used only in products and lookups.

    These are linear layers, convolutions in one and two dimensions without groups, and embeddings,
    also under autocast. Parameters behind an opaque node (a compiled region, a custom function) are
    left out, and so are parameters with a hook, which only an ordinary gradient runs.
    """
    consumers, reached = _walk(
        [None if loss is None else get_gradient_edge(loss).node for loss in losses]
    )
    found = {}
    for j, p in enumerate(parameters):
        # In float16 the gradient may overflow although its inputs do not.
        if not p.requires_grad or p._backward_hooks or p.dtype == torch.float16:
            continue
        leaf = get_gradient_edge(p).node
        uses = Uses(p.shape, reached.get(leaf, 0).bit_count())
        if leaf in consumers and _add_uses(uses, leaf, consumers, transposed=False):
            found[j] = uses
    return found


def walk_graph(root: Any, walked: set[Any]) -> list[Any]:  # noqa: ANN401  # a node of autograd
    """Returns the nodes behind a node, except those in `walked`, and adds them to it."""
    nodes = [] if root is None or root in walked else [root]
    walked.update(nodes)
    for node in nodes:  # the list grows
        for child, _ in node.next_functions:
            if child is not None and child not in walked:
                walked.add(child)
                nodes.append(child)
    return nodes


def _walk(roots: Sequence[Any]) -> tuple[_Consumers, dict[Any, int]]:
    """Returns the consumers of each node's output, and as bits the roots that reach it."""
    reached: dict[Any, int] = {}
    for i, root in enumerate(roots):
        if root is not None:
            reached[root] = reached.get(root, 0) | 1 << i
    # A loss may be a weight; then the graph has no consumer of it.
    consumers: _Consumers = {root: [(None, 0)] for root in reached}
    stack = list(consumers)
    while stack:
        node = stack.pop()
        for position, (child, _) in enumerate(node.next_functions):
            if child is None:
                continue
            if child not in consumers:
                consumers[child] = []
                stack.append(child)
            consumers[child].append((node, position))
    # A node has a higher sequence number than its inputs; leaves have none.
    for node in sorted(consumers, key=lambda x: (not x.next_functions, -x._sequence_nr())):
        for consumer, _ in consumers[node]:
            if consumer is not None:
                reached[node] = reached.get(node, 0) | reached[consumer]
    return consumers, reached


def _add_uses(uses: Uses, node: Any, consumers: _Consumers, *, transposed: bool) -> bool:  # noqa: ANN401
    """Adds the uses of the weight that `node` passes on; False if one has an unknown kind."""
    for consumer, position in consumers[node]:
        if consumer is None or _has_hooks(consumer):
            return False
        name = consumer.name()
        if name in _PASSES_ON:
            turned = transposed ^ _PASSES_ON[name]
            if not _add_uses(uses, consumer, consumers, transposed=turned):
                return False
        elif _WEIGHT_INPUT.get(name) != position or not _add_use(uses, consumer, name, transposed):
            return False
    return True


def _has_hooks(node: Any) -> bool:  # noqa: ANN401
    """Returns whether hooks of the node may change gradients, which its output doesn't show."""
    found = False
    for register in (node.register_hook, node.register_prehook):
        handle = register(lambda *_: None)
        hooks = handle.hooks_dict_ref()  # all of the node's of this kind
        found |= hooks is None or len(hooks) > 1
        handle.remove()
    return found


def _add_use(uses: Uses, node: Any, name: str, transposed: bool) -> bool:  # noqa: ANN401
    # A flat kernel and a table are stored as [b, a].
    is_kept = name in ("EmbeddingBackward0", "ConvolutionBackward0")
    use = None if is_kept and transposed else _use(node, name, uses.shape)
    transposed |= is_kept
    if use is None or (uses.nodes and uses.transposed != transposed):
        return False
    uses.transposed = transposed
    if isinstance(use, Lookup):
        uses.lookups.append(use)
    else:
        uses.products.append(use)
    return True


def _use(node: Any, name: str, shape: torch.Size) -> Product | Lookup | None:  # noqa: ANN401
    if name == "EmbeddingBackward0":
        if node._saved_sparse or node._saved_scale_grad_by_freq:
            return None
        padding = node._saved_padding_idx  # 2^64 - 1 for none
        ids = node._saved_indices.flatten()
        return Lookup(node, ids, len(ids), padding if padding < shape[0] else None)
    if name == "ConvolutionBackward0":
        return _convolution(node, shape)
    if name == "AddmmBackward0" and node._saved_alpha != 1:
        return None
    x = (node._saved_mat1 if name == "AddmmBackward0" else node._saved_self).detach()
    plain = x.layout == torch.strided and not x.is_complex()
    return Product(node, x, len(x)) if plain else None


def _convolution(node: Any, shape: torch.Size) -> Product | None:  # noqa: ANN401
    if node._saved_transposed or node._saved_groups != 1:
        return None
    image = node._saved_input.detach()
    if image.dim() not in (3, 4) or image.dim() != len(shape) or image.is_complex():
        return None
    missing = 4 - image.dim()  # one dimension is two, the first of length 1
    stride = [1] * missing + [*node._saved_stride]
    padding = [0] * missing + [*node._saved_padding]
    dilation = [1] * missing + [*node._saved_dilation]
    kernel = [1] * missing + [*shape[2:]]
    size = [1] * missing + [*image.shape[2:]]
    positions = math.prod(
        (n + 2 * p - d * (k - 1) - 1) // s + 1
        for n, p, d, k, s in zip(size, padding, dilation, kernel, stride, strict=True)
    )
    unfold = {"kernel_size": kernel, "dilation": dilation, "padding": padding, "stride": stride}
    return Product(node, image, len(image) * positions, unfold)
