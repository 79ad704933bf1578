"""What stops a loss, in words: which one it was, and the remedy."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from operator import methodcaller
from typing import Any

import torch
from torch import Tensor

from raco_optim._checks import add_note
from raco_optim.gradients.graph import walk_graph
from raco_optim.objectives import Gradient

# What a loss must depend on, and the remedy.
A_PARAMETER = (
    "a parameter of the optimizer; it reaches none. Was the optimizer built from this model's "
    "parameters? Pass None for a loss that is absent from this batch."
)
_CALLABLES = "pass the losses as callables, each with its own forward pass."
# Selective checkpoints, and those of torch.distributed._composable.
_ONLY_ONCE = f"This activation checkpoint can be computed again only once: {_CALLABLES}"
_REMEDIES = (
    ("second time", "An earlier backward pass freed the graph: compute the losses anew."),
    (
        "donated buffer",
        "A compiled model frees its buffers in the first of several backward passes: `import "
        "torch._functorch.config` and set `torch._functorch.config.donated_buffer = False` before "
        f"the model's first call, or {_CALLABLES}",
    ),
    ("only allowed to backward once", _ONLY_ONCE),
    ("_GeneratorContextManager", _ONLY_ONCE),
    ("use_reentrant", "Call `torch.utils.checkpoint.checkpoint(..., use_reentrant=False)`."),
    (
        "fabric.backward",
        "Fabric goes back through its module for one loss only: run the module inside, `with "
        "fabric.autocast(): outputs = model.module(inputs)`, and call `backward` on its losses.",
    ),
    (
        "out of memory",
        "A step holds one gradient per loss: take smaller micro-batches (`accumulate=True`), or "
        'gradients="ghost" or "representation".',
    ),
)


def explain(name: str, error: Exception, *, again: bool = False) -> None:
    """Adds a note with the loss and the remedy; `again`: another loss's pass went through."""
    remedies = [remedy for symptom, remedy in _REMEDIES if symptom in str(error)]
    if again and not remedies:
        remedies = [
            "The pass of an earlier loss went through. A custom autograd function that can go "
            f"back only once raises here: {_CALLABLES}"
        ]
    add_note(error, " ".join([f"It was raised by the backward pass of loss {name!r}.", *remedies]))


def evaluate(name: str, loss: Callable[[], Tensor]) -> Tensor:
    """Calls a loss that is given as a callable."""
    try:
        with torch.enable_grad():
            return loss()
    except Exception as error:
        add_note(error, f"It was raised by the callable of loss {name!r}.")
        raise


def check_no_reentrant_checkpoint(name: str, loss: Tensor, walked: set[Any]) -> None:
    """Raises if the loss passes, behind nodes that were not `walked`, a reentrant checkpoint."""
    # It is one opaque node: `autograd.grad` finds no path to the parameters inside and returns
    # None for them. The walk takes half a microsecond a node.
    nodes = walk_graph(loss.grad_fn, walked)
    if "CheckpointFunctionBackward" in map(methodcaller("name"), nodes):
        raise RuntimeError(
            f"loss {name!r} must not pass through a reentrant activation checkpoint, which "
            f"hides its parameters from per-loss gradients. Call "
            f"torch.utils.checkpoint.checkpoint(..., use_reentrant=False)."
        )


def sparse_gradient(name: str, gradients: Gradient) -> ValueError:
    """Returns the error for a gradient that is not dense."""
    found = next(g for g in gradients if g is not None and g.layout != torch.strided)
    return ValueError(
        f"gradients must be dense; loss {name!r} has a {found.layout} gradient for the parameter "
        f"of shape {list(found.shape)}. Build the embedding with sparse=False."
    )


def refused_loss(
    name: str, loss: object, parameters: Sequence[Tensor], *, called: bool
) -> Exception:
    """Returns the error for a loss that is not what it must be, or for what a callable returned."""
    if not isinstance(loss, Tensor):
        kind, scalar = type(loss).__name__, f"loss {name!r} must be a scalar tensor"
        if called:
            return TypeError(f"{scalar}; its callable returned {kind}.")
        return TypeError(f"{scalar}, a callable that returns one, or None; got {kind}.")
    if loss.numel() != 1:
        return ValueError(
            f"loss {name!r} must be a scalar; got shape {list(loss.shape)}. Reduce it, for example "
            f"with .mean()."
        )
    if loss.is_complex():
        return ValueError(f"loss {name!r} must be real; got dtype {loss.dtype}. Pass its .real.")
    if not loss.requires_grad:
        return ValueError(
            f"loss {name!r} must have a graph; it was computed without gradients (under "
            f"torch.no_grad(), detached, or from frozen parameters only). Pass None for a loss "
            f"that is absent from this batch."
        )
    return ValueError(
        f"loss {name!r} must be on the device of the parameters, {parameters[0].device}; got "
        f"{loss.device}. Move it there with .to()."
    )


def refused_parameters(parameters: Sequence[Tensor]) -> ValueError:
    """Returns the error for parameters that can't be trained together."""
    for p in parameters:
        if p.is_complex():
            return ValueError(
                f"parameters must be real; got one of dtype {p.dtype} and shape {list(p.shape)}. "
                f"Hold its real and imaginary parts in two parameters (torch.view_as_real)."
            )
    if not any(p.requires_grad for p in parameters):
        return ValueError(
            f"parameters must hold one at least that requires gradients; got {len(parameters)} "
            f"that do not. Call requires_grad_() on those to train."
        )
    devices = sorted({str(p.device) for p in parameters})
    return ValueError(
        f"parameters must be on one device; got {', '.join(devices)}. Move the model to one of "
        f"them."
    )
