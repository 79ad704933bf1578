"""Stage 1: losses -> one gradient per loss, as lists of per-parameter tensors."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge

from raco_optim._checks import as_list, check_any_present

Loss = Tensor | Callable[[], Tensor]
Gradient = list[Tensor | None]
Found = tuple[Tensor | None, Gradient]
"""Value and gradient of a loss; None for the value of an absent one."""

_A_PARAMETER = (
    "a parameter of the optimizer; it reaches none. Was the optimizer built from this model's "
    "parameters? Pass None for a loss that is absent from this batch."
)
# Selective checkpoints, and those of torch.distributed._composable.
_ONLY_ONCE = (
    "This activation checkpoint can be computed again only once: pass the losses as callables, "
    "each with its own forward pass."
)
_REMEDIES = (
    (
        "second time",
        "An earlier backward pass freed the graph: compute the losses anew.",
    ),
    (
        "donated buffer",
        "A compiled model frees its buffers in the first of several backward passes: set "
        "`torch._functorch.config.donated_buffer = False` before its first call, or pass the "
        "losses as callables, each with its own forward pass.",
    ),
    ("only allowed to backward once", _ONLY_ONCE),
    ("_GeneratorContextManager", _ONLY_ONCE),
    (
        "use_reentrant",
        "Call `torch.utils.checkpoint.checkpoint(..., use_reentrant=False)`.",
    ),
)


def per_loss_gradients(
    losses: Iterable[Loss | None], parameters: Iterable[Tensor]
) -> list[Gradient]:
    r"""Computes the gradient of every loss with respect to every parameter.

    .. math:: g_i = \nabla_\theta L_i, \quad i = 1, \dots, m

    The gradients stay lists of per-parameter tensors and are never copied into one
    ``[m, n]`` matrix. The last backward pass frees the graph; with callables each graph is
    freed before the next forward pass. ``.grad`` is neither read nor written, so hooks on the
    accumulation of ``.grad`` (those of DistributedDataParallel among them) do not run.

    Args:
        losses: m scalar tensors that share a graph or not, or callables without arguments that
            return one, evaluated one at a time; None stands for a loss that is absent from this
            batch and has a zero gradient.
        parameters: Leaf tensors, real, on one device. Frozen ones are passed over.

    Returns:
        m lists, one tensor per parameter in its shape and dtype, or None where the loss does not
        reach the parameter.

    Raises:
        TypeError: A loss is neither a tensor nor a callable nor None.
        ValueError: A loss is not a scalar, is complex, has no graph or reaches no parameter; all
            losses are None; no parameter is trainable, or one is complex; devices differ; a
            gradient is sparse.
        RuntimeError: A backward pass failed, or reentrant activation checkpointing hid
            parameters from it. The message names the loss and the remedy.

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
    names, chosen = [str(i) for i in range(len(ordered))], list(parameters)
    check_losses(ordered, chosen, names)
    return [gradient for _, gradient in iterate_gradients(ordered, chosen, names)]


def iterate_gradients(
    losses: Sequence[Loss | None],
    parameters: Sequence[Tensor],
    names: Sequence[str],
    edges: Sequence[GradientEdge] = (),
    *,
    keep_graph: bool = False,
    needed: str | None = _A_PARAMETER,
) -> Iterator[Found]:
    """Yields value and gradient of one loss after the other; see `per_loss_gradients`.

    `check_losses` is the caller's part. Behind the gradients of the parameters come those of
    `edges` of the losses' graph. `needed` says what a loss that reaches none of them was to depend
    on, and the remedy; None allows it.
    """
    trainable = [p for p in parameters if p.requires_grad]
    last_tensor = max((i for i, loss in enumerate(losses) if isinstance(loss, Tensor)), default=-1)
    last_callable = max(
        (i for i, loss in enumerate(losses) if callable(loss) and not isinstance(loss, Tensor)),
        default=-1,
    )
    walked: set[Any] = set()
    for i, (name, loss) in enumerate(zip(names, losses, strict=True)):
        if loss is None:
            yield None, [None] * (len(parameters) + len(edges))
            continue
        if isinstance(loss, Tensor):
            value = loss.detach().clone()
            retain = keep_graph or i < last_tensor
            found = _gradient(name, loss, trainable, edges, walked, retain=retain, needed=needed)
        else:
            value, found = _evaluate(name, loss, trainable)
        if i < last_callable:
            # The next callable may refill a buffer that a custom function returned as gradient.
            found = [None if g is None else g.clone() for g in found]
        reached = iter(found)
        row = [next(reached) if p.requires_grad else None for p in parameters]
        row.extend(reached)
        # What the caller frees of the row is to be free during the next backward pass.
        del found, reached
        yield value, row


def check_losses(
    losses: Sequence[Loss | None], parameters: Sequence[Tensor], names: Sequence[str]
) -> None:
    """Raises unless parameters and losses are what they must be, as far as no pass can tell.

    It is called before the first backward pass, so that a bad tensor costs nothing.
    """
    _check_parameters(parameters)
    for name, loss in zip(names, losses, strict=True):
        if isinstance(loss, Tensor):
            check_loss(name, loss, parameters)
        elif loss is not None and not callable(loss):
            raise TypeError(
                f"loss {name!r} must be a scalar tensor, a callable that returns one, or None; "
                f"got {type(loss).__name__}."
            )


def failed_pass(name: str, error: Exception) -> RuntimeError:
    """Returns what to raise where the backward pass of a loss failed."""
    remedies = [remedy for symptom, remedy in _REMEDIES if symptom in str(error)]
    return RuntimeError(
        " ".join([f"the backward pass of loss {name!r} failed: {error}", *remedies])
    )


def _evaluate(
    name: str, loss: Callable[[], Tensor], trainable: list[Tensor]
) -> tuple[Tensor, Gradient]:
    # In a function of its own, so that nothing of the graph outlives the call.
    with torch.enable_grad():
        value = loss()
    check_loss(name, value, trainable)
    return value.detach().clone(), _gradient(name, value, trainable, (), set(), retain=False)


def _gradient(
    name: str,
    loss: Tensor,
    trainable: Sequence[Tensor],
    edges: Sequence[GradientEdge],
    walked: set[Any],
    *,
    retain: bool,
    needed: str | None = _A_PARAMETER,
) -> Gradient:
    inputs: Any = (*trainable, *edges)
    try:
        gradient: Gradient = list(
            torch.autograd.grad(loss, inputs, retain_graph=retain, allow_unused=True)
        )
    except RuntimeError as error:
        raise failed_pass(name, error) from error
    if any(g is None for g in gradient):
        _check_no_reentrant_checkpoint(name, loss, walked)
    if needed is not None and all(g is None for g in gradient):
        raise ValueError(f"loss {name!r} must depend on {needed}")
    for p, g in zip(trainable, gradient, strict=False):
        if g is not None and g.layout != torch.strided:
            raise ValueError(
                f"gradients must be dense; loss {name!r} has a {g.layout} gradient for the "
                f"parameter of shape {list(p.shape)}. Build the embedding with sparse=False."
            )
    return gradient


def _check_parameters(parameters: Sequence[Tensor]) -> None:
    for p in parameters:
        if p.is_complex():
            raise ValueError(
                f"parameters must be real; got one of dtype {p.dtype} and shape {list(p.shape)}. "
                f"Hold its real and imaginary parts in two parameters (torch.view_as_real)."
            )
    if not any(p.requires_grad for p in parameters):
        raise ValueError(
            f"parameters must hold one at least that requires gradients; got {len(parameters)} "
            f"that do not."
        )
    devices = {p.device for p in parameters}
    if len(devices) > 1:
        found = ", ".join(sorted(str(device) for device in devices))
        raise ValueError(
            f"parameters must be on one device; got {found}. Move the model to one of them."
        )


def check_loss(name: str, loss: object, parameters: Sequence[Tensor]) -> None:
    """Raises unless a loss, if it is no callable, is what it must be."""
    if not isinstance(loss, Tensor):
        raise TypeError(
            f"loss {name!r} must be a scalar tensor; its callable returned {type(loss).__name__}."
        )
    if loss.numel() != 1:
        raise ValueError(
            f"loss {name!r} must be a scalar; got shape {list(loss.shape)}. Reduce it, for example "
            f"with .mean()."
        )
    if loss.is_complex():
        raise ValueError(f"loss {name!r} must be real; got dtype {loss.dtype}.")
    if not loss.requires_grad:
        raise ValueError(
            f"loss {name!r} must have a graph; it was computed without gradients (under "
            f"torch.no_grad(), detached, or from frozen parameters only). Pass None for a loss "
            f"that is absent from this batch."
        )
    if parameters and loss.device != parameters[0].device:
        raise ValueError(
            f"loss {name!r} must be on the device of the parameters, {parameters[0].device}; got "
            f"{loss.device}. Move it there with .to()."
        )


def _check_no_reentrant_checkpoint(name: str, loss: Tensor, walked: set[Any]) -> None:
    # A reentrant checkpoint is one opaque node of the graph, so `autograd.grad` finds no path to
    # the parameters inside and returns None for them without a word. The walk takes about a
    # microsecond a node, so it is taken only where parameters were missed, and over what the
    # losses share once.
    stack = [loss.grad_fn]
    while stack:
        node = stack.pop()
        if node is None:
            continue
        if node.name() == "CheckpointFunctionBackward":
            raise RuntimeError(
                f"loss {name!r} passes through a reentrant activation checkpoint, which hides its "
                f"parameters from per-loss gradients. Call torch.utils.checkpoint.checkpoint(..., "
                f"use_reentrant=False)."
            )
        for child, _ in node.next_functions:
            if child not in walked:
                walked.add(child)
                stack.append(child)
