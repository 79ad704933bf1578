"""Marks the outputs of layers in the graph, and finds these marks."""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.autograd.graph import GradientEdge
from torch.utils.hooks import RemovableHandle

from raco_optim.gradients.graph import walk_graph
from raco_optim.gradients.per_example.layers import Kind, definition, input_of, kind_of

# All marks lead to this number: computing its gradient runs all marks and nothing else.
ANCHOR = torch.zeros((), device="cpu", requires_grad=True)
# Nodes that pass a weight on to the one that uses it.
_PASSES_ON = {"TBackward0", "ToCopyBackward0", "ViewBackward0", "TransposeBackward0"}


def watch(owner: object, model: nn.Module, parameters: Sequence[Tensor]) -> None:
    """Marks the outputs of a model's layers with forward hooks, while `owner` lives.

    The hooks remain between steps, because non-reentrant checkpointing runs the layers again in the
    backward pass.
    """
    trained = {id(p) for p in parameters}
    handles = []
    for layer in model.modules():
        own: dict[str, Tensor] = dict(layer.named_parameters(recurse=False))
        if not any(id(p) in trained for p in own.values()):
            continue
        # Before other hooks, which may change the output.
        hook = _Hook(list(own))
        handles.append(layer.register_forward_hook(hook, prepend=True, with_kwargs=True))
    weakref.finalize(owner, _remove, handles)


def _remove(handles: list[Any]) -> None:
    for handle in handles:
        handle.remove()


class _Hook:
    """Marks the output of a layer; a copied model gets a hook without effect."""

    def __init__(self, names: Sequence[str] = ()) -> None:
        self._names = names
        self._made: Any = None
        self._kind: Kind | None = None

    def __call__(
        self,
        layer: nn.Module,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        output: Any,  # noqa: ANN401
    ) -> Tensor | None:
        if not self._names or _is_transformed():
            return None
        own: dict[str, Any] = {name: layer._parameters.get(name) for name in self._names}
        if not all(type(p) is nn.Parameter for p in own.values()):
            return None  # functional_call
        if type(output) is not Tensor or not output.requires_grad:
            return None
        x = input_of(layer, args, kwargs, output)
        if type(x) not in (Tensor, nn.Parameter) or not any(p.requires_grad for p in own.values()):
            return None
        # Another hook may come first, or another optimizer may have marked the output.
        first = next(iter(layer._forward_hooks.values()), None)
        if not isinstance(first, _Hook) or getattr(output.grad_fn, "layer", None) is layer:
            return None
        # With FSDP2, parameters are whole only in a forward pass, when layers can be tried.
        made = definition(layer)
        if made != self._made:
            self._made, self._kind = made, kind_of(layer)
        if self._kind is None:
            return None
        # A bias needs no input, which the model may change in place.
        saved = x.detach() if own["weight"].requires_grad else None
        marked: Tensor = Mark.apply(output, saved, ANCHOR, layer, (self._kind, own))  # type: ignore[no-untyped-call]
        return marked

    def __reduce__(self) -> tuple[type[_Hook], tuple[()]]:
        return _Hook, ()


def _is_transformed() -> bool:
    """Whether something other than an ordinary backward pass will use the output."""
    traced = torch.compiler.is_compiling() or torch._C._get_tracing_state() is not None
    functional = torch._C._are_functorch_transforms_active()  # vmap, torch.func.grad, ...
    return traced or functional or forward_ad._current_level >= 0


class Mark(torch.autograd.Function):
    """The identity; its backward pass gives x and delta to the running pass, if any.

    Autograd saves the input like the layer's own, so checkpointing drops and restores it.
    """

    @staticmethod
    def forward(
        ctx: Any,  # noqa: ANN401  # here and below: of autograd
        output: Tensor,
        x: Tensor | None,
        anchor: Tensor,
        layer: nn.Module,
        rule: tuple[Kind, dict[str, Tensor]],
    ) -> Tensor:
        """Returns the output unchanged."""
        ctx.save_for_backward(x)
        ctx.hook = RemovableHandle.next_id
        ctx.layer, (ctx.kind, ctx.parameters) = layer, rule
        ctx.shape = output.shape
        if output._is_view():
            # Marking a view would copy it. Layers with such outputs don't save them.
            return output.data
        ctx.mark_dirty(output)  # returns the same tensor, which the model may change in place
        return output

    @staticmethod
    def backward(ctx: Any, delta: Tensor) -> tuple[Tensor, None, None, None, None]:  # noqa: ANN401
        """Returns delta unchanged."""
        run = getattr(ctx, "run", None)  # None in an ordinary backward pass
        if run is not None:
            (x,) = ctx.saved_tensors
            for name, p in ctx.parameters.items():
                run(p, lambda name=name: ctx.kind(name, ctx.layer, x, delta))
        return delta, None, None, None, None


class Hidden(Protocol):
    """Replaces, during a pass, a function that computes its weights' gradients itself."""

    positions: ClassVar[dict[str, int]]
    """Name of a parameter -> its position among the inputs."""

    @staticmethod
    def backward(ctx: Any, delta: Tensor, *_: object) -> tuple[Tensor | None, ...]:  # noqa: ANN401
        """As the function's, but passes parts to ``ctx.run``; ``ctx.owners``: a row's example."""


HIDDEN: dict[type, type[Hidden]] = {}
"""Functions of other libraries that hide a layer -> their replacement."""


@dataclass
class Uses:
    """Marks and parameters in a graph."""

    marks: list[Any] = field(default_factory=list)
    of: Counter[int] = field(default_factory=Counter)
    """Number of operations that use a parameter."""
    nodes: Counter[str] = field(default_factory=Counter)
    """Number of nodes of each kind."""
    picks: list[Any] = field(default_factory=list)
    """Nodes that pick rows by their index."""


def find_uses(root: Any) -> Uses:  # noqa: ANN401  # a node of autograd
    """Walks the graph once, in about 2 us per node."""
    uses = Uses()
    for node in walk_graph(root, set()):
        name = node.name()
        uses.nodes[name] += 1
        if name in ("IndexBackward0", "IndexSelectBackward0"):
            uses.picks.append(node)
        kind = getattr(node, "_forward_cls", None)
        if kind is Mark:
            uses.marks.append(node)
        elif kind in HIDDEN:
            inputs = node.next_functions
            leaves = {n: leaf_of(inputs[k][0]) for n, k in HIDDEN[kind].positions.items()}
            node.parameters = {n: p for n, p in leaves.items() if p is not None}
            if "weight" in node.parameters:
                uses.marks.append(node)
        if name not in _PASSES_ON:
            found = [leaf_of(child) for child, _ in node.next_functions]
            uses.of.update(id(leaf) for leaf in found if leaf is not None)
    return uses


def reorders(node: Any, number: int) -> bool:  # noqa: ANN401
    """Returns whether a node of `Uses.picks` puts the rows of all examples into another order."""
    if node._saved_self_sym_sizes[0] != number or getattr(node, "_saved_dim", 0) != 0:
        return False
    index = node._saved_index if hasattr(node, "_saved_dim") else node._saved_indices[0]
    if index is None or index.shape != (number,):
        return False
    return not torch.equal(index, torch.arange(number, device=index.device))


def leaf_of(node: Any) -> Tensor | None:  # noqa: ANN401
    """Returns the leaf of a node, or the leaf that it passes on."""
    while node is not None and node.name() in _PASSES_ON:
        [(node, _)] = node.next_functions
    leaf: Tensor | None = getattr(node, "variable", None)
    return leaf


def fits(mark: Any, scalars: Tensor) -> bool:  # noqa: ANN401
    """Returns whether each row of the layer belongs to one example."""
    number = len(scalars)
    if mark._forward_cls is Mark:
        return len(mark.shape) > 1 and mark.shape[0] == number
    if mark.next_functions[0][0] is None:  # nothing before it is trained, and no anchor
        return False
    # The example of a row: the gradient of sum_n n z_n divided by the gradient of sum_n z_n.
    v = torch.arange(1, number + 1, device=scalars.device, dtype=scalars.dtype)
    of_sum, of_numbers = (
        torch.autograd.grad(scalars, [GradientEdge(mark, 0)], x, retain_graph=True)[0]
        for x in (torch.ones_like(v), v)
    )
    owners = torch.where(of_sum == 0, 0, (of_numbers / of_sum).round())
    mark.owners, mark.number = owners.long() - 1, number
    return torch.allclose(owners * of_sum, of_numbers, rtol=1e-4) and not bool(
        ((of_sum == 0) & (of_numbers != 0)).any()
    )
