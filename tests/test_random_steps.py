"""Steps of random structure against formulas: who reaches whom, who is absent, frozen or a head.

Losses are L_i = sum_j <A_ij, x_j> + b_ij |x_j|^2 / 2 with integers in all places, so that the
gradients A_ij + b_ij x_j and their Gram matrix are exact, and so are their degenerate cases.
"""

from dataclasses import dataclass

import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from raco_optim import CAGradClip
from tests.problems_nn import clipped_alpha

SHAPES = [(), (1,), (3,), (2, 2), (0,)]
DOUBLE = torch.float64


@dataclass
class Case:
    """m losses over parameters of `shapes`; `reach` is ``[micro-batches, m, parameters]``."""

    shapes: list
    frozen: list
    shared: list | None
    weights: list
    c: float
    clip: str
    reach: np.ndarray
    callables: bool
    seed: int


@st.composite
def cases(draw):
    shapes = draw(st.lists(st.sampled_from(SHAPES), min_size=1, max_size=4))
    n, m, micro = len(shapes), draw(st.integers(1, 3)), draw(st.integers(1, 3))
    booleans = st.booleans()
    frozen = [draw(st.integers(0, 4)) == 0 for _ in range(n)]
    shared = draw(st.none() | st.lists(booleans, min_size=n, max_size=n).filter(any))
    shares = draw(st.lists(st.integers(0, 4), min_size=m, max_size=m).filter(any))
    reach = np.array(draw(st.lists(booleans, min_size=micro * m * n, max_size=micro * m * n)))
    return Case(
        shapes,
        frozen,
        shared,
        [share / sum(shares) for share in shares],
        draw(st.sampled_from([0.0, 0.25, 0.9])),
        draw(st.sampled_from(["hard", "none", "soft"])),
        reach.reshape(micro, m, n),
        draw(booleans),
        draw(st.integers(0, 2**16)),
    )


@given(cases())
def test_random_step(case):
    generator = torch.Generator().manual_seed(case.seed)

    def integers(shape):
        return torch.randint(-3, 4, shape, generator=generator).double()

    xs = [
        nn.Parameter(integers(shape), requires_grad=not frozen)
        for shape, frozen in zip(case.shapes, case.frozen, strict=True)
    ]
    before = [integers(x.shape) if x.numel() % 2 else None for x in xs]
    for x, grad in zip(xs, before, strict=True):
        x.grad = None if grad is None else grad.clone()
    # A loss that reaches no trainable parameter stands for one that is absent.
    reach = case.reach & ~np.array(case.frozen)
    micro, m, n = reach.shape
    terms = {
        index: (integers(xs[index[2]].shape), integers(())) for index in np.ndindex(micro, m, n)
    }

    def loss(k, i):
        reached = [(xs[j], *terms[k, i, j]) for j in range(n) if reach[k, i, j]]
        return sum((A * x).sum() + b * x.square().sum() / 2 for x, A, b in reached)

    def losses(k):
        given = [(lambda i=i: loss(k, i)) if case.callables else loss(k, i) for i in range(m)]
        return [x if reach[k, i].any() else None for i, x in enumerate(given)]

    if not reach.any() or (not reach[-1].any() and micro == 1):
        return
    in_gram = [j for j in range(n) if case.shared is None or case.shared[j]]
    shared = None if case.shared is None else [xs[j] for j in in_gram]
    inner = torch.optim.SGD(xs, 1.0)
    opt = CAGradClip(inner, case.weights, case.c, clip=case.clip, shared_parameters=shared)
    for k in range(micro):
        opt.backward(losses(k), accumulate=k < micro - 1)

    def gradient(i, j):
        reached = [terms[k, i, j] for k in range(micro) if reach[k, i, j]]
        return sum((A + b * xs[j].detach() for A, b in reached), torch.zeros_like(xs[j]))

    g = [[gradient(i, j).detach() for j in range(n)] for i in range(m)]
    J = torch.stack([torch.cat([g[i][j].reshape(-1) for j in in_gram]) for i in range(m)])
    torch.testing.assert_close(opt.report.gram, J @ J.T, rtol=0, atol=0)
    present = reach.any((0, 2)).tolist()
    alpha = clipped_alpha(J, case.weights, case.c, case.clip, present)
    for j, x in enumerate(xs):
        if not reach[:, :, j].any():
            assert x.grad is None if before[j] is None else torch.equal(x.grad, before[j])
            continue
        coefficients = alpha if j in in_gram else torch.tensor(case.weights, dtype=DOUBLE)
        expected = sum(coefficients[i] * g[i][j] for i in range(m))
        expected = expected + (0 if before[j] is None else before[j])
        torch.testing.assert_close(x.grad, expected, rtol=1e-6, atol=1e-6)
    assert opt.report.absent == tuple(str(i) for i in range(m) if not reach[:, i].any())
    values = torch.full((m,), torch.nan, dtype=DOUBLE)
    for i in range(m):
        if present[i]:
            values[i] = sum(loss(k, i) for k in range(micro) if reach[k, i].any()).detach()
    torch.testing.assert_close(opt.report.losses, values, equal_nan=True)
