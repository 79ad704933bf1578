"""The Gram matrix against Gram matrices that are known exactly, or computed in float64."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from raco_optim import CAGradClip, gram_matrix, solve_subproblem
from raco_optim.gradients.gram import Workspace

# The boundary that a vector must cross without losing or repeating an element. From this length
# on, products on a CPU may be float32.
CHUNK = 65536


def in_float64(rows):
    """H from whole rows in float64. Products of shorter floats are exact there."""
    J = torch.stack([torch.cat([g.double().reshape(-1) for g in row]) for row in rows])
    return J @ J.T


def relative_error(found, expected):
    norms = expected.diagonal().sqrt()
    return float(((found - expected) / norms / norms[:, None]).abs().max())


def test_every_element_counts_once():
    """Integers, so that the sums are exact: 1 + 4 + 9 + ... = n (n + 1) (2n + 1) / 6."""
    for n in (1, CHUNK - 1, CHUNK, CHUNK + 1, 3 * CHUNK, 3 * CHUNK + 7):
        count = torch.arange(1, n + 1, dtype=torch.float64)
        linear = n * (n + 1) / 2
        expected = [[n * (n + 1) * (2 * n + 1) / 6, linear], [linear, n]]
        assert gram_matrix([[count], [torch.ones_like(count)]]).tolist() == expected


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


@pytest.mark.parametrize("m", [1, 2, 5])
def test_every_element_of_a_float32_gradient_counts_once(m):
    """Small integers, whose products and sums are exact in float32 too."""
    for n in (CHUNK, CHUNK + 1, CHUNK + 127, 2 * CHUNK + 129):
        rows = [[torch.randint(-5, 6, (n,)).float()] for _ in range(m)]
        assert torch.equal(gram_matrix(rows), in_float64(rows))
        rows[-1] = [None]
        assert torch.equal(gram_matrix(rows), in_float64([*rows[:-1], [torch.zeros(n)]]))


@pytest.mark.parametrize(
    ("dtype", "m", "mean"),
    [
        (torch.float32, 2, 0.0),
        (torch.float32, 5, 1.0),
        (torch.bfloat16, 5, 0.0),
        (torch.float16, 2, 1.0),
    ],
)
def test_millions_of_elements(dtype, m, mean):
    """In float32, sums over vectors this long are off by 1e-4 to 1e-2.

    A partial sum is off by some 1e-7 to either side, whether or not the vector has a mean, and
    there are enough of them for that to cancel to a tenth.
    """
    rows = [[(torch.randn(5_000_000) + mean).to(dtype)] for _ in range(m)]
    assert relative_error(gram_matrix(rows), in_float64(rows)) < 1e-7


@pytest.mark.parametrize("m", [1, 5])
def test_fifty_million_elements(m):
    """Where a float32 product of an (n, m) matrix is off by up to 14 %."""
    n, part = 50_000_000, 1_000_000
    g = torch.rand(n + m)  # positive: a running float32 sum stops growing long before the end
    expected = sum(
        in_float64([[g[start + i : start + i + part]] for i in range(m)])
        for start in range(0, n, part)
    )
    assert relative_error(gram_matrix([[g[i : i + n]] for i in range(m)]), expected) < 1e-6


@pytest.mark.parametrize(
    ("m", "dtype"),
    [*[(m, torch.float32) for m in (1, 2, 4, 8, 9, 17, 40)], (2, torch.bfloat16)],
)
def test_elements_of_one_magnitude(m, dtype):
    """As an L1 penalty has them. Every addition of a running sum may err to the same side.

    With one running sum over 1,024 numbers the error is 4e-6 to 8e-6.
    """
    for k in range(30 if m < 8 else 8):
        # In the neighbourhood of 1 / sqrt(3), whose square rounds worst, and elsewhere.
        sizes = 0.57735 + torch.rand(m) * 1e-3 if k % 2 else torch.rand(m)
        signs = torch.randn(m, 1, CHUNK + 100).sign()
        rows = [[(size * sign[0]).to(dtype)] for size, sign in zip(sizes, signs, strict=True)]
        assert relative_error(gram_matrix(rows), in_float64(rows)) < 1e-6


def exactly(rows):
    """H from float64 products, which float64 gradients have at any size."""
    return gram_matrix([[None if g is None else g.double() for g in row] for row in rows])


@pytest.mark.parametrize("m", [3, 4, 8, 20])
def test_float32_products_are_used_where_they_serve(m):
    """Otherwise the tests below would test nothing. A loss that is absent changes nothing."""
    rows = [[torch.randn(CHUNK), torch.randn(9), torch.randn(CHUNK)] for _ in range(m)]
    rows[1][0] = rows[0][2] = None
    found, exact = gram_matrix(rows), exactly(rows)
    assert 0 < relative_error(found, exact) < 1e-6
    assert torch.equal(found, found.T)
    found = gram_matrix([*rows[:-1], [None] * 3])
    assert not torch.equal(found[:-1, :-1], exact[:-1, :-1])
    assert torch.equal(found[-1], torch.zeros(m, dtype=torch.float64))


@pytest.mark.parametrize("m", [2, 3, 5])
@pytest.mark.parametrize("factor", [1.0, 3.0])
def test_duplicates_are_dependent_to_the_last_bit(factor, m):
    """Or the subproblem would have one solution, a random one, instead of many."""
    rows = [[torch.randn(200_000).bfloat16().float()] for _ in range(m)]
    rows[-1] = [factor * rows[0][0]]  # exact, as bfloat16 has 8 bits
    gram = gram_matrix(rows)
    scale = gram.diagonal().sqrt() * gram[-1, -1].sqrt()
    assert float(((gram[-1] - factor * gram[0]) / scale).abs().max()) < 1e-15
    assert torch.equal(gram, exactly(rows))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_entries_of_duplicates_are_equal_to_the_last_bit(dtype):
    """For every m: a product of matrices may sum each entry in an order of its own."""
    generator = torch.Generator().manual_seed(0)
    some = (2, 3, 5, 8, 9, 20, 40)
    for n, number in ((37, some), (129, range(2, 41)), (4097, some), (20_000, some)):
        for m in number:
            assert_duplicates_are_equal(n, m, dtype, generator)
    for m in (2, 5, 20):
        assert_duplicates_are_equal(CHUNK + 5, m, dtype, generator)


def assert_duplicates_are_equal(n, m, dtype, generator):
    rows = [[torch.randn(n, generator=generator).to(dtype), None] for _ in range(m)]
    for row in rows[::2]:
        row[1] = torch.randn(3, 5, generator=generator).to(dtype)
    chosen = torch.randperm(m, generator=generator)[: 2 + m // 3].tolist()
    for i in chosen:
        rows[i] = [None if g is None else g.clone() for g in rows[chosen[0]]]
    gram = gram_matrix(rows)
    assert torch.equal(gram, gram.T)
    for i in chosen:
        assert torch.equal(gram[i], gram[chosen[0]])
    zeroed = [[torch.zeros(15) if g is None else g for g in row] for row in rows]
    assert relative_error(gram, in_float64(zeroed)) < 1e-12


def test_nearly_equal_gradients_are_not_made_equal():
    g = torch.randn(1000, dtype=torch.float64)
    h = g.clone()
    h[3] *= 1 + 1e-11
    gram = gram_matrix([[g], [h], [torch.randn(1000, dtype=torch.float64)]])
    assert gram[0, 0] != gram[1, 1]


# What a workspace keeps between calls follows from its arguments alone
# A row of gradients, given the number of the loss.
CHANGES = {
    "same": lambda i: [torch.randn(30, 4), torch.randn(7)],
    "other values": lambda i: [torch.ones(30, 4), torch.randn(7)],
    "missing": lambda i: [torch.randn(30, 4), torch.randn(7) if i else None],
    "shape, same number": lambda i: [torch.randn(4, 30), torch.randn(7)],
    "one element": lambda i: [torch.randn(1, 1), torch.randn(7)],
    "double": lambda i: [torch.randn(30, 4).double(), torch.randn(7)],
    "half": lambda i: [torch.randn(30, 4).half(), torch.randn(7)],
    "transposed": lambda i: [torch.randn(4, 30).T, torch.randn(7)],
    "expanded": lambda i: [torch.randn(4).expand(30, 4), torch.randn(7)],
    "large": lambda i: [torch.randn(CHUNK + 9), torch.randn(7)],
    "larger": lambda i: [torch.randn(2 * CHUNK + 1), torch.randn(7)],
    "columns": lambda i: [torch.randn(7) for _ in range(3)],
    "nothing": lambda i: [None, torch.zeros(0)],
}


@given(
    st.lists(
        st.tuples(st.sampled_from(sorted(CHANGES)), st.sampled_from([1, 2, 5, 9])),
        min_size=2,
        max_size=6,
    )
)
@settings(max_examples=25, deadline=None)
def test_a_workspace_gives_what_a_new_one_gives(sequence):
    workspace = Workspace()
    for name, m in sequence:
        rows = [CHANGES[name](i) for i in range(m)]
        found = workspace.gram(rows)
        assert torch.equal(found, gram_matrix(rows))
        zeros = [
            next((g for g in c if g is not None), torch.zeros(0)) for c in zip(*rows, strict=True)
        ]
        plain = [
            [torch.zeros_like(z) if g is None else g for g, z in zip(r, zeros, strict=True)]
            for r in rows
        ]
        torch.testing.assert_close(found, in_float64(plain), rtol=1e-6, atol=1e-3)


def test_a_workspace_follows_to_another_device():
    workspace, rows = Workspace(), [[torch.randn(5), None], [torch.randn(5), torch.randn(3)]]
    before = workspace.gram(rows)
    meta = [[None if g is None else g.to("meta") for g in row] for row in rows]
    assert workspace.gram(meta).device.type == "meta"
    assert torch.equal(workspace.gram(rows), before)


def test_small_columns_that_fill_several_blocks():
    """Columns of one, several and all losses, more than are multiplied at once."""
    m, generator = 6, torch.Generator().manual_seed(0)
    reach = (torch.rand(m, 60, generator=generator) < 0.6).tolist()
    sizes = torch.randint(0, 20_000, (60,), generator=generator).tolist()
    columns = [[torch.randint(-9, 10, (n,), generator=generator).float() for n in sizes]] * m
    zeroed, absent = (
        [
            [g if r else nothing(g) for g, r in zip(*pair, strict=True)]
            for pair in zip(columns, reach, strict=True)
        ]
        for nothing in (torch.zeros_like, lambda g: None)
    )
    assert torch.equal(gram_matrix(absent), in_float64(zeroed))


# Where float32 products do not serve, all is computed in float64
EXACT = {
    "mixed dtypes": lambda rows: [[rows[0][0].double() * (1 + 1e-12)], *rows[1:]],
    "float64": lambda rows: [[row[0].double()] for row in rows],
    "subnormal": lambda rows: [[row[0] * 1e-41] for row in rows],
    "one tiny": lambda rows: [[rows[0][0] * 1e-25], *rows[1:]],
    "overflow": lambda rows: [[row[0] * 1e30] for row in rows],
    "dependent": lambda rows: [[rows[1][0] + 1e-3 * rows[0][0]], *rows[1:]],
}


@pytest.mark.parametrize("m", [2, 5, 12])
@pytest.mark.parametrize("case", EXACT)
def test_the_exact_path_is_taken(case, m):
    rows = EXACT[case]([[torch.randn(CHUNK + 3)] for _ in range(m)])
    assert relative_error(gram_matrix(rows), in_float64(rows)) < 1e-12


def test_difference_of_nearly_dependent_gradients():
    g, h = torch.randn(200_000), torch.randn(200_000)
    rows = [[g], [g + math.sqrt(2e-6) * h]]
    found, expected = gram_matrix(rows), in_float64(rows)
    squares = expected.diagonal()
    assert 1 - float(expected[0, 1] / squares.prod().sqrt()) == pytest.approx(1e-6, rel=0.1)
    error = (found.diagonal() - found[0, 1]) - (squares - expected[0, 1])
    assert float((error / squares).abs().max()) < 1e-12


def test_scales_whose_squares_float32_cannot_hold():
    for m in (2, 5):
        for scales in ((1e-25, 1e-25), (1e-18, 1e-18), (1e25, 1e25), (1e-25, 1.0)):
            rows = [[scales[i % 2] * torch.randn(200_000)] for i in range(m)]
            assert relative_error(gram_matrix(rows), in_float64(rows)) < 1e-9


@pytest.mark.parametrize("m", [2, 5, 12])
def test_gradient_that_is_zero(m):
    rows = [[torch.zeros(CHUNK)], *[[torch.randn(CHUNK)] for _ in range(m - 1)]]
    gram = gram_matrix(rows)
    assert torch.equal(gram[0], torch.zeros(m, dtype=torch.float64))
    assert relative_error(gram[1:, 1:], in_float64(rows[1:])) < 1e-6


def test_the_gradient_that_is_not_finite_can_be_named():
    for m, value in ((2, math.nan), (2, math.inf), (5, math.nan), (5, -math.inf)):
        rows = [[torch.randn(CHUNK + 5), torch.randn(3)] for _ in range(m)]
        rows[1][0][CHUNK - 3] = value
        finite = gram_matrix(rows).isfinite()
        others = [i for i in range(m) if i != 1]
        assert not bool(finite[1].any() or finite[:, 1].any())
        assert bool(finite[others][:, others].all())


@pytest.mark.parametrize("m", [2, 5])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_layout_of_large_gradients_does_not_matter(dtype, m):
    def large():
        return torch.randn(700, 300).to(dtype)

    rows = [[large()] for _ in range(m)]
    rows[0] = [torch.randn(300, 700).to(dtype).T]
    rows[1] = [torch.randn(300).to(dtype).expand(700, 300)]
    rows[-1] = [torch.randn(700, 600)[:, ::2]]
    assert relative_error(gram_matrix(rows), in_float64(rows)) < 1e-6


def test_autocast_does_not_shorten_products():
    rows = [[torch.randn(CHUNK)] for _ in range(5)]
    before = gram_matrix(rows)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(gram_matrix(rows), before)


def test_solution_is_that_of_the_exact_gram_matrix():
    for m in (2, 3, 8):
        rows = [[torch.randn(300_000)] for _ in range(m)]
        weights = torch.rand(m, dtype=torch.float64)
        weights /= weights.sum()
        found, expected = (
            solve_subproblem(gram, weights, c=0.5).p
            for gram in (gram_matrix(rows), in_float64(rows))
        )
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)


def test_squares_do_not_overflow_nor_underflow():
    for dtype, size in ((torch.float16, 6e4), (torch.bfloat16, 2e38), (torch.float32, 3e38)):
        rows = [[torch.full((9,), x, dtype=dtype)] for x in (size, 1 / size)]
        gram = gram_matrix(rows)
        assert torch.equal(gram, in_float64(rows))
        assert bool((gram > 0).all() and gram.isfinite().all())


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
