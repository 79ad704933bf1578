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

from collections.abc import Sequence
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn

from raco_optim.gradients import Gradient


class LinearLayerGradients:
    """Watches the linear layers of a model during a forward pass, for `gradients` afterwards.

    Use it as a context manager around the forward pass and the call of `gradients`: with
    non-reentrant checkpointing the layers run again in the backward pass, and are watched there.

    Args:
        model: The model; its first dimension is that of the examples.
        parameters: The trainable parameters, in the order of the gradients.

    Example:
        >>> import torch
        >>> from raco_optim.per_example import LinearLayerGradients
        >>> layer = torch.nn.Linear(2, 1, bias=False)
        >>> with LinearLayerGradients(layer, [layer.weight]) as layers:
        ...     z = layer(torch.tensor([[[1.0, 0.0]], [[0.0, 2.0]]])).sum((1, 2))
        ...     layers.gradients(z, [z[0], z.mean()])
        [[tensor([[1., 0.]])], [tensor([[0.5000, 1.0000]])]]
    """

    def __init__(self, model: nn.Module, parameters: Sequence[Tensor]) -> None:
        self._parameters = [p for p in parameters if p.requires_grad]
        self._positions = {id(p): j for j, p in enumerate(parameters) if p.requires_grad}
        owners: dict[int, list[nn.Module]] = {}
        for module in model.modules():
            for p in module.parameters(recurse=False):
                owners.setdefault(id(p), []).append(module)
        found = [owners.get(id(p), []) for p in self._parameters]
        self.covers = all(len(o) == 1 and type(o[0]) is nn.Linear for o in found)
        """Whether every parameter belongs to one linear layer and to nothing else."""
        self._layers = {layer for o in found for layer in o} if self.covers else set()
        self._known = [(p, p.requires_grad) for p in parameters]
        self._handles: list[Any] = []
        self._forget()

    def _forget(self) -> None:
        self._sensitivities: Tensor | None = None
        self._resolution = 0.0
        self._rows: list[Gradient] = []
        self._shapes: set[torch.Size] = set()

    def serve(self, parameters: Sequence[Tensor]) -> bool:
        """Whether the same parameters are trained as when this was made."""
        found = [(p, p.requires_grad) for p in parameters]
        return len(found) == len(self._known) and all(
            p is q and trained == was
            for (p, trained), (q, was) in zip(found, self._known, strict=True)
        )

    def __enter__(self) -> LinearLayerGradients:
        for layer in self._layers:
            # Before other hooks, which may change the output.
            self._handles.append(layer.register_forward_hook(self._watch, prepend=True))
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self._forget()

    def gradients(self, scalars: Tensor, losses: Sequence[Tensor | None]) -> list[Gradient] | None:
        r"""Returns one gradient per loss, by one backward pass.

        Args:
            scalars: z, ``[N]``, with the graph of the forward pass.
            losses: m losses with the graph of `scalars` behind them, on which alone they depend;
                None for an absent one.

        Returns:
            m lists, as `raco_optim.per_loss_gradients` does. None, with the graph intact, where
            that can't be: a parameter is outside the linear layers, a layer's output is not
            ``[N, tokens, features]``, or :math:`\nabla \sum_n z_n` from the layers is not what
            autograd says it is (a parameter was used outside its layer too, or has a hook).
        """
        present = [loss for loss in losses if loss is not None]
        per_example = all(len(s) == 3 and s[0] == len(scalars) for s in self._shapes)
        if not (self.covers and self._shapes and present and per_example):
            return None
        grad = torch.autograd.grad
        u = [grad(loss, scalars, retain_graph=True)[0] for loss in present]
        self._sensitivities = torch.stack([torch.ones_like(scalars), *u])
        self._rows = [[None] * len(self._known) for _ in self._sensitivities]
        total = grad(scalars.sum(), self._parameters, retain_graph=True, allow_unused=True)
        self._sensitivities = None
        of_total, *rows = self._rows
        if not self._equal([of_total[j] for j in self._positions.values()], total):
            return None
        found = iter(rows)
        return [[None] * len(self._known) if loss is None else next(found) for loss in losses]

    def _equal(self, a: Sequence[Tensor | None], b: Sequence[Tensor | None]) -> bool:
        if any((x is None) != (y is None) for x, y in zip(a, b, strict=True)):
            return False
        pairs = [(x, y) for x, y in zip(a, b, strict=True) if x is not None and y is not None]
        errors = torch.stack([torch.linalg.vector_norm(x - y) for x, y in pairs])
        norms = torch.stack([torch.linalg.vector_norm(y) for _, y in pairs])
        return bool((errors <= self._resolution**0.5 * norms).all())

    def _watch(self, layer: nn.Module, inputs: tuple[Tensor], output: Tensor) -> Tensor | None:
        if not (output.requires_grad and inputs):
            return None
        self._shapes.add(output.shape)
        watched: Tensor = _Watched.apply(  # type: ignore[no-untyped-call]
            output, inputs[0].detach(), layer, self
        )
        return watched

    def _add(self, layer: nn.Linear, x: Tensor, delta: Tensor) -> None:
        if self._sensitivities is None:  # an ordinary backward pass
            return
        u, x = self._sensitivities.to(delta.dtype), x.to(delta.dtype)
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
        part, earlier = part.to(parameter.dtype).contiguous(), self._rows[i][j]
        self._rows[i][j] = part if earlier is None else earlier + part


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
