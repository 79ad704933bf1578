r"""Stage 1 for losses of one scalar per example: one backward pass for any number of losses.

Where loss i is a function of the scalars :math:`z_1, \dots, z_N` of N examples that do not interact
(the log-probability of a completion, say), with :math:`u_{in} = \partial L_i / \partial z_n`,

.. math:: g_i = \sum_n u_{in} \nabla_\theta z_n.

For the weight of a linear layer :math:`y = W x + b` with inputs :math:`x_{nt}` and
:math:`\delta_{nt} = \partial z_n / \partial y_{nt}`, the part of :math:`g_i` is
:math:`\sum_{nt} u_{in} \delta_{nt} x_{nt}^\top`. One backward pass of :math:`\sum_n z_n` gives
every :math:`\delta`; the losses differ in the last product alone. For low-rank adapters (LoRA),
which are such layers and narrow, that product is next to nothing.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from raco_optim.gradients.combine import grad_dtype
from raco_optim.gradients.dense import DenseMode, Gather
from raco_optim.gradients.explain import explain
from raco_optim.objectives import Batch, Found, Gradient


class PerExampleMode(DenseMode):
    """Runs one backward pass for all losses where that is exact, else one for each."""

    name = "per_example"

    def __init__(
        self, model: nn.Module, parameters: Sequence[Tensor], gather: Gather | None = None
    ) -> None:
        super().__init__(gather)
        self._layers = LinearLayerGradients(model, parameters)

    def check(self, batch: Batch, *, accumulate: bool) -> None:
        """Raises unless there are scalars, wherever the losses share a forward pass."""
        z: Any = batch.through
        if batch.tensors is None and z is None:
            return
        if not isinstance(z, Tensor) or z.dim() != 1 or not z.requires_grad:
            got = f"shape {list(z.shape)}" if isinstance(z, Tensor) else type(z).__name__
            raise TypeError(
                f"`scalars` must be the tensor, of shape [N] and with a graph, that all losses are "
                f'computed from, which gradients="per_example" needs; got {got}'
                f"{' without a graph' if isinstance(z, Tensor) and not z.requires_grad else ''}."
            )

    def rows(self, batch: Batch) -> Iterator[Found]:
        """Yields value and gradient of one loss after the other."""
        losses, scalars = batch.tensors, batch.through
        self.ran = "dense: callables"
        if losses is not None and scalars is not None:
            found, why = self._layers.gradients(scalars, losses, batch.names)
            if found is not None:
                self.ran = self.name
                return zip([x if x is None else x.detach() for x in losses], found, strict=True)
            self.ran = f"dense: {why}"
        return super().rows(batch)


class LinearLayerGradients:
    """Watches the linear layers of a model, whose inputs and output gradients are all it needs.

    Forward hooks stay on the layers while this object lives: with non-reentrant checkpointing the
    layers run again in the backward pass, and are watched there too.

    Args:
        model: The model; its first dimension is that of the examples.
        parameters: The parameters, in the order of the gradients.

    Example:
        >>> import torch
        >>> from raco_optim.gradients.per_example import LinearLayerGradients
        >>> layer = torch.nn.Linear(2, 1, bias=False)
        >>> layers = LinearLayerGradients(layer, [layer.weight])
        >>> z = layer(torch.tensor([[[1.0, 0.0]], [[0.0, 2.0]]])).sum((1, 2))
        >>> layers.gradients(z, [z[0], z.mean()], ["a", "b"])[0]
        [[tensor([[1., 0.]])], [tensor([[0.5000, 1.0000]])]]
    """

    def __init__(self, model: nn.Module, parameters: Sequence[Tensor]) -> None:
        self._parameters = [p for p in parameters if p.requires_grad]
        self._positions = {id(p): j for j, p in enumerate(parameters) if p.requires_grad}
        self._number = len(parameters)
        owners: dict[int, list[nn.Module]] = {}
        for module in model.modules():
            for p in module.parameters(recurse=False):
                owners.setdefault(id(p), []).append(module)
        found = [owners.get(id(p), []) for p in self._parameters]
        # Whether every parameter belongs to one linear layer and to nothing else.
        self._covers = all(len(o) == 1 and type(o[0]) is nn.Linear for o in found)
        self._layers = {layer for o in found for layer in o} if self._covers else set()
        hook = _Hook(self)
        # Before other hooks, which may change the output.
        handles = [x.register_forward_hook(hook, prepend=True) for x in self._layers]
        weakref.finalize(self, _remove, handles)
        self._shapes: set[torch.Size] = set()
        self._forget()

    def _forget(self) -> None:
        self._sensitivities: Tensor | None = None
        self._resolution = 0.0
        self._rows: list[Gradient] = []

    def gradients(
        self, scalars: Tensor, losses: Sequence[Tensor | None], names: Sequence[str]
    ) -> tuple[list[Gradient] | None, str]:
        r"""Returns one gradient per loss, by one backward pass.

        Args:
            scalars: z, ``[N]``, with the graph of the forward pass.
            losses: m losses with the graph of `scalars` behind them; None for an absent one.
            names: Names of the losses.

        Returns:
            m lists, as `raco_optim.per_loss_gradients` does. None, with the graph intact, and the
            reason, where that can't be: a parameter is outside the linear layers, a layer's output
            is not ``[N, ..., features]``, a loss depends on more than the scalars, or
            :math:`\nabla \sum_n z_n` from the layers is not what autograd says it is (a parameter
            was used outside its layer too, or has a hook).
        """
        shapes, self._shapes = self._shapes, set()
        if not self._covers:
            return None, "a parameter is outside of torch.nn.Linear"
        if not shapes or any(len(s) < 2 or s[0] != len(scalars) for s in shapes):
            return None, "a layer's output is not [N, ..., features]"
        if any(loss is not None and _depends_on_more(loss, scalars) for loss in losses):
            return None, "a loss depends on more than the scalars"
        try:
            rows = self._rows_of(scalars, losses, names)
        finally:
            self._forget()
        if rows is None:
            return None, "a parameter is used outside its layer, or has a hook"
        found = iter(rows)
        return [[None] * self._number if x is None else next(found) for x in losses], ""

    def _rows_of(
        self, scalars: Tensor, losses: Sequence[Tensor | None], names: Sequence[str]
    ) -> list[Gradient] | None:
        u = [torch.ones_like(scalars)]
        for name, loss in zip(names, losses, strict=True):
            if loss is None:
                continue
            try:
                (of_loss,) = torch.autograd.grad(
                    loss, scalars, retain_graph=True, allow_unused=True
                )
            except Exception as error:
                explain(name, error)
                raise
            if of_loss is None:
                raise ValueError(
                    f"loss {name!r} must depend on `scalars`; it does not. Pass the tensor itself "
                    f"that all losses are computed from."
                )
            u.append(of_loss)
        self._sensitivities = torch.stack(u)
        self._rows = [[None] * self._number for _ in u]
        try:
            total = torch.autograd.grad(
                scalars.sum(), self._parameters, retain_graph=True, allow_unused=True
            )
        except Exception as error:
            explain(" + ".join(names), error)
            raise
        of_total, *rows = self._rows
        return rows if self._equal([of_total[j] for j in self._positions.values()], total) else None

    def _equal(self, a: Sequence[Tensor | None], b: Sequence[Tensor | None]) -> bool:
        if any((x is None) != (y is None) for x, y in zip(a, b, strict=True)):
            return False
        pairs = [(x, y) for x, y in zip(a, b, strict=True) if x is not None and y is not None]
        errors = torch.stack([torch.linalg.vector_norm(x - y) for x, y in pairs])
        norms = torch.stack([torch.linalg.vector_norm(y) for _, y in pairs])
        return bool((errors <= self._resolution**0.5 * norms).all())

    def watch(self, layer: nn.Module, inputs: tuple[Tensor], output: Tensor) -> Tensor | None:
        """Marks the output of a layer, if it has a graph."""
        if not (output.requires_grad and inputs and layer in self._layers):
            return None
        self._shapes.add(output.shape)
        watched: Tensor = _Watched.apply(  # type: ignore[no-untyped-call]
            output, inputs[0].detach(), layer, self
        )
        return watched

    def _add(self, layer: nn.Linear, x: Tensor, delta: Tensor) -> None:
        if self._sensitivities is None:  # an ordinary backward pass
            return
        u = self._sensitivities.to(delta.dtype)
        x, delta = (t.to(delta.dtype).reshape(len(t), -1, t.shape[-1]) for t in (x, delta))
        self._resolution = max(self._resolution, torch.finfo(delta.dtype).eps)
        wide, narrow = (x, delta) if delta.shape[-1] <= x.shape[-1] else (delta, x)
        # All losses in one product, which reads the wide factor once: [N, tokens, m, narrow].
        scaled = u.T[:, None, :, None] * narrow[:, :, None, :]
        products = scaled.flatten(0, 1).flatten(1).T @ wide.flatten(0, 1)
        for i, product in enumerate(products.view(len(u), narrow.shape[-1], -1)):
            self._sum(i, layer.weight, product if narrow is delta else product.T)
            if layer.bias is not None:
                self._sum(i, layer.bias, u[i] @ delta.sum(1))

    def _sum(self, i: int, parameter: Tensor, part: Tensor) -> None:
        j = self._positions.get(id(parameter))
        if j is None:
            return
        part, earlier = part.to(grad_dtype(parameter)).contiguous(), self._rows[i][j]
        self._rows[i][j] = part if earlier is None else earlier + part


class _Hook:
    """Calls `LinearLayerGradients.watch` while that lives; copies of the model get an inert one."""

    def __init__(self, watcher: LinearLayerGradients | None = None) -> None:
        self._watcher = None if watcher is None else weakref.ref(watcher)

    def __call__(self, layer: nn.Module, inputs: tuple[Tensor], output: Tensor) -> Tensor | None:
        watcher = self._watcher and self._watcher()
        return None if watcher is None else watcher.watch(layer, inputs, output)

    def __reduce__(self) -> tuple[type[_Hook], tuple[()]]:
        return _Hook, ()


def _remove(handles: list[Any]) -> None:
    for handle in handles:
        handle.remove()


def _depends_on_more(loss: Tensor, scalars: Tensor) -> bool:
    """Whether the loss reaches a leaf by a way that does not lead through the scalars."""
    if loss is scalars:
        return False
    end = (scalars.grad_fn, scalars.output_nr)
    stack, walked = [(loss.grad_fn, loss.output_nr)], set()
    while stack:
        edge = stack.pop()
        node: Any = edge[0]
        if node is None or edge == end or edge in walked:
            continue
        walked.add(edge)
        if hasattr(node, "variable") or node is end[0]:
            return True
        stack.extend(node.next_functions)
    return False


class _Watched(torch.autograd.Function):
    """The identity; its backward pass hands a layer's input and output gradient over.

    The input is saved by autograd, as the layer's own is, so that checkpointing drops and restores
    it.
    """

    @staticmethod
    def forward(
        ctx: Any,  # noqa: ANN401  # here and below: of autograd
        output: Tensor,
        x: Tensor,
        layer: nn.Linear,
        watcher: LinearLayerGradients,
    ) -> Tensor:
        ctx.save_for_backward(x)
        ctx.layer, ctx.watcher = layer, watcher
        ctx.mark_dirty(output)  # the same tensor, which the model may change in place
        return output

    @staticmethod
    def backward(ctx: Any, delta: Tensor) -> tuple[Tensor, None, None, None]:  # noqa: ANN401
        (x,) = ctx.saved_tensors
        ctx.watcher._add(ctx.layer, x, delta)
        return delta, None, None, None
