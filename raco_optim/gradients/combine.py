"""Stage 5: gradients and coefficients -> ``.grad``. Nothing else writes to ``.grad``."""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from operator import methodcaller
from typing import Any

import torch
from torch import Tensor

from raco_optim.objectives import Gradient

LOW_PRECISION = (torch.float16, torch.bfloat16)
LARGEST = torch.finfo(torch.float32).max
# Numbers from which on a column is combined on its own, in blocks of so many.
_LARGE, _BLOCK = 2**18, 2**16
# Numbers from which on fresh memory costs more, in page faults, than to keep some.
_KEPT = 2**14


@torch.no_grad()
def combine_rows(
    rows: Sequence[Gradient],
    alpha: Tensor,
    weights: Tensor,
    shared: Sequence[bool],
    blanks: Sequence[list[Tensor]] = (),
) -> Gradient:
    """Combines rows by alpha where a parameter is shared, else by the weights; consumes them.

    In place of each large tensor of the i-th row but the first, `blanks[i]` gets an empty one.
    """
    scales = {True: as_scales(alpha), False: as_scales(weights)}
    sizes = [next((g.numel() for g in c if g is not None), 0) for c in zip(*rows, strict=True)]
    alike = _are_plain([g for row in rows for g in row], scales[True] + scales[False])
    combined: Gradient = []
    start = stop = 0
    while start < len(shared):
        length, is_shared = 0, shared[start]
        # Small columns together, but not so many that a part of a gradient counts in the peak.
        while stop < len(shared) and shared[stop] == is_shared and length + sizes[stop] < _LARGE:
            length += sizes[stop]
            stop += 1
        if alike and stop > start:
            combined += _foreach([row[start:stop] for row in rows], scales[is_shared])
        else:
            stop = start + 1
            pairs = zip(rows, scales[is_shared], strict=True)
            terms = [(g, scale) for row, scale in pairs if (g := row[start]) is not None]
            combined.append(combination(*zip(*terms, strict=True)) if terms else None)
            del terms
        keep = max(sizes[start:stop]) >= _KEPT
        for i, row in enumerate(rows):
            bytes_ = [g.nbytes for g in row[start:stop] if keep and g is not None and g.is_cpu]
            row[start:stop] = [None] * (stop - start)
            if i and blanks:  # the first row's serves what is combined next
                blanks[i].extend(torch.empty(n, dtype=torch.uint8, device="cpu") for n in bytes_)
        start = stop
    return combined


def _foreach(rows: Sequence[Gradient], scales: Sequence[float]) -> Gradient:
    """Combines small columns by a call or two for each row: 8 rows of 22 take 80 us, not 290."""
    combined: list[Any] = [None] * len(rows[0])
    for row, scale in zip(rows, scales, strict=True):
        there = [(k, g) for k, g in enumerate(row) if g is not None]
        new = [(k, g) for k, g in there if combined[k] is None]
        begun = [(combined[k], g) for k, g in there if combined[k] is not None]
        if new:
            for (k, _), out in zip(
                new, torch._foreach_mul([g for _, g in new], scale), strict=True
            ):
                combined[k] = out
        if begun:
            torch._foreach_add_([out for out, _ in begun], [g for _, g in begun], alpha=scale)
    return combined


@torch.no_grad()
def write_gradients(
    parameters: Sequence[Tensor], gradients: Gradient, done: Callable[[], object] = lambda: None
) -> None:
    """Adds gradients, which it may keep, to ``.grad`` of all parameters or, if it fails, of none.

    None leaves a ``.grad`` alone. `done`, written in C (a `partial` of `setattr`, say), is called
    with the writing, so that an interrupt (Ctrl-C) comes before both or after both.
    """
    reached = [(p, g) for p, g in zip(parameters, gradients, strict=True) if g is not None]
    fresh = [(p, _like(g, p)) for p, g in reached if p.grad is None]
    pairs = [_local(p, g) for p, g in reached if p.grad is not None]
    held, added = [grad for grad, _ in pairs], [g for _, g in pairs]
    writes: list[Callable[[], object]] = [partial(setattr, p, "grad", g) for p, g in fresh]
    if held:
        writes.append(partial(torch._foreach_add_, held, added))
    written: list[bool] = []
    try:
        # Python looks for signals between its own instructions, and there are none in here.
        call_all = map(methodcaller("__call__"), [*writes, done, partial(written.append, True)])
        deque(call_all, maxlen=0)
    except BaseException:
        if not written:
            for p, _ in fresh:
                p.grad = None
        raise
    for p, _ in reached:
        hooks = p._post_accumulate_grad_hooks
        for hook in tuple(hooks.values()) if hooks else ():
            hook(p)


def _local(parameter: Tensor, gradient: Any) -> tuple[Any, Tensor]:  # noqa: ANN401  # a DTensor
    """Returns ``.grad`` and the gradient; of DTensors this process's parts, which are tensors."""
    grad: Any = parameter.grad
    gradient = gradient.to(grad.dtype)
    if not hasattr(grad, "to_local"):
        return grad, gradient
    if grad.placements != gradient.placements:  # a sum over processes that is not formed yet
        grad = parameter.grad = grad.redistribute(placements=gradient.placements)
    return grad.to_local(), gradient.to_local()


def _like(gradient: Tensor, parameter: Tensor) -> Tensor:
    """Returns the gradient with its parameter's strides, which fused optimizers rely on."""
    if gradient.stride() == parameter.stride():
        return gradient
    return torch.empty_like(parameter, dtype=gradient.dtype).copy_(gradient)


def grad_dtype(parameter: Tensor) -> torch.dtype:
    """Returns the dtype of the parameter's ``.grad`` (``Tensor.grad_dtype``, since torch 2.10)."""
    return getattr(parameter, "grad_dtype", None) or parameter.dtype


def as_scales(coefficients: Tensor) -> list[Any]:
    """Returns Python numbers where they are at hand: a tensor is slower to multiply by.

    A tensor has at most the largest number of float32, so that it is never Inf beside gradients.
    """
    if coefficients.device.type == "cpu":
        return coefficients.tolist()
    return list(coefficients.clamp(-LARGEST, LARGEST).unbind())


def _are_plain(tensors: Sequence[Tensor | None], scales: Sequence[Any]) -> bool:
    """Whether products of these need no other precision than that of the tensors, one for all."""
    dtypes = {g.dtype for g in tensors if g is not None}
    alike = len(dtypes) == 1 and dtypes <= {torch.float32, torch.float64}
    # Torch's functions for lists take no DTensors beside tensors.
    alike = alike and all(g is None or type(g) in (Tensor, torch.nn.Parameter) for g in tensors)
    return alike and all(isinstance(x, float) and abs(x) <= LARGEST for x in scales)


def combination(tensors: Sequence[Tensor], scales: Sequence[Any]) -> Tensor:
    r"""Returns :math:`\sum_i \alpha_i x_i`, formed in float32 at least and rounded once."""
    # Never in place: autograd may return one tensor for two parameters, an expanded one, or one
    # that the user's code still holds.
    first = tensors[0]
    in_cache = first.numel() >= _LARGE and first.is_cpu and _are_plain(tensors, scales)
    if in_cache and all(x.is_contiguous() for x in tensors):
        return _in_blocks(tensors, scales)
    combined = _scaled(first, scales[0])
    for x, scale in zip(tensors[1:], scales[1:], strict=True):
        if isinstance(scale, float) and abs(scale) <= LARGEST:
            combined.add_(_at_least_single(x), alpha=scale)
        else:
            combined.add_(_scaled(x, scale))
    return combined.to(first.dtype)


def _in_blocks(tensors: Sequence[Tensor], scales: Sequence[float]) -> Tensor:
    """Combines blocks whose sum stays in the cache: 17 ms for 8 times 10 M numbers, not 25."""
    combined = torch.empty_like(tensors[0])
    flat = [torch.split(x.view(-1), _BLOCK) for x in (combined, *tensors)]
    for block, first, *others in zip(*flat, strict=True):
        torch.mul(first, scales[0], out=block)
        for x, scale in zip(others, scales[1:], strict=True):
            block.add_(x, alpha=scale)
    return combined


def _scaled(x: Tensor, scale: Any) -> Tensor:  # noqa: ANN401  # a number or a tensor
    """x times a number that float32 may not hold, as where p is on a gradient of 1e-40."""
    x = _at_least_single(x)
    wide = isinstance(scale, float) and abs(scale) > LARGEST
    scaled: Tensor = (x.double() if wide else x) * scale
    return scaled.to(x.dtype)


def _at_least_single(x: Tensor) -> Tensor:
    return x.float() if x.dtype in LOW_PRECISION else x


@contextmanager
def stashed_gradients(parameters: Sequence[Tensor]) -> Iterator[Callable[[], list[Tensor | None]]]:
    """Puts ``.grad`` and its hooks aside; yields a function that takes, and clears, ``.grad``."""

    def take() -> list[Tensor | None]:
        found = [p.grad for p in parameters]
        for p in parameters:
            p.grad = None
        return found

    hooks = [p._post_accumulate_grad_hooks for p in parameters]
    for p in parameters:
        p._post_accumulate_grad_hooks = OrderedDict()  # autograd would go on to call those of None
    kept = take()
    try:
        yield take
    finally:
        for p, g, found in zip(parameters, kept, hooks, strict=True):
            p.grad = g
            p._post_accumulate_grad_hooks = found
