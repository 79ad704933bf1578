"""The Gram matrix against Gram matrices that are known exactly, or computed in float64."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from raco_optim import CAGradClip, gram_matrix

CHUNK = 65536  # the boundary that a vector must cross without losing or repeating an element


def in_float64(rows):
    """H from whole rows in float64. Products of shorter floats are exact there."""
    J = torch.stack([torch.cat([g.double().reshape(-1) for g in row]) for row in rows])
    return J @ J.T


def relative_error(found, expected):
    norms = expected.diagonal().sqrt()
    return float(((found - expected) / norms / norms[:, None]).abs().max())


@pytest.mark.parametrize("n", [1, CHUNK - 1, CHUNK, CHUNK + 1, 3 * CHUNK, 3 * CHUNK + 7])
def test_every_element_counts_once(n):
    """Integers, so that the sums are exact: 1 + 4 + 9 + ... = n (n + 1) (2n + 1) / 6."""
    count = torch.arange(1, n + 1, dtype=torch.float64)
    ones = torch.ones(n, dtype=torch.float64)
    linear = n * (n + 1) / 2
    expected = [[n * (n + 1) * (2 * n + 1) / 6, linear], [linear, n]]
    assert gram_matrix([[count], [ones]]).tolist() == expected


@given(
    st.lists(st.integers(0, 5), min_size=1, max_size=4),
    st.integers(1, 4),
    st.integers(0, 2**32 - 1),
)
def test_is_the_sum_over_parameters_with_none_as_zero(sizes, m, seed):
    generator = torch.Generator().manual_seed(seed)
    integers = [[torch.randint(-9, 10, (n,), generator=generator) for n in sizes] for _ in range(m)]
    absent = torch.rand(m, len(sizes), generator=generator) < 0.3
    rows = [
        [None if absent[i, j] else g.double() for j, g in enumerate(row)]
        for i, row in enumerate(integers)
    ]
    zeroed = [[g * (not absent[i, j]) for j, g in enumerate(row)] for i, row in enumerate(integers)]
    found = gram_matrix(rows)
    assert found.dtype == torch.float64
    assert torch.equal(found, in_float64(zeroed))  # integers: exact


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("mean", [0.0, 1.0], ids=["centred", "drifting"])
def test_five_million_elements(dtype, mean):
    """In float32, sums over vectors this long are off by 1e-4 to 1e-2."""
    rows = [[(torch.randn(5_000_000) + mean).to(dtype)] for _ in range(2)]
    assert relative_error(gram_matrix(rows), in_float64(rows)) < 1e-12


def test_fifty_million_elements():
    """Where a float32 product of an (n, m) matrix is off by up to 14 %."""
    g = torch.rand(50_000_000)  # positive: a running float32 sum stops growing long before the end
    expected = sum(float(part.double().square().sum()) for part in g.split(5_000_000))
    assert float(gram_matrix([[g]])) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize(
    ("dtype", "size"), [(torch.float16, 6e4), (torch.bfloat16, 2e38), (torch.float32, 3e38)]
)
def test_squares_do_not_overflow_nor_underflow(dtype, size):
    large, small = torch.full((9,), size, dtype=dtype), torch.full((9,), 1 / size, dtype=dtype)
    gram = gram_matrix([[large], [small]])
    assert torch.equal(gram, in_float64([[large], [small]]))
    assert bool((gram > 0).all() and gram.isfinite().all())


def test_is_symmetric_to_the_last_bit():
    gram = gram_matrix([[torch.randn(7, 11), torch.randn(3)] for _ in range(9)])
    assert torch.equal(gram, gram.T)


def test_layout_and_type_do_not_matter():
    g = torch.randn(6, 4)
    h = torch.tensor(2.0)
    rows = [[g.T, h], [g.flip(0).T, h.expand(())], [torch.ones(1).expand(4, 6), None]]
    plain = [[g.T.contiguous(), h], [g.flip(0).T.contiguous(), h], [torch.ones(4, 6), 0 * h]]
    torch.testing.assert_close(gram_matrix(rows), in_float64(plain), rtol=1e-14, atol=1e-14)
    mixed = [[g.T.half(), h], [g.T.double(), h.bfloat16()]]
    torch.testing.assert_close(gram_matrix(mixed), in_float64(mixed), rtol=1e-14, atol=1e-14)


def test_gradients_stay_as_they_are():
    g = torch.randn(5, requires_grad=True)
    before = g.detach().clone()
    assert not gram_matrix([[g]]).requires_grad
    assert torch.equal(g, before)


def test_vectors_are_global_not_per_parameter():
    """Per parameter, the second one conflicts and would be changed; as whole vectors none do.

    g1 = (3, 1), g2 = (3, -1): <g1, g2> = 8 > 0, though the second entries have opposite signs.
    PCGrad-like rules on each parameter alone would see -1 there.
    """
    x, y = torch.nn.Parameter(torch.zeros(1)), torch.nn.Parameter(torch.zeros(1))
    opt = CAGradClip(torch.optim.SGD([x, y], 1.0), [0.75, 0.25], c=0.5)
    opt.backward([(3 * x + y).sum(), (3 * x - y).sum()])
    assert opt.report.gram.tolist() == [[10, 8], [8, 10]]
    alpha = opt.report.coefficients
    assert x.grad.item() == pytest.approx(float(3 * alpha[0] + 3 * alpha[1]))
    assert y.grad.item() == pytest.approx(float(alpha[0] - alpha[1]))


def test_rows_of_a_jacobian():
    J = torch.randn(3, 1000, dtype=torch.float64)
    expected = J @ J.T
    torch.testing.assert_close(gram_matrix(J), expected)
    torch.testing.assert_close(gram_matrix(list(J)), expected)
