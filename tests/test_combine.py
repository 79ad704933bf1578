"""What is written to .grad: the sum, rounded once, added, and never to memory of someone else."""

import _thread
import signal
import sys
import weakref
from pathlib import Path

import pytest
import torch
from torch import nn

import raco_optim
from raco_optim import CAGradClip, add_combined_gradient
from raco_optim.gradients import combine
from raco_optim.gradients.combine import write_gradients
from tests.problems_nn import Buffered, batch, bits, network

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
def test_adds_to_grad_in_place_and_lets_go_of_the_rows(dtype):
    """Each gradient per loss is let go as soon as it is combined: the peak stays at m of them."""
    x, y, z = (nn.Parameter(torch.zeros(3, dtype=dtype)) for _ in range(3))
    x.grad = held = torch.tensor([1, 2, 3], dtype=dtype)
    y.grad = unreached = torch.ones(3, dtype=dtype)
    rows = [[torch.ones(3, dtype=dtype), None, None] for _ in range(2)]
    add_combined_gradient([x, y, z], rows, torch.tensor([4.0, 0.0]))
    assert x.grad is held, "as loss.backward() does"
    assert held.tolist() == [5, 6, 7]
    assert y.grad is unreached
    assert z.grad is None
    assert rows == [[None] * 3] * 2


def test_coefficient_zero_does_not_hide_a_gradient_that_is_not_finite():
    """0 * Inf is NaN, and a GradScaler must see it."""
    for bad, position in ((torch.inf, 0), (torch.nan, 1)):
        rows = [[torch.ones(2)], [torch.ones(2)]]
        rows[position][0][0] = bad
        alpha = torch.ones(2, dtype=torch.float64)
        alpha[position] = 0
        parameter = nn.Parameter(torch.zeros(2))
        add_combined_gradient([parameter], rows, alpha)
        assert parameter.grad.isfinite().tolist() == [False, True]


LARGE = 2**18 + 5
GRADIENTS = {
    "plain": lambda n: [torch.randn(n) for _ in range(3)],
    "float64": lambda n: [torch.randn(n).double() for _ in range(3)],
    "mixed dtypes": lambda n: [torch.randn(n), torch.randn(n).double(), torch.randn(n)],
    "low precision": lambda n: [torch.randn(n).bfloat16() for _ in range(3)],
    "not contiguous": lambda n: [torch.randn(n, 2)[:, 0], torch.randn(1).expand(n), torch.randn(n)],
    "subnormal": lambda n: [torch.randn(n), torch.randn(n) * 1e-40, torch.randn(n)],
    "wide alpha": lambda n: [torch.randn(n), torch.randn(n) * 1e-40, torch.randn(n)],
}
# Number of elements and case -> by which function columns are combined together or in blocks.
TAKEN = {
    **{(7, case): "_foreach" for case in ("plain", "float64", "not contiguous", "subnormal")},
    **{(LARGE, case): "_in_blocks" for case in ("plain", "float64", "subnormal")},
}


@pytest.mark.parametrize("n", [7, LARGE])
@pytest.mark.parametrize("case", GRADIENTS)
def test_columns_that_the_fast_ways_cannot_serve_are_combined_one_by_one(monkeypatch, case, n):
    taken = []

    def watched(name):
        original = getattr(combine, name)
        return lambda *args: [taken.append(name), original(*args)][1]

    for name in ("_foreach", "_in_blocks"):
        monkeypatch.setattr(combine, name, watched(name))
    gradients = GRADIENTS[case](n)
    alpha = torch.tensor([0.3, 1e39 if case == "wide alpha" else -0.2, 0.7], dtype=torch.float64)
    terms = [a * g.double() for a, g in zip(alpha, gradients, strict=True)]
    before = [g.clone() for g in gradients]
    row = combine.combine_rows([[g, None] for g in gradients], alpha, alpha, [True, True])
    eps = torch.finfo(gradients[0].dtype).eps
    error = (row[0].double() - sum(terms)).abs()
    assert bool((error <= 3 * eps * sum(term.abs() for term in terms) + 1e-44).all())
    assert row[1] is None
    assert row[0].dtype == gradients[0].dtype
    assert row[0].is_contiguous()
    assert all(map(torch.equal, gradients, before))
    expected = [TAKEN[n, case]] if (n, case) in TAKEN else []
    assert [x for x in taken if x != "_foreach" or n < LARGE] == expected


def test_heads_and_shared_parameters_of_one_step_have_their_own_coefficients():
    """Columns of one loss, of some and of all, in runs of shared ones and heads."""
    alpha, weights = torch.tensor([0.5, -2.0, 3.0]).double(), torch.tensor([0.2, 0.3, 0.5]).double()
    shared = [True, True, False, True, False, False]
    there = [[1, 0, 1, 1, 0, 1], [1, 1, 0, 1, 0, 1], [1, 0, 0, 0, 0, 1]]
    rows = [[torch.randn(3) if x else None for x in row] for row in there]
    expected = [
        sum(
            (alpha if is_shared else weights)[i] * row[j].double()
            for i, row in enumerate(rows)
            if row[j] is not None
        )
        for j, is_shared in enumerate(shared)
    ]
    found = combine.combine_rows(rows, alpha, weights, shared)
    assert found[4] is None
    for g, x in zip(found, expected, strict=True):
        if g is not None:
            torch.testing.assert_close(g.double(), x, rtol=1e-5, atol=1e-6)
    assert rows == [[None] * 6] * 3


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


LAYOUTS = {
    "0-dim": torch.tensor(3.0),
    "contiguous": torch.arange(6.0).reshape(2, 3),
    "transposed": torch.arange(6.0).reshape(2, 3).T,
    "channels_last": torch.arange(24.0).view(1, 2, 3, 4).to(memory_format=torch.channels_last),
    "every second": torch.arange(12.0)[::2],
    "expanded": torch.arange(3.0)[:, None].expand(3, 2),
}


@pytest.mark.parametrize("mode", ["dense", "ghost", "representation", "subset"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_shapes_and_strides(layout, mode):
    """Those that loss.backward() gives, whatever strides the gradients of the losses have."""
    value = LAYOUTS[layout]
    others = [torch.rand(value.shape), torch.rand(value.shape[::-1])]
    others[1] = others[1].permute(tuple(reversed(range(value.dim()))))
    true, parameter = (nn.Parameter(value) for _ in range(2))
    assert parameter.stride() == value.stride()
    (0.5 * (true * others[0]).sum() + 0.5 * (true * others[1]).sum()).backward()
    kind = [parameter] if mode == "subset" else mode
    opt = CAGradClip(torch.optim.SGD([parameter], 0.1), [0.5, 0.5], c=0.0, gradients=kind)
    for k in range(2):
        z = parameter * 1
        losses = [(z * other).sum() for other in others]
        opt.backward(losses, **({"representation": z} if mode == "representation" else {}))
        torch.testing.assert_close(parameter.grad, (k + 1) * true.grad)
        assert parameter.grad.stride() == true.grad.stride()


@pytest.mark.parametrize("tiny", [1e-30, 1e-38, 1e-41, 1e-44])
def test_a_correction_along_a_subnormal_gradient_has_its_full_length(tiny):
    """p is the vertex of the tiny gradient, so that its coefficient is beyond float32."""
    x = torch.nn.Parameter(torch.ones(2))
    for order in (1, -1):
        opt = CAGradClip(torch.optim.SGD([x], lr=0.1), [0.5, 0.5], c=0.4)
        opt.zero_grad()
        opt.backward([x[0], torch.tensor(tiny) * x[1]][::order])
        torch.testing.assert_close(x.grad, torch.tensor([0.5, 0.2]), rtol=1e-4, atol=0)


# What loss.backward() does beside adding: dtypes and hooks
MODES = ["dense", "ghost", "per_example", "representation", "subset"]


def in_mode(mode, model, inner=None, **options):
    """An optimizer of a network, and a function that runs its `backward` on two losses of it."""
    options |= {"model": model} if mode == "per_example" else {}
    kind = list(model[2].parameters()) if mode == "subset" else mode
    inner = inner or torch.optim.SGD(model.parameters(), 0.1)
    opt = CAGradClip(inner, [0.6, 0.4], gradients=kind, **options)

    def backward(x=None, **kwargs):
        z, losses = scalar_losses(model, batch(0) if x is None else x)
        kwargs |= {"scalars": z} if mode == "per_example" else {}
        kwargs |= {"representation": z} if mode == "representation" else {}
        opt.backward(losses, **kwargs)

    return opt, backward


def scalar_losses(model, x):
    z = model(x.to(next(model.parameters()).dtype)).float().sum(1)
    return z, [(z - 1).square().mean(), (z + 2).square().mean() + z.sin().mean()]


@pytest.mark.skipif(not hasattr(torch.Tensor, "grad_dtype"), reason="since torch 2.10")
@pytest.mark.parametrize("grad_dtype", [torch.float32, torch.bfloat16, None], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("mode", MODES)
def test_grad_has_the_dtype_that_backward_gives_it(mode, dtype, grad_dtype):
    model, other = network(dtype), network(dtype)
    for m in (model, other):
        m[0].weight.grad_dtype = m[2].bias.grad_dtype = grad_dtype
    sum(scalar_losses(other, batch(0))[1]).backward()
    opt, backward = in_mode(mode, model)
    backward()
    expected = [p.grad.dtype for p in other.parameters()]
    assert [p.grad.dtype for p in model.parameters()] == expected
    once = [p.grad.clone() for p in model.parameters()]
    backward()
    assert [p.grad.dtype for p in model.parameters()] == expected
    torch.testing.assert_close([p.grad for p in model.parameters()], [2 * g for g in once])
    opt.step()


def test_a_longer_gradient_than_its_parameter_is_kept_where_any_dtype_is_allowed():
    class Longer(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.float().sum()

        @staticmethod
        def backward(ctx, grad):
            return torch.full((2,), 1 + 2.0**-20)

    if not hasattr(torch.Tensor, "grad_dtype"):
        pytest.skip("since torch 2.10")
    x, y = (nn.Parameter(torch.ones(2, dtype=torch.bfloat16)) for _ in range(2))
    x.grad_dtype = y.grad_dtype = None
    Longer.apply(y).backward()
    CAGradClip(torch.optim.SGD([x], 0.1), [0.5, 0.5], c=0.0).backward([Longer.apply(x)] * 2)
    assert x.grad.dtype == y.grad.dtype == torch.float32
    assert torch.equal(x.grad, y.grad)


@pytest.mark.parametrize("mode", MODES)
def test_post_accumulate_hooks_run_once_on_the_combined_gradient(mode):
    """Torch's recipe too: each parameter has an optimizer, which steps and zeroes in a hook."""
    model, plain = network(), network()
    each = {p: torch.optim.AdamW([p], 0.1) for p in model.parameters()}
    seen = []

    def step(p):
        seen.append(p.grad.clone())
        each[p].step()
        each[p].zero_grad()

    for p in model.parameters():
        p.register_post_accumulate_grad_hook(step)
    _, backward = in_mode(mode, model)
    opt, plain_backward = in_mode(mode, plain, torch.optim.AdamW(plain.parameters(), 0.1))
    for k in range(3):
        seen.clear()
        backward(batch(k))
        opt.zero_grad()
        plain_backward(batch(k))
        assert bits(seen) == bits([p.grad for p in plain.parameters()])
        opt.step()
    assert all(p.grad is None for p in model.parameters())
    assert bits(model.state_dict()) == bits(plain.state_dict())


def test_hooks_of_a_parameter_see_the_gradient_of_one_loss():
    """A clamp of the gradients gives 0 where one of the weighted sum leaves 0.1."""
    grads = []
    for per_loss in (False, True):
        x = nn.Parameter(torch.zeros(()))
        x.register_hook(lambda g: g.clamp(-0.5, 0.5))
        losses = [1.0 * x, -0.8 * x]
        if per_loss:
            CAGradClip(torch.optim.SGD([x], 0.1), [0.5, 0.5], c=0.0).backward(losses)
        else:
            (0.5 * losses[0] + 0.5 * losses[1]).backward()
        grads.append(float(x.grad))
    assert grads == pytest.approx([0.1, 0.0])


# `.grad` is written for all parameters or for none
class InterruptAt:
    """Raises KeyboardInterrupt at the k-th line of the package that is run, as Ctrl-C may."""

    ROOT = str(Path(raco_optim.__file__).parent)

    def __init__(self, k):
        self.left = k

    def __call__(self, frame, event, arg):
        if not frame.f_code.co_filename.startswith(self.ROOT):
            return None
        if event == "line":
            self.left -= 1
            if self.left == 0:
                raise KeyboardInterrupt
        return self

    def __enter__(self):
        sys.settrace(self)
        return self

    def __exit__(self, *error):
        sys.settrace(None)
        torch.set_grad_enabled(True)  # which torch forgets where `no_grad` is left by an interrupt


@pytest.mark.parametrize(
    ("mode", "existing", "call"),
    [
        ("dense", 0, "combine"),
        ("dense", 1, "combine micro-batches"),
        ("dense", 4, "combine"),
        ("dense", 1, "accumulate"),
        *[(mode, 1, "combine") for mode in ("ghost", "per_example", "representation")],
    ],
)
def test_an_interrupt_comes_before_or_after_all_gradients(mode, existing, call):
    def begin():
        model = network()
        opt, backward = in_mode(mode, model)
        backward(batch(0))
        opt.zero_grad()
        for p in list(model.parameters())[:existing]:
            p.grad = torch.ones_like(p)
        if call == "combine micro-batches":
            backward(batch(1), accumulate=True)
        return model, opt, backward

    accumulate = {"accumulate": True} if call == "accumulate" else {}

    def grads(model):
        return bits([p.grad for p in model.parameters()])

    model, opt, backward = begin()
    before = grads(model)
    with InterruptAt(0) as lines:
        backward(batch(2), **accumulate)
    finished, number = grads(model), -lines.left
    outcomes = []
    # All of the last lines, which write, and some of those before.
    for k in [*range(1, number - 59, 23), *range(number - 59, number + 1)]:
        model, opt, backward = begin()
        progress = opt._core.progress
        with pytest.raises(KeyboardInterrupt), InterruptAt(k):
            backward(batch(2), **accumulate)
        changed = opt._core.progress is not progress
        assert grads(model) == (finished if changed and not accumulate else before)
        outcomes.append(changed)
        if not changed:  # nothing has happened, and the call can be made again
            backward(batch(2), **accumulate)
            assert grads(model) == finished
    assert outcomes == sorted(outcomes)
    assert not outcomes[-60], "all that writes is among the last lines"


@pytest.fixture
def ctrl_c():
    """Python's own handler of Ctrl-C, which a shell takes away from a job in the background."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield _thread.interrupt_main
    signal.signal(signal.SIGINT, before)


@pytest.mark.parametrize("existing", [False, True])
def test_an_interrupt_while_gradients_are_written_comes_after_all(existing, ctrl_c):
    parameters = [nn.Parameter(torch.zeros(2)) for _ in range(3)]
    if existing:
        parameters[1].grad = torch.ones(2)
    with pytest.raises(KeyboardInterrupt):
        write_gradients(parameters, [torch.ones(2) for _ in range(3)], ctrl_c)
    assert [p.grad.tolist() for p in parameters] == [[1, 1], [1 + existing] * 2, [1, 1]]


def test_nothing_is_written_where_a_gradient_can_not_be_added():
    """To a `.grad` that is one number, expanded, as a user may set it."""
    parameters = [nn.Parameter(torch.zeros(2)) for _ in range(3)]
    parameters[1].grad = torch.ones(1).expand(2)
    with pytest.raises(RuntimeError):
        add_combined_gradient(parameters, [[torch.ones(2)] * 3], torch.ones(1))
    assert [p.grad is None for p in parameters] == [True, False, True]
    assert parameters[1].grad.tolist() == [1, 1]
