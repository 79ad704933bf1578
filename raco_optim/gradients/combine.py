"""Stage 5: adds the combined gradient to ``.grad``. Nothing else writes to ``.grad``."""

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
# Columns of at least so many numbers are combined separately, in blocks of so many.
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
    """Combines shared parameters by alpha, others by weights; `blanks` replace large tensors."""
    scales = {True: as_scales(alpha), False: as_scales(weights)}
    # In comprehensions, because a variable of a loop would keep a consumed gradient alive.
    sizes = [next((g.numel() for g in c if g is not None), 0) for c in zip(*rows, strict=True)]
    alike = _are_plain(
        [g for row in rows for g in row if g is not None], scales[True] + scales[False]
    )
    combined: Gradient = []
    start = stop = 0
    while start < len(shared):
        length, is_shared = 0, shared[start]
        # Small columns together, but not so many that they raise the peak of memory.
        while stop < len(shared) and shared[stop] == is_shared and length + sizes[stop] < _LARGE:
            length += sizes[stop]
            stop += 1
        if alike and stop > start:
            combined += _foreach([row[start:stop] for row in rows], scales[is_shared])
        else:
            stop = start + 1
            pairs = zip(rows, scales[is_shared], strict=True)
            terms = [(row[start], scale) for row, scale in pairs if row[start] is not None]
            combined.append(combination(*zip(*terms, strict=True)) if terms else None)
            del terms
        large = [j for j in range(start, stop) if blanks and sizes[j] >= _KEPT]
        for i, row in enumerate(rows):
            kept = [
                g.nbytes for g in map(row.__getitem__, large) if i and g is not None and g.is_cpu
            ]
            row[start:stop] = [None] * (stop - start)
            if kept:  # the first row's serves what is combined next
                blanks[i] += [torch.empty(n, dtype=torch.uint8, device="cpu") for n in kept]
        start = stop
    return combined


def _foreach(rows: Sequence[Gradient], scales: Sequence[float]) -> Gradient:
    """Combines small columns with one or two calls per row: 8 rows of 22 take 80 us, not 290."""
    combined: Gradient = [None] * len(rows[0])
    for row, scale in zip(rows, scales, strict=True):
        new, outs, terms = [], [], []
        for k, g in enumerate(row):
            if g is None:
                continue
            if (out := combined[k]) is None:
                new.append(k)
            else:
                outs.append(out)
                terms.append(g)
        if new:
            firsts: Any = [row[k] for k in new]
            for k, out in zip(new, torch._foreach_mul(firsts, scale), strict=True):
                combined[k] = out
        if outs:
            torch._foreach_add_(outs, terms, alpha=scale)
    return combined


@torch.no_grad()
def write_gradients(
    parameters: Sequence[Tensor], gradients: Gradient, done: Callable[[], object] = lambda: None
) -> None:
    """Adds gradients to ``.grad`` of all parameters or, on failure, of none; it may keep them.

    None leaves ``.grad`` unchanged. `done`, which must be implemented in C (such as a `partial` of
    `setattr`), is called in the same go: an interrupt (Ctrl-C) comes before or after both.
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
        # All in C: Python handles signals only between its instructions.
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
    """Returns ``.grad`` and the gradient; for DTensors their local parts."""
    grad: Any = parameter.grad
    gradient = gradient.to(grad.dtype)
    if not hasattr(grad, "to_local"):
        return grad, gradient
    if grad.placements != gradient.placements:  # a pending sum over processes
        grad = parameter.grad = grad.redistribute(placements=gradient.placements)
    return grad.to_local(), gradient.to_local()


def _like(gradient: Tensor, parameter: Tensor) -> Tensor:
    """Returns the gradient with the strides of its parameter, as fused optimizers require."""
    if gradient.stride() == parameter.stride():
        return gradient
    return torch.empty_like(parameter, dtype=gradient.dtype).copy_(gradient)


def grad_dtype(parameter: Tensor) -> torch.dtype:
    """Returns the dtype of the parameter's ``.grad`` (``Tensor.grad_dtype``, since torch 2.10)."""
    return getattr(parameter, "grad_dtype", None) or parameter.dtype


def as_scales(coefficients: Tensor) -> list[Any]:
    """Returns Python numbers on a CPU, which are faster; else tensors in float32's range."""
    if coefficients.device.type == "cpu":
        return coefficients.tolist()
    return list(coefficients.clamp(-LARGEST, LARGEST).unbind())


def _are_plain(tensors: Sequence[Tensor], scales: Sequence[Any]) -> bool:
    """Returns whether products need no more precision than the tensors' common dtype."""
    dtypes = {g.dtype for g in tensors}
    alike = len(dtypes) == 1 and dtypes <= {torch.float32, torch.float64}
    # Torch's functions for lists don't mix DTensors with tensors.
    alike = alike and {type(g) for g in tensors} <= {Tensor, torch.nn.Parameter}
    return alike and all(isinstance(x, float) and abs(x) <= LARGEST for x in scales)


def combination(tensors: Sequence[Tensor], scales: Sequence[Any]) -> Tensor:
    r"""Returns :math:`\sum_i \alpha_i x_i`, computed in float32 or better and rounded once."""
    # Never in place: autograd may return the same tensor for two parameters, an expanded one, or
    # one that user code holds.
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
    """Combines blocks that stay in the cache: 8 times 10 M numbers take 17 ms, not 25."""
    combined = torch.empty_like(tensors[0])
    flat = [torch.split(x.view(-1), _BLOCK) for x in (combined, *tensors)]
    for block, first, *others in zip(*flat, strict=True):
        torch.mul(first, scales[0], out=block)
        for x, scale in zip(others, scales[1:], strict=True):
            block.add_(x, alpha=scale)
    return combined


def _scaled(x: Tensor, scale: Any) -> Tensor:  # noqa: ANN401  # a number or a tensor
    """Returns x times a number that float32 may not hold, as for a gradient of 1e-40."""
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
        p._post_accumulate_grad_hooks = OrderedDict()  # with None, autograd would still call them
    kept = take()
    try:
        yield take
    finally:
        for p, g, found in zip(parameters, kept, hooks, strict=True):
            p.grad = g
            p._post_accumulate_grad_hooks = found
