"""Stages 1, 2 and 5 of a step: per-loss gradients, their Gram matrix, their combination.

A mode computes the three together, because none of them needs to exist in one piece:

- `dense`: all m gradients are in memory at once (the default);
- `ghost`: the exact Gram matrix without the gradients of wide layers, which `graph` finds;
- `per_example`: one backward pass for any number of losses that depend on one scalar per example;
- `approximate`: the Gram matrix of something smaller than the gradients, or of an earlier step.

`gram` multiplies gradients, `combine` adds them up and is the only writer of ``.grad``.
"""
