"""Errors about a loss or its backward pass: the loss and the remedy."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from operator import methodcaller
from typing import Any

import torch
from torch import Tensor

from raco_optim._checks import add_note
from raco_optim.gradients.graph import walk_graph
from raco_optim.objectives import Gradient

# The end of "a loss must depend on", and the remedy.
A_PARAMETER = (
    "a parameter of the optimizer; it reaches none. Was the optimizer built from this model's "
    "parameters? Pass None for a loss that is absent from this batch."
)
_CALLABLES = "pass the losses as callables, each with its own forward pass."
# For selective checkpoints, and checkpoints of torch.distributed._composable.
_ONLY_ONCE = f"This activation checkpoint can be recomputed only once: {_CALLABLES}"
_REMEDIES = (
    ("second time", "An earlier backward pass freed the graph. Compute the losses again."),
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
        "Fabric's module supports only one backward pass. Run the module inside it, `with "
        "fabric.autocast(): outputs = model.module(inputs)`, and call `backward` on its losses.",
    ),
    (
        "out of memory",
        "A step holds one gradient per loss. Use smaller micro-batches (`accumulate=True`), or "
        'gradients="ghost" or "representation".',
    ),
)


def explain(name: str, error: Exception, *, again: bool = False) -> None:
    """Adds a note with the loss and a remedy; `again`: another loss's pass succeeded."""
    remedies = [remedy for symptom, remedy in _REMEDIES if symptom in str(error)]
    if again and not remedies:
        remedies = [
            "The pass of an earlier loss succeeded. A custom autograd function that supports only "
            f"one backward pass fails here: {_CALLABLES}"
        ]
    add_note(error, " ".join([f"The backward pass of loss {name!r} raised this.", *remedies]))


def evaluate(name: str, loss: Callable[[], Tensor]) -> Tensor:
    """Calls a callable loss; an error gets a note with its name."""
    try:
        with torch.enable_grad():
            return loss()
    except Exception as error:
        add_note(error, f"The callable of loss {name!r} raised this.")
        raise


def check_no_reentrant_checkpoint(name: str, loss: Tensor, walked: set[Any]) -> None:
    """Raises if a loss passes a reentrant checkpoint, beyond nodes in `walked`."""
    # It is one opaque node: `autograd.grad` finds no path to the parameters inside and returns
    # None for them. The walk takes half a microsecond per node.
    nodes = walk_graph(loss.grad_fn, walked)
    if "CheckpointFunctionBackward" in map(methodcaller("name"), nodes):
        raise RuntimeError(
            f"loss {name!r} must not pass through a reentrant activation checkpoint, which "
            f"hides its parameters from per-loss gradients. Call "
            f"torch.utils.checkpoint.checkpoint(..., use_reentrant=False)."
        )


def sparse_gradient(name: str, gradients: Gradient) -> ValueError:
    """Returns the error for a sparse gradient."""
    found = next(g for g in gradients if g is not None and g.layout != torch.strided)
    return ValueError(
        f"gradients must be dense; loss {name!r} has a {found.layout} gradient for the parameter "
        f"of shape {list(found.shape)}. Build the embedding with sparse=False."
    )


def refused_loss(
    name: str, loss: object, parameters: Sequence[Tensor], *, called: bool
) -> Exception:
    """Returns the error for an invalid loss, or for the invalid result of a callable."""
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
                f"Use two parameters for its real and imaginary parts (torch.view_as_real)."
            )
    if not any(p.requires_grad for p in parameters):
        return ValueError(
            f"at least one parameter must require gradients; got {len(parameters)} that do not. "
            f"Call requires_grad_() on the parameters to train."
        )
    devices = sorted({str(p.device) for p in parameters})
    return ValueError(
        f"parameters must be on one device; got {', '.join(devices)}. Move the model to one device."
    )
