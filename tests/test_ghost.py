"""Mode "ghost": the same step as with materialized gradients, whatever the model."""

import copy
import math
import weakref
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.optim import SGD, AdamW
from torch.utils.checkpoint import checkpoint

from raco_optim import CAGradClip, MultiObjectiveOptimizer
from raco_optim.gradients import ghost
from raco_optim.gradients.dense import Memory
from raco_optim.objectives import Batch
from raco_optim.wrapper.parameters import Roles
from tests.ghost_models import (
    CASES,
    Heads,
    Net,
    Tied,
    chain,
    data,
    heads,
    linear,
    matrix,
    mlp,
    net,
    of,
    three,
    x_of,
)
from tests.problems_nn import Buffered, OwnBackward, bits, breaks, flat_grad
from tests.test_no_sync import NO_VALUE
from tests.tiny_language_models import FAMILIES, tiny_model

DOUBLE, SINGLE = torch.float64, torch.float32
TOLERANCE = {DOUBLE: 1e-12, SINGLE: 1e-5}
BOTH = pytest.mark.parametrize("dtype", [DOUBLE, SINGLE], ids=["float64", "float32"])
MODES = ("ghost", "dense")
X = data(6, 5)
of_x = of(6, 5)

# What does not hold today. Strict: a test that passes again says so.
KNOWN = {
    "hook": "hooks on what a weight was turned into don't show in output gradients",
    "buffer": "the output gradient may be a tensor that the next backward pass overwrites",
    "cancellation": "with K in float64 the error of the Gram matrix is that of a square",
    "nan elsewhere": "0 * NaN: the inputs of another loss make the Gram matrix of this one NaN",
    "recomputed": "every saved tensor that is read recomputes its checkpoint",
    "not freed": "a node whose gradients nobody needs is not run, nor freed",
}


def bug(name):
    return pytest.mark.xfail(strict=True, reason=KNOWN[name])


def cover_all(monkeypatch):
    monkeypatch.setattr(ghost, "_is_cheaper", lambda uses: uses.losses > 0)


@pytest.fixture
def forced(monkeypatch):
    """Covers every layer that can be covered, however small."""
    cover_all(monkeypatch)


def wrapped(parameters, losses, mode="ghost", weights=None, **options):
    weights = weights or [1 / len(losses)] * len(losses)
    return CAGradClip(SGD(parameters, lr=0.1), weights, gradients=mode, **options)


def step(mode, model, losses, weights=None, *, parameters=nn.Module.parameters, **options):
    """The optimizer after one `backward` on a copy of the model, and the copy."""
    model = copy.deepcopy(model)
    torch.manual_seed(0)
    terms = losses(model)
    if options.get("shared_parameters") is not None:
        options["shared_parameters"] = options["shared_parameters"](model)
    opt = wrapped(parameters(model), terms, mode, weights, **options)
    opt.backward(terms)
    return opt, model


def in_both(model, use, make=CAGradClip, rule=(1 / 3, 1 / 3, 1 / 3), inner=SGD, **settings):
    """The optimizers and copies of the model after ``use(optimizer, model)``, by mode."""
    found = []
    for mode in MODES:
        copied = copy.deepcopy(model)
        opt = make(inner(copied.parameters(), lr=0.01), rule, gradients=mode, **settings)
        torch.manual_seed(0)
        use(opt, copied)
        found.append((opt, copied))
    return found


def witness(model, losses, dtype=DOUBLE):
    """Per-loss gradients, ``[m, n]`` float64, by plain backward passes, and who is reached."""
    model = copy.deepcopy(model).to(dtype)
    torch.manual_seed(0)
    rows, reached = [], set()
    for loss in losses(model):
        model.zero_grad()
        if loss is not None:
            loss.backward(retain_graph=True)
        rows.append(flat_grad(model))
        reached |= {name for name, p in model.named_parameters() if p.grad is not None}
    return torch.stack(rows), reached


def gram_error(found, expected):
    """The largest error of an entry, relative to |g_i| |g_j|."""
    size = expected.diagonal().sqrt()
    return float(((found - expected).abs() / (size[:, None] * size).clamp(min=1e-300)).max())


def assert_gram(found, expected, tolerance):
    assert found.dtype == DOUBLE
    assert not found.requires_grad
    assert torch.equal(found, found.T)
    assert gram_error(found, expected) <= tolerance


def assert_grad(p, expected, tolerance):
    assert p.grad.shape == p.shape
    error = float((p.grad.double() - expected).norm())
    assert error <= tolerance * float(expected.double().norm())


def assert_grads(found, expected, tolerance):
    for (name, p), q in zip(found.named_parameters(), expected.parameters(), strict=True):
        assert (p.grad is None) == (q.grad is None), name
        if p.grad is not None:
            assert p.grad.dtype == q.grad.dtype
            assert_grad(p, q.grad, tolerance)


def assert_exact(opt, model, losses, tolerance):
    """One step in the mode, against plain backward passes."""
    J, reached = witness(model, losses, next(model.parameters()).dtype)
    assert_gram(opt.report.gram, J @ J.T, tolerance)
    sizes = [p.numel() for p in model.parameters()]
    combined = (opt.report.coefficients @ J).split(sizes)
    for (name, p), g in zip(model.named_parameters(), combined, strict=True):
        assert (p.grad is not None) == (name in reached), name
        if p.grad is not None:
            assert p.grad.dtype == p.dtype
            assert_grad(p, g.view_as(p), tolerance)


def assert_equal(model, losses, tolerance=1e-12, weights=None, **options):
    """One step in both modes; returns the one in mode "ghost"."""
    opt, found = step("ghost", model, losses, weights, **options)
    expected_opt, expected = step("dense", model, losses, weights, **options)
    report, true = opt.report, expected_opt.report
    assert_gram(report.gram, true.gram, tolerance)
    torch.testing.assert_close(report.p, true.p, rtol=0, atol=100 * tolerance, equal_nan=True)
    torch.testing.assert_close(report.losses, true.losses, rtol=0, atol=0, equal_nan=True)
    assert (report.names, report.absent) == (true.names, true.absent)
    assert_grads(found, expected, tolerance)
    return opt, found


def collected(model, losses):
    """What the mode knows of the gradients, all parameters shared."""
    torch.manual_seed(0)
    terms = losses(model)
    names, m = tuple(map(str, range(len(terms)))), len(terms)
    groups = [{"params": list(model.parameters())}]
    parameters = Roles(None, None, groups).current(groups)
    batch = Batch(names, terms, [1 / m] * m, parameters, None, None, None, retain_graph=False)
    return ghost.collect(batch, Memory())


def covered(model, losses):
    """Names of the parameters without a gradient of their own."""
    found = collected(copy.deepcopy(model), losses).layers
    return {name for j, (name, _) in enumerate(model.named_parameters()) if j in found}


# All kinds of models


@BOTH
@pytest.mark.parametrize("name", CASES)
def test_equals_plain_backward_passes(name, dtype, forced):
    case = CASES[name]
    model = case.make().to(dtype)
    opt, found = step("ghost", model, case.losses)
    assert_exact(opt, found, case.losses, TOLERANCE[dtype])
    if dtype == DOUBLE and case.covers is not None:
        assert covered(model, case.losses) == set(case.covers.split())


def token_losses(ids):
    """Of a language model: likelihoods of some tokens, an entropy, and a pull on the logits."""

    def losses(model):
        logits = model(input_ids=ids).logits.float()
        log_probs = logits.log_softmax(-1)
        chosen = log_probs[:, :-1].gather(2, ids[:, 1:, None])
        entropy = -(log_probs.exp() * log_probs).sum(-1).mean()
        return [-chosen[:1].mean(), chosen[1:].sum().sigmoid(), entropy, logits[0].square().mean()]

    return losses


FORMS = ("untied", "tied", "checkpointing")


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("family", FAMILIES)
def test_language_models(family, form, forced):
    """In either precision, so that each family and each form has both."""
    dtype = (DOUBLE, SINGLE)[(list(FAMILIES).index(family) + FORMS.index(form)) % 2]
    model = tiny_model(family).to(dtype).train()
    if form == "checkpointing":
        model.gradient_checkpointing_enable({"use_reentrant": False})
    else:
        embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
        own = nn.Parameter(embedding.weight.detach() + 0.1)
        head.weight = embedding.weight if form == "tied" else own
    losses = token_losses(torch.randint(3, 20, (2, 6)))
    assert_equal(model, losses, TOLERANCE[dtype])
    matrices = {name for name, p in model.named_parameters() if p.dim() == 2}
    assert covered(model, losses) == matrices


class Program(nn.Module):
    """Runs a list of operations over few weights, which are used again and again."""

    def __init__(self, operations, losses):
        super().__init__()
        self.w = nn.ParameterList(matrix(4, 4) for _ in range(2))
        self.table = matrix(6, 4)
        self.kernel, self.image = matrix(4, 4, 2), matrix(1, 1, 3, 2)
        self.bias = matrix(4)
        self.operations, self.of_losses = operations, losses

    def losses(self):
        states = [data(2, 3, 4)]
        for operation, i, j in self.operations:
            h = OPERATIONS[operation](self, self.w[i], states[-1], states[j % len(states)])
            states.append(h)
        losses = []
        for k, (kind, j) in enumerate(self.of_losses):
            h = states[-1 - j % len(states)]
            wave = torch.linspace(-1, 1 + k, h.numel(), dtype=h.dtype).view_as(h)
            term = {
                "none": None,
                "square": (h - k).square().mean(),
                "wave": (h * wave).sin().sum(),
                "first": h.flatten()[0].exp(),
                "penalty": h.sin().mean() + 0.1 * self.w[0].square().sum(),
            }[kind]
            # What every loss reaches, with a gradient of some size.
            losses.append(None if term is None else term + (self.bias * (k + 1)).sin().sum())
        return losses


def part_in_place(_, __, h, other):
    h = h * 1
    h[:, 1] += other[:, 0]
    return h


def strided(m, _, h, __):
    return F.pad(F.conv1d(h.mT, m.kernel, m.bias, stride=2, padding=1), (0, 1)).mT


IDS = torch.tensor([[1, 5, 1], [0, 2, 1]])
# name -> (model, one of its matrices, last state, any earlier one) -> the next state
OPERATIONS = {
    "linear": lambda m, w, h, _: F.linear(h, w, m.bias),
    "no bias": lambda m, w, h, _: F.linear(h, w),
    "factor": lambda m, w, h, _: h @ w,
    "flat": lambda m, w, h, _: F.linear(h.reshape(-1, 4), w, m.bias).view_as(h),
    "transposed": lambda m, w, h, _: F.linear(h.transpose(0, 1), w).transpose(0, 1),
    "expanded": lambda m, w, h, _: h + F.linear(h[:1].expand(2, 3, 4), w, m.bias),
    "convolution": lambda m, w, h, _: F.conv1d(F.pad(h.mT, (1, 0)), m.kernel).mT,
    "strided convolution": strided,
    "image": lambda m, w, h, _: F.conv2d(h[:, None], m.image, padding=1, dilation=(1, 2))[:, 0],
    "lookup": lambda m, w, h, _: h + F.embedding(IDS, m.table),
    "padded lookup": lambda m, w, h, _: h + F.embedding(IDS, m.table, 1),
    "head": lambda m, w, h, _: F.linear(h, m.table)[..., 2:],
    "soft lookup": lambda m, w, h, _: F.linear(h, m.table).softmax(-1) @ m.table,
    "tanh": lambda m, w, h, _: h.tanh(),
    "gelu": lambda m, w, h, _: F.gelu(h),
    "norm": lambda m, w, h, other: F.layer_norm(h + 0.1 * other, (4,)),
    "add": lambda m, w, h, other: h + other,
    "multiply": lambda m, w, h, other: h * other.tanh(),
    "in place": lambda m, w, h, other: (h + 0).mul_(other).sigmoid_(),
    "part in place": part_in_place,
    "detach": lambda m, w, h, _: h.detach() + 0.5 * h,
    "checkpoint": lambda m, w, h, _: checkpoint(
        lambda h: F.linear(h, w).tanh(), h, use_reentrant=False
    ),
    "dropout": lambda m, w, h, _: F.dropout(h, 0.3),
    "cast": lambda m, w, h, _: F.linear(h.float().double(), w),
}
STATES = st.integers(0, 8)
KINDS = st.sampled_from(["square", "wave", "first", "none", "penalty"])


@given(
    st.lists(
        st.tuples(st.sampled_from(list(OPERATIONS)), st.integers(0, 1), STATES),
        min_size=1,
        max_size=8,
    ),
    st.lists(st.tuples(KINDS, STATES), min_size=1, max_size=4).filter(
        lambda losses: any(kind != "none" for kind, _ in losses)
    ),
    st.integers(0, 3),
)
def test_random_networks(operations, losses, seed):
    torch.manual_seed(seed)
    model = Program(operations, losses).double()

    def rule(gram):  # of the losses that are there
        return torch.linspace(0.5, 1.5, len(gram), dtype=DOUBLE)

    opt = MultiObjectiveOptimizer(SGD(model.parameters(), 0.1), rule, gradients="ghost")
    with pytest.MonkeyPatch.context() as patch:
        cover_all(patch)
        torch.manual_seed(0)
        opt.backward(model.losses())
    assert_exact(opt, model, Program.losses, 1e-10)


# The rule for what is cheaper: half the multiplications of m gradients, which in float64 take twice
# the time


@pytest.mark.parametrize(("m", "dtype"), [(2, DOUBLE), (5, SINGLE)], ids=str)
def test_covers_large_layers_by_itself(m, dtype):
    """Few rows, and a last layer that is too narrow."""
    layers = nn.Linear(64, 96), nn.GELU(), nn.LayerNorm(96), nn.Linear(96, 80), nn.Tanh()
    model = nn.Sequential(*layers, nn.Linear(80, 2)).to(dtype)

    def losses(model):
        y = model(x_of(model, 8, 64))
        return [(y * x_of(model, 8, 2, seed=i) - i).sin().mean() for i in range(m)]

    opt, found = step("ghost", model, losses)
    assert_exact(opt, found, losses, TOLERANCE[dtype])
    assert covered(model, losses) == {"0.weight", "3.weight"}


def repeated(layer, uses):
    h = torch.ones(1, 16)
    for _ in range(uses):
        h = layer(h).tanh()
    return h


def of_a_product(a, b):
    """Products of the inputs, and of these with every delta, against those of m gradients."""
    return lambda n, m: 2 * n * (a + m * b) < (m - 1) * a * b


# name -> (layer, output for size n, whether m gradients are dearer)
RULES = {
    "linear 3 -> 4": (nn.Linear(3, 4), lambda f, n: f(torch.ones(n, 3)), of_a_product(3, 4)),
    "linear 3 -> 21": (nn.Linear(3, 21), lambda f, n: f(torch.ones(n, 3)), of_a_product(3, 21)),
    "linear 16 -> 4": (nn.Linear(16, 4), lambda f, n: f(torch.ones(n, 16)), of_a_product(16, 4)),
    "linear 16 -> 21": (nn.Linear(16, 21), lambda f, n: f(torch.ones(n, 16)), of_a_product(16, 21)),
    "uses are added": (nn.Linear(16, 16), repeated, of_a_product(16, 16)),
    "convolution": (
        nn.Conv2d(3, 8, (2, 4), stride=(2, 1), padding=(1, 2)),
        lambda f, n: f(torch.ones(2, 3, 2 * n - 1, 1)),
        lambda n, m: of_a_product(24, 8)(4 * n, m),  # 2 x n x 2 positions
    ),
    # Rows that were looked up against all rows of the table.
    "embedding": (
        nn.Embedding(12, 5),
        lambda f, n: f(torch.arange(n) % 12),
        lambda n, m: m * n < (m - 1) * 12,
    ),
    "tied": (
        Tied(),
        lambda f, n: f(torch.arange(n) % 9),
        lambda n, m: 2 * (n * (5 + m * 9) + m * n * 5) < (m - 1) * 5 * 9,
    ),
}


@pytest.mark.parametrize("name", RULES)
def test_rule_of_a_layer(name):
    """At the sizes on both sides of the limit, for several numbers of losses."""
    layer, output, is_cheaper = RULES[name]
    weight = next(iter(dict(layer.named_parameters())))
    seen = set()
    for m in (1, 2, 3, 7, 40):
        limit = next(n for n in range(1, 100) if not is_cheaper(n, m))
        for n in {max(1, limit - 1), limit}:

            def losses(layer, n=n, m=m):
                return list(output(layer, n).sin().sum() * torch.ones(m))

            cheaper = n < limit
            assert (weight in covered(layer, losses)) == cheaper
            seen.add(cheaper)
    assert seen == {False, True}


def test_losses_that_miss_a_layer_do_not_count():
    """Six heads, one for each loss: for a head that is one gradient, which nothing beats."""
    model = nn.ModuleList([nn.Linear(20, 30), *(nn.Linear(30, 40) for _ in range(6))])

    def losses(model):
        h = model[0](torch.ones(2, 20)).tanh()
        return [head(h).square().sum() for head in list(model)[1:]]

    assert covered(model, losses) == {"0.weight"}


# Forms of losses, weights and parameters


def micro_batches(opt, model, absent=None):
    for t in range(3):
        losses = three(model(data(6, 5, seed=t)))
        if absent is not None and t == 1:
            losses[absent] = None
        opt.backward(losses, accumulate=t < 2)


def added_to_grad(opt, model):
    held = [torch.ones_like(p) for p in model.parameters()]
    for p, g in zip(model.parameters(), held, strict=True):
        p.grad = g
    opt.backward(of_x(model))
    assert all(p.grad is g for p, g in zip(model.parameters(), held, strict=True))


def steps(opt, model, number=4):
    for t in range(number):
        opt.zero_grad()
        opt.backward(three(model(data(6, 5, seed=t))))
        opt.step()


def without_gradients(opt, model):
    losses = of_x(model)
    with torch.no_grad():
        opt.backward(losses)


# name -> (use of the optimizer, how it is made)
USES = {
    "callables": (lambda o, m: o.backward([lambda i=i: of_x(m)[i] for i in range(3)]), {}),
    "one callable": (lambda o, m: o.backward([*of_x(m)[:2], lambda: of_x(m)[2]]), {}),
    "micro-batches": (micro_batches, {}),
    "micro-batches, one without a loss": (lambda *x: micro_batches(*x, absent=1), {}),
    "grad that is there is added to": (added_to_grad, {}),
    "one Gram matrix for two steps": (steps, {"gram_every": 2}),
    "twenty steps": (lambda *x: steps(*x, number=20), {"inner": AdamW}),
    "another rule": (
        lambda o, m: o.backward(of_x(m)),
        {"make": MultiObjectiveOptimizer, "rule": lambda gram: gram.diagonal().rsqrt()},
    ),
    "names": (
        lambda o, m: o.backward(dict(zip("abc", of_x(m), strict=True))),
        {"rule": {"c": 0.2, "a": 0.5, "b": 0.3}},
    ),
    "no_grad": (without_gradients, {}),
}


@pytest.mark.parametrize("name", USES)
def test_uses_of_the_optimizer(name, forced):
    use, settings = USES[name]
    (opt, found), (expected_opt, expected) = in_both(mlp().double(), use, **settings)
    assert opt.report.names == expected_opt.report.names
    assert_gram(opt.report.gram, expected_opt.report.gram, 1e-10)
    assert_grads(found, expected, 1e-10)
    for p, q in zip(found.parameters(), expected.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(
    "shared",
    [
        lambda m: m.trunk.parameters(),
        lambda m: [m.trunk.weight],
        lambda m: [*m.trunk.parameters(), *m.heads.parameters()],
        lambda m: m.heads[1].parameters(),
    ],
    ids=["trunk", "one weight", "all but one layer of all losses", "one head"],
)
def test_shared_parameters(shared, forced):
    """All others get the weighted sum."""
    model, weights = Heads().double(), [0.2, 0.5, 0.3]
    _, found = assert_equal(model, heads, 1e-12, weights, shared_parameters=shared)
    chosen = {id(p) for p in shared(found)}
    mean = torch.tensor(weights, dtype=DOUBLE) @ witness(model, heads)[0]
    sizes = [p.numel() for p in found.parameters()]
    for p, g in zip(found.parameters(), mean.split(sizes), strict=True):
        if id(p) not in chosen and p.grad is not None:
            torch.testing.assert_close(p.grad.reshape(-1), g)


@pytest.mark.filterwarnings("ignore:the losses depend on")
@pytest.mark.parametrize("chosen", [[0], [2], [0, 3], [2, 1]], ids=str)
def test_some_parameters_of_the_model(chosen, forced):
    """The other ones, and what belongs to no optimizer, are left alone."""

    def parameters(model):
        return [list(model.parameters())[j] for j in chosen]

    _, found = assert_equal(mlp().double(), of_x, parameters=parameters)
    assert [j for j, p in enumerate(found.parameters()) if p.grad is not None] == sorted(chosen)


# Hooks


def times(k):
    """A hook of a module or node; some gradients are None."""
    return lambda *x: tuple(None if g is None else k * g for g in x[-2 if len(x) == 3 else -1])


# name -> (hook of a layer, whether the layer stays covered)
HOOKS = {
    "of the weight": (lambda m: m.weight.register_hook(lambda g: 2 * g), False),
    "of the weight, removed": (lambda m: m.weight.register_hook(lambda g: 2 * g).remove(), True),
    "forward": (lambda m: m.register_forward_hook(lambda _, __, y: 3 * y + 1), True),
    "forward pre": (lambda m: m.register_forward_pre_hook(lambda _, x: (2 * x[0],)), True),
    "full backward": (lambda m: m.register_full_backward_hook(times(3)), True),
    "full backward pre": (lambda m: m.register_full_backward_pre_hook(times(3)), True),
    "backward, of the old kind": (lambda m: m.register_backward_hook(times(2)), False),
}


@pytest.mark.filterwarnings("ignore:Full backward hook is firing", "ignore:Using a non-full")
@pytest.mark.parametrize("kind", HOOKS)
def test_hooks_of_layers(kind, forced):
    hook, stays = HOOKS[kind]

    def losses(model):
        hook(model[0])
        hook(model[2])
        return of_x(model)

    model = mlp().double()
    assert_equal(model, losses)
    assert covered(model, losses) == ({"0.weight", "2.weight"} if stays else set())


LAYERS = {
    "linear": (lambda: nn.Linear(5, 7), X),
    "linear, no bias": (lambda: nn.Linear(5, 7, bias=False), X),
    "linear, 3-D": (lambda: nn.Linear(5, 7), data(2, 3, 5)),
    "convolution": (lambda: nn.Conv2d(3, 4, 2), data(2, 3, 4, 4)),
    "embedding": (lambda: nn.Embedding(9, 5), torch.tensor([3, 1, 1])),
}
# Of an output, or of the node that computes it.
OUTPUT_HOOKS = {
    "on the output": lambda h: h.register_hook(lambda g: g.clamp(-0.01, 0.02)),
    "retained": lambda h: h.retain_grad(),
    "before its node": lambda h: h.grad_fn.register_prehook(times(2)),
    "behind its node": lambda h: h.grad_fn.register_hook(lambda gx, _: times(2)(gx)),
}


@pytest.mark.parametrize("hook", OUTPUT_HOOKS)
@pytest.mark.parametrize("layer", LAYERS)
def test_hooks_that_change_the_gradient_of_an_output(layer, hook, forced):
    make, x = LAYERS[layer]

    def losses(module):
        h = module(x)
        OUTPUT_HOOKS[hook](h)
        return three(h.sin())

    assert_equal(make().double(), losses)


@bug("hook")
def test_hook_on_a_transposed_weight(forced):
    def losses(model):
        w = model[0].weight.t()
        w.register_hook(lambda g: 2 * g)
        return three(X @ w)

    assert_equal(mlp().double(), losses)


# What user code does in a backward pass


class Into(torch.autograd.Function):
    """Returns its gradient in one buffer, every time."""

    @staticmethod
    def forward(ctx, x, buffer):
        ctx.save_for_backward(x)
        ctx.buffer = buffer
        return x.square().sum(-1)

    @staticmethod
    def backward(ctx, grad):
        return torch.mul(2 * grad[:, None], ctx.saved_tensors[0], out=ctx.buffer), None


@bug("buffer")
def test_output_gradient_in_a_buffer_that_is_used_again(forced):
    def losses(model):
        z = Into.apply(model(X), torch.zeros(6, 7, dtype=DOUBLE))
        return [z.mean(), z.sin().sum(), z[0].exp()]

    assert_equal(nn.Linear(5, 7).double(), losses)


def test_output_gradient_that_is_the_users_tensor(forced):
    """It is left as it was."""
    target = data(6, 7)
    before = bits(target)

    def losses(model):
        y = model(X)
        return [Buffered.apply(y, target), y.square().mean()]

    assert_equal(nn.Linear(5, 7).double(), losses)
    assert bits(target) == before


def test_compiled_region_falls_back(forced):
    """A layer behind a compiled region is seen, one in it isn't."""
    torch.compiler.reset()

    def losses(model):
        return three(model[2](torch.compile(model[:2], backend="aot_eager")(X)))

    model = mlp().double()
    with torch._functorch.config.patch(donated_buffer=False):
        assert_equal(model, losses)
        assert covered(model, losses) == {"2.weight"}
    torch.compiler.reset()


class Counting(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(*(nn.Linear(5, 5) for _ in range(4)), nn.BatchNorm1d(5))
        self.passes = 0

    def forward(self, x):
        self.passes += 1
        return self.layers(x)


@pytest.mark.parametrize(
    "cover", [pytest.param(c, marks=bug("recomputed")) for c in (False, True)], ids=["no", "yes"]
)
def test_checkpoint_is_recomputed_once_for_each_loss(cover, monkeypatch):
    """As often as without the mode; one pass more might be the price of the inputs."""
    if cover:
        cover_all(monkeypatch)

    def losses(model):
        return three(checkpoint(model, X.float(), use_reentrant=False))

    found, expected = (step(mode, Counting(), losses)[1].passes for mode in MODES)
    assert expected == 4
    assert found <= expected + cover


# Precision


def error(found, truth):
    return float((found.double() - truth).norm() / truth.norm())


def in_autocast(dtype, inside):
    def losses(model):
        low = next(model.parameters()).dtype == SINGLE
        with torch.autocast("cpu", dtype, enabled=low):
            return inside(model)

    return losses


DEEP = chain(linear(5, 30), nn.GELU, partial(nn.LayerNorm, 30), linear(30, 20))
LOW = {
    "mlp": (mlp, of_x),
    "deep": (DEEP, of_x),
    "tied": (Tied, CASES["tied"].losses),
    "twice": (CASES["twice"].make, of_x),
    "convolution": (lambda: nn.Conv2d(3, 4, 3, padding=1), of(2, 3, 6, 5)),
}
LOW_FORMS = ("autocast", "autocast around backward", "parameters")


@pytest.mark.parametrize("form", LOW_FORMS)
@pytest.mark.parametrize("name", LOW)
def test_low_precision(name, form, forced):
    """Near the other mode, and about as near to the gradients of float64.

    In bfloat16 or float16, so that each model and each form has both.
    """
    make, inside = LOW[name]
    halves = (torch.bfloat16, torch.float16)
    dtype = halves[(list(LOW).index(name) + LOW_FORMS.index(form)) % 2]
    model = make()
    losses = in_autocast(dtype, inside)
    if form == "parameters":
        model, losses = model.to(dtype), inside
    J, _ = witness(model, losses)
    alpha = torch.tensor([0.5, 0.3, 0.2], dtype=DOUBLE)
    grams, grads, errors = [], [], []
    for mode in MODES:
        copied = copy.deepcopy(model)
        opt = MultiObjectiveOptimizer(
            SGD(copied.parameters(), lr=0.1), lambda _: alpha, gradients=mode
        )
        terms = losses(copied)
        with torch.autocast("cpu", dtype, enabled=form == "autocast around backward"):
            opt.backward(terms)
        grams.append(opt.report.gram)
        grads.append(flat_grad(copied))
        errors.append((gram_error(grams[-1], J @ J.T), error(grads[-1], alpha @ J)))
    assert_gram(*grams, 2e-2)
    assert error(*grads) < 2e-2
    floor = torch.finfo(dtype).eps / 4
    for found, expected in zip(*errors, strict=True):
        assert found <= 2 * max(expected, floor)
    if (form, dtype) != ("parameters", torch.float16):  # these may fall back, since they overflow
        assert covered(model, losses)


def nearly_solved(model, distance):
    """Least squares near the solution, where inputs and output gradients are nearly orthogonal."""
    x, target = torch.randn(32, 5, dtype=DOUBLE), torch.randn(32, 7, dtype=DOUBLE)
    best = torch.linalg.lstsq(x, target).solution.T
    with torch.no_grad():
        model.weight.copy_(best + distance * data(7, 5, seed=4))

    def losses(model):
        residual = (model(x.to(model.weight.dtype)) - target.to(model.weight.dtype)).square().sum(0)
        return [residual[0] + residual[5], residual[1:3].sum(), residual[3:].sum()]

    return losses


@pytest.mark.parametrize(
    ("dtype", "distance"),
    [
        *((SINGLE, distance) for distance in (1, 1e-2, 1e-3, 1e-4, 0)),
        *((DOUBLE, distance) for distance in (1e-2, 1e-3)),
        *(pytest.param(DOUBLE, x, marks=bug("cancellation")) for x in (1e-5, 1e-7)),
    ],
    ids=str,
)
def test_gradients_much_smaller_than_their_terms(dtype, distance, forced):
    """The Gram matrix is about as exact as that of materialized gradients, and no less definite."""
    model = nn.Linear(5, 7, bias=False).to(dtype)
    losses = nearly_solved(model, distance)
    J, _ = witness(model, losses)
    found, expected = (step(mode, model, losses)[0].report.gram for mode in MODES)
    if dtype == DOUBLE:
        assert gram_error(found, expected) <= 1e-10
    else:
        bound = max(gram_error(expected, J @ J.T), TOLERANCE[dtype] / 10)
        assert gram_error(found, J @ J.T) <= 10 * bound
    size = expected.diagonal().sqrt()
    assert float(torch.linalg.eigvalsh(found / (size[:, None] * size))[0]) > -1e-6


@BOTH
@pytest.mark.parametrize("seed", range(3))
def test_gradients_that_are_zero_but_for_rounding(seed, dtype, forced):
    """Whatever is left, a solver takes it for a Gram matrix."""
    torch.manual_seed(seed)
    model = nn.Linear(5, 7, bias=False).to(dtype)
    opt, found = step("ghost", model, nearly_solved(model, 0))
    assert bool((opt.report.gram.diagonal() >= 0).all())
    assert float(found.weight.grad.norm()) < 1e3 * torch.finfo(dtype).eps


@pytest.mark.filterwarnings("ignore:the losses depend on")
def test_inputs_with_a_large_mean_before_batch_normalization(forced):
    model = nn.Sequential(nn.Linear(5, 7, bias=False), nn.BatchNorm1d(7), nn.Linear(7, 4))
    losses = lambda m: three(m((data(32, 5) + 3000).to(m[2].weight.dtype)))  # noqa: E731
    model[0].weight.data = model[0].weight.data.bfloat16().float()
    J = witness(model, losses)[0][:, :35]
    found, expected = (
        gram_error(
            step(mode, model, losses, parameters=lambda m: [m[0].weight])[0].report.gram, J @ J.T
        )
        for mode in MODES
    )
    assert found <= 3 * expected


def twins(y, seed):
    q, r = (data(*y.shape, seed=seed + i, dtype=y.dtype) for i in (100, 200))
    first = (y * q).sum() + y.square().mean()
    return [first, first, (y * r).sum() - 0.9 * first]


@pytest.mark.parametrize("kind", ["linear", "tied"])
@BOTH
def test_equal_losses_have_equal_rows_and_take_the_weights(dtype, kind, forced):
    """But for the last bit of float64, as with materialized gradients.

    Else p is anywhere between the two, and the clipped update with it: up to 27 % off.
    """
    sizes = [(n, a, b) for n in (3, 17, 100) for a in (5, 33) for b in (4, 65, 300)]
    for seed, (n, a, b) in enumerate(sizes):
        torch.manual_seed(seed)
        if kind == "linear":
            model, x = nn.Linear(a, b), data(n, a, dtype=dtype)
        else:
            x = torch.arange(n) % b
            model = Net(lambda m, x: F.linear(m.e(x).tanh(), m.e.weight), e=nn.Embedding(b, a))
        losses = lambda m, x=x, seed=seed: twins(m(x), seed)  # noqa: E731
        opt, _ = assert_equal(model.to(dtype), losses, TOLERANCE[dtype], [0.2, 0.5, 0.3])
        gram = opt.report.gram
        assert float((gram[0] - gram[1]).abs().max()) <= 1e-14 * float(gram[0, 0])


@pytest.mark.parametrize("distance", [1e-2, 1e-4, 1e-6])
def test_nearly_equal_losses(distance, forced):
    model = nn.Linear(30, 40)
    x = data(16, 30, dtype=SINGLE)
    q = [data(16, 40, seed=i, dtype=SINGLE) for i in range(3)]

    def losses(model):
        y = model(x)
        return [(y * q[0]).sum(), (y * (q[0] + distance * q[1])).sum(), (y * (q[2] - q[0])).sum()]

    found, expected = (step(mode, model, losses, [0.2, 0.5, 0.3])[1] for mode in MODES)
    assert_grads(found, expected, 1e-5)


# Numbers that are not finite


def with_a_bad_number(x, bad):
    """One number of the gradient is not finite."""

    def change(grad):
        grad = grad.clone()
        grad.view(-1)[1] = bad
        return grad

    return OwnBackward.apply(x, change)


def poisoned(model, bad=math.nan):
    """The second loss has a bad gradient for the last weight only."""
    first, _, third = of_x(model)
    h = model[1](model[0](X)).detach()
    return [first, with_a_bad_number(model[2](h), bad).square().mean(), third]


NOT_FINITE = {
    "value": lambda m: [of_x(m)[0], of_x(m)[1] * math.nan, of_x(m)[2]],
    "infinite value": lambda m: [of_x(m)[0], of_x(m)[1] / 0, of_x(m)[2]],
    "gradient": poisoned,
    "infinite gradient": lambda m: poisoned(m, math.inf),
    "of an absent one's neighbour": lambda m: [None, *poisoned(m)[1:]],
}


def messages(model, losses, **options):
    """What the two modes say."""
    found = []
    for mode in MODES:
        with pytest.raises(FloatingPointError) as caught:
            step(mode, model, losses, **options)
        found.append(str(caught.value))
    return found


@pytest.mark.parametrize("shared", [None, lambda m: m[0].parameters()], ids=["all", "first layer"])
@pytest.mark.parametrize("name", NOT_FINITE)
def test_not_finite(name, shared, forced):
    model, losses = mlp().double(), NOT_FINITE[name]
    found, expected = messages(model, losses, shared_parameters=shared)
    assert found == expected
    assert "loss '1'" in found
    for nonfinite in ("skip", "propagate"):
        (opt, found), (expected_opt, expected) = (
            step(mode, model, losses, shared_parameters=shared, nonfinite=nonfinite)
            for mode in MODES
        )
        assert opt.report.outcome == expected_opt.report.outcome
        assert torch.equal(opt.report.gram.isfinite(), expected_opt.report.gram.isfinite())
        torch.testing.assert_close(opt.report.p, expected_opt.report.p, equal_nan=True)
        for p, q in zip(found.parameters(), expected.parameters(), strict=True):
            assert (p.grad is None) == (q.grad is None) == (nonfinite == "skip")
            if p.grad is not None:
                torch.testing.assert_close(p.grad, q.grad, equal_nan=True)


def nothing_of(y):
    """Zero whatever y is, with the gradient 0."""
    return torch.where(torch.zeros_like(y, dtype=torch.bool), y, torch.zeros_like(y)).sum()


TWO_LAYERS = net("", lambda m: None, a=linear(5, 7), b=linear(7, 4))


def of_bad_inputs(model, *, absent=False):
    """The layer is used once for each loss, and one of its inputs is NaN."""
    bad = nothing_of(model(X * math.nan))
    return [None if absent else model(X).square().mean(), bad + model(X).mean()]


def of_a_bad_head(model, *, overflow=False):
    """No output gradient shows that the gradient of a head is not finite."""
    z = model.a(X.float()).tanh()
    y = model.b(z.detach() * (1e25 if overflow else math.nan))
    more = ((y - y.detach()) * 1e20).sum() if overflow else nothing_of(y)
    return [z.mean() + model.b(z).mean(), z.square().mean() + model.b(z).sin().mean() + more]


def overflowing(model):
    y = model((100 * X).half()).float()
    return [100 * y.sum(), -7000 * y.sum()]


# name -> (model, losses, shared parameters)
HIDDEN = {
    "inputs": (lambda: nn.Linear(5, 7).double(), of_bad_inputs, None),
    "inputs, another absent": (
        lambda: nn.Linear(5, 7).double(),
        partial(of_bad_inputs, absent=True),
        None,
    ),
    "a head": (TWO_LAYERS.make, of_a_bad_head, lambda m: m.a.parameters()),
    "overflow of a head": (
        TWO_LAYERS.make,
        partial(of_a_bad_head, overflow=True),
        lambda m: m.a.parameters(),
    ),
    "overflow of a parameter": (
        lambda: nn.Linear(5, 7, bias=False).half(),
        overflowing,
        None,
    ),
}


@pytest.mark.parametrize(
    "name",
    [pytest.param(x, marks=[bug("nan elsewhere")] * x.startswith("inputs")) for x in HIDDEN],
)
def test_what_no_output_gradient_shows(name, forced):
    """The message names the loss whose gradient is not finite."""
    make, losses, shared = HIDDEN[name]
    found, expected = messages(make(), losses, shared_parameters=shared)
    assert found == expected


def test_padding_has_no_gradient_even_where_it_is_nan(forced):
    def losses(model):
        return three(with_a_bad_number(model(torch.tensor([0, 1, 2, 2])), math.nan)[1:])

    assert_equal(nn.Embedding(5, 3, padding_idx=0).double(), losses)


# Errors


def freed(model):
    losses = of_x(model)
    losses[1].backward()
    return losses


def overwritten(model):
    h = model[1](model[0](X))
    y = model[2](h)
    h.add_(1)
    return three(y)


def changed_weight(model):
    losses = of_x(model)
    with torch.no_grad():
        model[2].weight.add_(1)
    return losses


def reentrant(model):
    h = model[0](X).requires_grad_()
    return three(checkpoint(model[2], h, use_reentrant=True))


def product():
    w = matrix(5, 7).detach()
    return Net(lambda m, x: (torch.complex(x, x) @ m.w).abs(), w=nn.Parameter(torch.complex(w, w)))


# name -> the losses of a model
ERRORS = {
    "freed graph": freed,
    "overwritten input": overwritten,
    "changed weight": changed_weight,
    "reentrant checkpoint": reentrant,
    "failing backward": lambda m: [of_x(m)[0], breaks(of_x(m)[1])],
    "vector": lambda m: [of_x(m)[0], m(X)[:, 0]],
    "complex": lambda m: [of_x(m)[0], of_x(m)[1] * 1j],
    "detached": lambda m: [of_x(m)[0].detach(), of_x(m)[1]],
    "number": lambda m: [of_x(m)[0], 1.0],
    "all absent": lambda m: [None, None],
    "foreign": lambda m: [of_x(m)[0], torch.ones(2, requires_grad=True, dtype=DOUBLE).sum()],
    "other device": lambda m: [of_x(m)[0], of_x(m)[1].to("meta")],
    "sparse": lambda m: three(m(torch.tensor([1, 2]))),
    "complex parameter": lambda m: three(m(X.float())),
}
REFUSED = {"sparse": lambda: nn.Embedding(9, 5, sparse=True), "complex parameter": product}


@pytest.mark.parametrize("name", ERRORS)
def test_errors(name, forced):
    """Those of the other mode; the failed call changes nothing."""
    found = []
    original = REFUSED.get(name, lambda: mlp().double())()
    for mode in MODES:
        model = copy.deepcopy(original)
        losses = ERRORS[name](model)
        before = bits(model.state_dict())
        for p in model.parameters():
            p.grad = None
        with pytest.raises((TypeError, ValueError, RuntimeError)) as caught:
            wrapped(model.parameters(), losses, mode).backward(losses)
        assert all(p.grad is None for p in model.parameters())
        assert bits(model.state_dict()) == before
        found.append((type(caught.value), str(caught.value)))
    assert found[0] == found[1]
    assert ("sparse=False" in found[0][1]) == (name == "sparse")


# Memory


@pytest.mark.parametrize("fails", [False, True])
def test_nothing_is_held_after_backward_and_the_graph_is_freed(fails, forced):
    model = mlp()
    h = model[1](model[0](X.float()))
    y = model[2](h)
    held, losses = (weakref.ref(h), weakref.ref(y)), three(y)
    del h, y
    if fails:
        losses[1] = losses[1] * math.nan
    opt = wrapped(model.parameters(), losses)
    if fails:
        with pytest.raises(FloatingPointError):
            opt.backward(losses)
    else:
        opt.backward(losses)
        with pytest.raises(RuntimeError, match="second time"):
            losses[0].backward()
        assert not any(p.grad.requires_grad for p in model.parameters())  # which hold no graph
    del losses
    assert [x() for x in held] == [None, None]


@bug("not freed")
def test_inputs_of_a_first_layer_are_freed_too(forced):
    """While the user holds the losses."""
    model = nn.Linear(5, 7, bias=False).double()
    x = X * 2
    losses = three(model(x))
    held = weakref.ref(x)
    del x
    wrapped(model.parameters(), losses).backward(losses)
    assert held() is None


# Devices


class OnMeta(nn.Module):
    """Everything that a step in mode "ghost" has: tied, looked up, convolved, and a head."""

    def __init__(self):
        super().__init__()
        self.tied, self.own = Tied(2, 2, padding_idx=1), nn.Embedding(9, 5)
        self.head, self.convolution = nn.Linear(5, 3), nn.Conv1d(5, 5, 2)

    def losses(self):
        ids = torch.zeros(2, 3, dtype=torch.int64, device="meta")
        h = self.convolution(self.own(ids).mT).mT
        return [*three(self.tied(ids)), self.head(h.tanh()).square().mean()]


@pytest.mark.parametrize(
    ("dtype", "some"), [(SINGLE, False), (torch.bfloat16, True)], ids=["all", "some"]
)
def test_step_waits_for_nothing(dtype, some, forced):
    with torch.device("meta"):
        model = OnMeta().to(dtype)
    shared = model.tied.parameters() if some else None
    opt = CAGradClip(
        AdamW(model.parameters()),
        [0.25] * 4,
        solver="pgd",
        nonfinite="propagate",
        gradients="ghost",
        shared_parameters=shared,
    )
    expected = {"tied.embedding", "tied.mix", "own", "head", "convolution"}
    assert covered(model, OnMeta.losses) == {f"{name}.weight" for name in expected}
    opt.backward(model.losses())
    opt.step()
    assert all(p.grad.is_meta for p in model.parameters())
    with pytest.raises(NO_VALUE):
        _ = opt.report
