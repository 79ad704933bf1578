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

from raco_optim.gradients import Gather
from raco_optim.gradients.combine import grad_dtype
from raco_optim.gradients.dense import DenseMode
from raco_optim.gradients.explain import explain
from raco_optim.objectives import Batch, Found, Gradient

_NOT_WATCHED = "no layer was watched in this forward pass, or parameters changed after it"
_OTHER_SHAPE = "a layer's output is not [N, ..., features]"
_USED_OTHERWISE = "a parameter is used outside its layer, or has a hook"
_INTERACT = "examples interact, or a hook changes gradients"
# A gradient from the layers and one from autograd differ by rounding: by less than this, or than
# so many units in the last place of the whole gradient, where a part of it should be zero.
_TOLERANCE, _UNITS = 0.01, 32


class PerExampleMode(DenseMode):
    """Runs one backward pass for all losses where that is exact, else one for each."""

    name = "per_example"

    def __init__(
        self, model: nn.Module, parameters: Sequence[Tensor], gather: Gather | None = None
    ) -> None:
        super().__init__(gather)
        self._layers = LinearLayerGradients(model, parameters)

    def check(self, batch: Batch, *, accumulate: bool) -> None:
        """Raises unless there are scalars, wherever the losses are tensors."""
        z: Any = batch.through
        if z is None and (batch.tensors is None or not any(x is not None for x in batch.losses)):
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
        why = "callables" if losses is None else "all losses are absent"
        if scalars is not None and losses is not None and any(x is not None for x in losses):
            found, why = self._layers.gradients(scalars, losses, batch.names)
            if found is not None:
                self.ran = self.name
                values = [None if x is None else x.detach().clone() for x in losses]
                return zip(values, found, strict=True)
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
        self._modules = list(model.modules())
        self._trusted: list[bool] | None = None
        # Of the outputs in the forward passes since gradients were computed, or before.
        self._shapes: set[torch.Size] = set()
        self._served = False
        self._forget()

    def _forget(self) -> None:
        self._sensitivities: Tensor | None = None
        self._scales = torch.empty(0)
        self._resolution = 0.0
        self._fits = True
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
            is not ``[N, ..., features]``, a loss depends on more than the scalars, or the layers'
            :math:`\nabla \sum_n z_n` is not that of autograd (a parameter is used outside its
            layer too, or has a hook). At first, and whenever layers change between training and
            evaluation, one more pass compares :math:`\nabla \sum_n v_n z_n` for other v: it tells
            whether examples interact, as in batch normalization.
        """
        self._served = True
        if not self._covers:
            return None, "a parameter is outside of torch.nn.Linear"
        if not self._shapes:
            return None, _NOT_WATCHED
        if not any(_is_per_example(shape, len(scalars)) for shape in self._shapes):
            return self._distrusted(_OTHER_SHAPE)
        if any(loss is not None and _depends_on_more(loss, scalars) for loss in losses):
            return None, "a loss depends on more than the scalars"
        try:
            rows, why = self._rows_of(scalars, losses, names)
        finally:
            self._forget()
        if rows is None:
            return self._distrusted(why)
        found = iter(rows)
        return [[None] * self._number if x is None else next(found) for x in losses], ""

    def _distrusted(self, why: str) -> tuple[None, str]:
        self._trusted = None
        return None, why

    def _rows_of(
        self, scalars: Tensor, losses: Sequence[Tensor | None], names: Sequence[str]
    ) -> tuple[list[Gradient] | None, str]:
        modes = [module.training for module in self._modules]
        # Uneven, so that neither examples that change places nor a clamped gradient go unseen.
        v = torch.arange(1.0, len(scalars) + 1, device=scalars.device).cos().to(scalars.dtype)
        tests = [torch.ones_like(v)] if modes == self._trusted else [torch.ones_like(v), v]
        u = list(tests)
        for name, loss in zip(names, losses, strict=True):
            if loss is not None:
                (of_loss,) = _grad(name, loss, [scalars])
                if of_loss is None:
                    raise ValueError(
                        f"loss {name!r} must depend on `scalars`; it does not. Pass the tensor "
                        f"itself that all losses are computed from."
                    )
                u.append(of_loss)
        everything = " + ".join(names)
        sensitivities = torch.stack(u)
        # At most 1, so that float16 holds them whatever the scale of the losses.
        largest = sensitivities.abs().amax(1).to(torch.promote_types(v.dtype, torch.float32))
        exponents = torch.frexp(largest).exponent.clamp(-126, 126)
        self._scales = torch.ldexp(torch.ones_like(largest), exponents)
        self._sensitivities = sensitivities / self._scales[:, None]
        self._rows = [[None] * self._number for _ in u]
        trained = self._parameters
        total = _grad(everything, scalars, trained, torch.ones_like(scalars))
        self._sensitivities = None
        if not self._fits:
            return None, _OTHER_SHAPE
        errors, norms = self._compare(self._rows[0], total)
        tolerance, whole = self._resolution**0.5, norms.norm()
        allowed = min(tolerance, _TOLERANCE) * norms
        allowed += _UNITS * min(self._resolution, 2.0**-23) * whole
        if not bool((errors <= allowed).all() & (whole > 0)):
            return None, _USED_OTHERWISE
        if len(tests) > 1:
            errors, norms = self._compare(self._rows[1], _grad(everything, scalars, trained, v))
            # Two passes, parts of which (norms, softmax) may be of float32 whatever the layers are.
            allowed = max(tolerance, 2**-11.5) * torch.maximum(norms.norm(), whole)
            if not bool(errors.norm() <= allowed):
                return None, _INTERACT
            self._trusted = modes
        return self._rows[len(tests) :], ""

    def _compare(self, row: Gradient, true: Sequence[Tensor | None]) -> tuple[Tensor, Tensor]:
        """Returns norms of the errors and of the true gradients, one for each parameter."""
        errors, norms = [], []
        for j, y in zip(self._positions.values(), true, strict=True):
            x, y = (self._scales.new_zeros(()) if g is None else g for g in (row[j], y))
            errors.append(torch.linalg.vector_norm(x - y))
            norms.append(torch.linalg.vector_norm(y))
        return torch.stack(errors), torch.stack(norms)

    def watch(self, layer: nn.Module, inputs: tuple[Tensor], output: Tensor) -> Tensor | None:
        """Marks the output of a layer, if it has a graph."""
        if not (output.requires_grad and inputs):
            return None
        if self._served:
            self._shapes, self._served = set(), False
        self._shapes.add(output.shape)
        x = inputs[0].detach() if id(layer.weight) in self._positions else None
        watched: Tensor = _Watched.apply(output, x, layer, self)  # type: ignore[no-untyped-call]
        return watched

    def add(self, layer: nn.Linear, x: Tensor | None, delta: Tensor) -> None:
        """Adds a layer's part of all gradients, if they are being computed."""
        u = self._sensitivities
        if u is None:  # an ordinary backward pass
            return
        if not _is_per_example(delta.shape, u.shape[1]):
            self._fits = False
            return
        self._resolution = max(self._resolution, torch.finfo(delta.dtype).eps)
        delta = delta.reshape(len(delta), -1, delta.shape[-1])
        if id(layer.bias) in self._positions:
            sums = delta.sum(1, dtype=torch.promote_types(delta.dtype, torch.float32))
            self._sum(layer.bias, u.to(sums.dtype) @ sums)
        if x is None:
            return
        x = x.to(delta.dtype).reshape(len(x), -1, x.shape[-1])
        wide, narrow = (x, delta) if delta.shape[-1] <= x.shape[-1] else (delta, x)
        # All losses in one product, which reads the wide factor once: [N, tokens, m, narrow].
        scaled = u.T[:, None, :, None].to(delta.dtype) * narrow[:, :, None, :]
        products = scaled.flatten(0, 1).flatten(1).T @ wide.flatten(0, 1)
        products = products.view(len(u), narrow.shape[-1], -1)
        self._sum(layer.weight, products if narrow is delta else products.mT)

    def _sum(self, parameter: Tensor, parts: Tensor) -> None:
        j = self._positions[id(parameter)]
        scales = self._scales.view(-1, *[1] * parameter.dim())
        parts = parts.to(grad_dtype(parameter))
        for row, part in zip(self._rows, parts * scales.to(parts.dtype), strict=True):
            earlier = row[j]
            row[j] = part.contiguous() if earlier is None else earlier + part


def _is_per_example(shape: torch.Size, number: int) -> bool:
    return len(shape) > 1 and shape[0] == number


class _Hook:
    """Calls `LinearLayerGradients.watch` while that lives; copies of the model get an inert one."""

    def __init__(self, watcher: LinearLayerGradients | None = None) -> None:
        self._watcher = None if watcher is None else weakref.ref(watcher)

    def __call__(self, layer: nn.Module, inputs: tuple[Tensor], output: Tensor) -> Tensor | None:
        watcher = None if self._watcher is None else self._watcher()
        return None if watcher is None else watcher.watch(layer, inputs, output)

    def __reduce__(self) -> tuple[type[_Hook], tuple[()]]:
        return _Hook, ()


def _remove(handles: list[Any]) -> None:
    for handle in handles:
        handle.remove()


def _grad(
    name: str, output: Tensor, inputs: Sequence[Tensor], weights: Tensor | None = None
) -> tuple[Tensor | None, ...]:
    try:
        return torch.autograd.grad(output, inputs, weights, retain_graph=True, allow_unused=True)
    except Exception as error:
        explain(name, error)
        raise


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
        if hasattr(node, "variable"):
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
        x: Tensor | None,
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
        ctx.watcher.add(ctx.layer, x, delta)
        return delta, None, None, None
