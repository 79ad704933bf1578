"""What is written to .grad: the sum, rounded once, added, and never to memory of someone else."""

import weakref

import pytest
import torch
from torch import nn

from raco_optim import CAGradClip, add_combined_gradient
from tests.problems_nn import Buffered

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("m", [1, 2, 5])
def test_sum_is_as_good_as_one_rounding(dtype, m):
    """Of float64 truth; float32 may round each of its m terms, shorter types once in all."""
    parameter = nn.Parameter(torch.zeros(40, 30, dtype=dtype))
    rows = [[torch.randn(40, 30).to(dtype)] for _ in range(m)]
    alpha = torch.rand(m, dtype=torch.float64)
    terms = [a * row[0].double() for a, row in zip(alpha, rows, strict=True)]
    add_combined_gradient([parameter], rows, alpha)
    assert parameter.grad.dtype == dtype
    error = (parameter.grad.double() - sum(terms)).abs()
    eps = torch.finfo(dtype).eps
    if dtype in (torch.bfloat16, torch.float16):
        one_rounding = (sum(terms).to(dtype).double() - sum(terms)).abs()
        assert bool((error <= one_rounding + 1e-6 * sum(term.abs() for term in terms)).all())
    else:
        assert bool((error <= m * eps * sum(term.abs() for term in terms)).all())


@pytest.mark.parametrize("dtype", DTYPES)
def test_adds_to_what_is_there_in_place(dtype):
    parameter = nn.Parameter(torch.zeros(3, dtype=dtype))
    parameter.grad = held = torch.tensor([1, 2, 3], dtype=dtype)
    add_combined_gradient([parameter], [[torch.ones(3, dtype=dtype)]], torch.tensor([4.0]))
    assert parameter.grad is held, "as loss.backward() does"
    assert held.tolist() == [5, 6, 7]


@pytest.mark.parametrize("before", [None, torch.tensor([7.0])], ids=["None", "7"])
def test_unreached_parameter_keeps_its_grad(before):
    parameter = nn.Parameter(torch.zeros(1))
    parameter.grad = before
    add_combined_gradient([parameter], [[None], [None]], torch.tensor([0.5, 0.5]))
    assert parameter.grad is before


def test_rows_are_consumed():
    """So that the peak stays at m gradients: each is let go as soon as it is combined."""
    rows = [[torch.ones(2), None], [None, torch.ones(3)]]
    parameters = [nn.Parameter(torch.zeros(n)) for n in (2, 3)]
    add_combined_gradient(parameters, rows, torch.tensor([1.0, 1.0]))
    assert rows == [[None, None], [None, None]]


@pytest.mark.parametrize("bad", [torch.inf, torch.nan])
@pytest.mark.parametrize("position", [0, 1])
def test_coefficient_zero_does_not_hide_what_is_not_finite(bad, position):
    """0 * Inf is NaN, and a GradScaler must see it."""
    rows = [[torch.ones(2)], [torch.ones(2)]]
    rows[position][0][0] = bad
    alpha = torch.ones(2, dtype=torch.float64)
    alpha[position] = 0
    parameter = nn.Parameter(torch.zeros(2))
    add_combined_gradient([parameter], rows, alpha)
    assert parameter.grad.isfinite().tolist() == [False, True]


def test_nothing_of_a_step_outlives_backward_but_the_grad():
    """Neither gradients per loss nor graphs: m times the memory of the model each."""
    x, alive = nn.Parameter(torch.ones(3)), []

    class Watched(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x, activation):
            ctx.activation = activation
            return (x * activation).sum()

        @staticmethod
        def backward(ctx, grad):
            gradient = grad * ctx.activation
            alive.append(weakref.ref(gradient))
            return gradient, None

    def losses():
        activations = [torch.ones(3), torch.rand(3)]
        alive.extend(map(weakref.ref, activations))
        return [Watched.apply(x, activation) for activation in activations]

    opt = CAGradClip(torch.optim.SGD([x], 0.1), [0.5, 0.5])
    opt.backward(losses(), accumulate=True)
    opt.backward(losses())
    assert [reference() for reference in alive] == [None] * 8


# Memory that autograd returns is not always new


BUFFER = torch.tensor([[1.0, 2.0], [3.0, 4.0]])

# name -> (two losses of a and b, the four expected gradients)
ALIASES = {
    "expanded": (lambda a, b: [a.sum() + b.sum(), (2 * a).sum() + b.sum()], [1, 1, 2, 1]),
    "one tensor for both": (lambda a, b: [(a + b).sum(), (a - b).sum()], [1, 1, 1, -1]),
    "the user's buffer": (
        lambda a, b: [Buffered.apply(a, BUFFER) + b.sum(), Buffered.apply(a, BUFFER) - b.sum()],
        [BUFFER, 1, BUFFER, -1],
    ),
    "a view of the other's": (
        lambda a, b: [torch.stack([a, b]).square().sum() / 2, (a * 1).sum() + b.sum()],
        [5, 7, 1, 1],
    ),
    "diagonal": (
        lambda a, b: [a.diagonal().sum() + b.sum(), (a.T + b).sum()],
        [torch.eye(2), 1, 1, 1],
    ),
}


@pytest.mark.parametrize("case", ALIASES)
@pytest.mark.parametrize("accumulate", [False, True])
def test_aliased_gradients_are_combined_not_corrupted(case, accumulate):
    a, b = nn.Parameter(torch.full((2, 2), 5.0)), nn.Parameter(torch.full((2, 2), 7.0))
    losses, (g1a, g1b, g2a, g2b) = ALIASES[case]
    opt = CAGradClip(torch.optim.SGD([a, b], 0.1), [0.25, 0.75], c=0.0)
    factor = 1 + accumulate
    if accumulate:
        opt.backward(losses(a, b), accumulate=True)
    opt.backward(losses(a, b))
    assert torch.equal(a.grad, torch.ones(2, 2) * (0.25 * g1a + 0.75 * g2a) * factor)
    assert torch.equal(b.grad, torch.ones(2, 2) * (0.25 * g1b + 0.75 * g2b) * factor)
    assert a.grad.untyped_storage().data_ptr() != b.grad.untyped_storage().data_ptr()
    assert BUFFER.tolist() == [[1, 2], [3, 4]]
    a.grad.zero_()
    assert BUFFER.tolist() == [[1, 2], [3, 4]]


@pytest.mark.parametrize(
    "value",
    [torch.tensor(3.0), torch.arange(6.0).reshape(2, 3).T, torch.ones(1, 2, 3, 3)],
    ids=["0-dim", "transposed", "channels_last"],
)
def test_shapes_and_strides(value):
    if value.dim() == 4:
        value = value.to(memory_format=torch.channels_last)
    parameter = nn.Parameter(value)
    opt = CAGradClip(torch.optim.AdamW([parameter]), [0.5, 0.5], c=0.0)
    for _ in range(2):
        opt.backward([parameter.square().sum(), (4 * parameter).sum()])
    assert torch.equal(parameter.grad, 2 * (parameter.detach() + 2))
    opt.step()


@pytest.mark.parametrize("tiny", [1e-30, 1e-38, 1e-41, 1e-44])
def test_a_correction_along_a_subnormal_gradient_has_its_full_length(tiny):
    """p is the vertex of the tiny gradient, so that its coefficient is beyond float32."""
    x = torch.nn.Parameter(torch.ones(2))
    for order in (1, -1):
        opt = CAGradClip(torch.optim.SGD([x], lr=0.1), [0.5, 0.5], c=0.4)
        opt.zero_grad()
        opt.backward([x[0], torch.tensor(tiny) * x[1]][::order])
        torch.testing.assert_close(x.grad, torch.tensor([0.5, 0.2]), rtol=1e-4, atol=0)
